"""What is compared: eager, Inductor's modes, and TensorRT. In: a column's name. Out: the compiled model, or why the
column is missing here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.errors import SettingsError
from trt_dynamo.setting_values import nearest
from trt_dynamo.settings import Settings

Model = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """A way to run a model. `mode` is Inductor's."""

    name: str
    title: str
    mode: str | None = None
    cuda_graphs: bool = False


COLUMNS = {
    column.name: column
    for column in (
        Column("eager", "eager"),
        Column("inductor", "Inductor"),
        Column("reduce-overhead", "Inductor, reduce-overhead", mode="reduce-overhead", cuda_graphs=True),
        Column("max-autotune", "Inductor, max-autotune", mode="max-autotune"),
        Column("tensorrt", "TensorRT"),
    )
}
DEFAULT = ("eager", "inductor", "reduce-overhead", "tensorrt")


def chosen(text: str) -> tuple[Column, ...]:
    """The columns of a list such as `eager,tensorrt`, in its order; the default ones for an empty text.

    Raises:
        SettingsError: a name is none of theirs.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or DEFAULT
    for name in names:
        if name not in COLUMNS:
            hint = nearest(name, COLUMNS)
            raise SettingsError(f"{name!r} is no column: {', '.join(COLUMNS)}{f'; {hint}' if hint else ''}")
    return tuple(COLUMNS[name] for name in dict.fromkeys(names))


def why_missing(column: Column, device: torch.device, settings: Settings) -> str | None:
    """Why this column cannot be timed here, or None."""
    if column.name == "tensorrt":
        return why_no_tensorrt(device, settings)
    if column.cuda_graphs and device.type != "cuda":
        return "its CUDA graphs need a GPU"
    return None


def why_no_tensorrt(device: torch.device, settings: Settings) -> str | None:
    """Why no engine can be timed. The stand-in is no TensorRT, so its time is never told for one."""
    if settings.runtime in ("reference", "eager"):
        return f"the setting runtime={settings.runtime} runs no TensorRT"
    if tensorrt_module.why_missing() is not None:
        return "no TensorRT is installed"
    if not torch.cuda.is_available():
        return "no GPU"
    reason = tensorrt_module.why_not_runnable()
    if reason is None and device.type != "cuda":
        reason = f"the model is on {device}"
    return reason


def compiled(column: Column, model: Model, dynamic: bool | None, options: Mapping[str, Any]) -> Model:
    """The model as this column runs it; it is compiled in its first call. `options` are TensorRT's settings."""
    if column.name == "eager":
        return model
    if column.name != "tensorrt":
        return torch.compile(model, mode=column.mode, dynamic=dynamic)
    from trt_dynamo.backend import tensorrt

    # No engine, no time: with runtime=tensorrt what cannot run is an error, not eager under another name.
    options = {**options, "runtime": "tensorrt", "compile": "sync", "rebuild": "sync"}
    return torch.compile(model, backend=tensorrt, dynamic=dynamic, options=options)
