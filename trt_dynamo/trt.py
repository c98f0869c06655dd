"""Picks TensorRT once: `tensorrt` if it loads, else `tensorrt_rtx`. The only module that imports either.

`trt` is the selected module, loaded at its first use, so that importing trt_dynamo costs nothing and works without it.
What differs between versions is asked for by name (`has("add_attention")`), never by comparing versions.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.settings import Settings

if TYPE_CHECKING:
    import tensorrt as trt

INSTALL_HINT = 'pip install "trt-dynamo[rtx]" (TensorRT for RTX) or pip install "trt-dynamo[tensorrt]" (TensorRT)'

# TensorRT-RTX 1.x compiles for these; 9.0 (Hopper) and 10.0 (data-center Blackwell) are refused when an engine is
# loaded.
RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9))
RTX_FIRST_OPEN_CAPABILITY = (12, 0)


class TensorRTMissing(TrtDynamoError):
    """No TensorRT can be imported here; the text says what to install."""


@functools.cache
def load() -> ModuleType:
    """The selected TensorRT module.

    Raises:
        TensorRTMissing: neither package can be imported, or the one that TRT_DYNAMO_FLAVOR names cannot.
    """
    wanted = Settings.from_env().flavor
    names = ("tensorrt", "tensorrt_rtx") if wanted == "auto" else (wanted,)
    failures = []
    for name in names:
        try:
            module = importlib.import_module(name)
            module.Builder  # noqa: B018  a package without its library is an empty module
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            failures.append(f"{name}: {error}")
            continue
        return module
    raise TensorRTMissing(f"no TensorRT can be loaded ({'; '.join(failures)}). Install one: {INSTALL_HINT}")


def why_missing() -> str | None:
    """Why no TensorRT can be loaded, or None when one is there."""
    try:
        load()
    except TensorRTMissing as error:
        return str(error)
    return None


class LazyModule:
    """Stands for the selected TensorRT module and imports it at the first attribute that is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load(), name)


if not TYPE_CHECKING:
    trt = LazyModule()


def flavor() -> str:
    """`"tensorrt"` or `"tensorrt_rtx"`."""
    return load().__name__


def version() -> str:
    return str(trt.__version__)


@functools.cache
def has(method: str) -> bool:
    """Whether this TensorRT's `INetworkDefinition` has the method, for example `add_attention`."""
    return hasattr(trt.INetworkDefinition, method)


def probed(thing: object) -> Any:
    """The same thing, untyped: for what some versions lack, after `has` said that this one has it."""
    return thing


def is_rtx() -> bool:
    """TensorRT for RTX: no NonZero, NMS, bf16 deconvolution; portable engines; its own CUDA-graph rules."""
    return flavor() == "tensorrt_rtx"


def has_data_dependent_sizes() -> bool:
    """Whether engines can hold what finds its own size (NonZero). RTX has the layer, and refuses it when it builds."""
    return not is_rtx()


def why_not_runnable() -> str | None:
    """Why an engine cannot run on this machine, or None when it can."""
    missing = why_missing()
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if not is_rtx():
        return None
    reason = why_not_on(torch.cuda.get_device_capability())
    return reason and f"{reason} ({torch.cuda.get_device_name()}); TensorRT does: pip install trt-dynamo[tensorrt]"


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why TensorRT for RTX runs no engine on GPUs of this compute capability, or None where it does."""
    if capability in RTX_CAPABILITIES or capability >= RTX_FIRST_OPEN_CAPABILITY:
        return None
    return f"TensorRT for RTX does not support compute capability {capability[0]}.{capability[1]}"


def why_no_refit() -> str | None:
    """Why no engine that can be refitted is built on this machine, or None. TensorRT for RTX loads code onto the GPU to
    build one, so that it cannot where it could not run it.
    """
    missing = why_missing()
    if missing is not None or not is_rtx():
        return missing
    why = why_not_runnable()
    return why and f"TensorRT for RTX builds refittable engines only where they can run: {why}"


TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "FP8",
}
TORCH_TYPES = {name: dtype for dtype, name in TYPES.items()}


def to_trt(dtype: torch.dtype) -> trt.DataType:
    """TensorRT's name for a torch dtype. KeyError where TensorRT has none (float64, complex, int16)."""
    result: trt.DataType = getattr(trt.DataType, TYPES[dtype])
    return result


def to_torch(dtype: trt.DataType) -> torch.dtype:
    """torch's name for a TensorRT dtype. KeyError for those torch lacks (int4, fp4)."""
    return TORCH_TYPES[dtype.name]
