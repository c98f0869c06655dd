"""Models quantized by NVIDIA's ModelOpt, which is loaded at the first call.

Comes in: a model in floats, and batches. Goes out: a copy with ModelOpt's quantizers in it, which become ops of ours
when the model is compiled.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trt_dynamo.quantization.asked import Asked, with_first
from trt_dynamo.quantization.weight_only import kept

# By type and method: the name of ModelOpt's configuration.
CONFIGURATIONS: Mapping[tuple[str, str], str] = {
    ("int8", "smooth"): "INT8_SMOOTHQUANT_CFG",
    ("int8", "minmax"): "INT8_DEFAULT_CFG",
    ("fp8", "minmax"): "FP8_DEFAULT_CFG",
    ("int8wo", ""): "INT8_WEIGHT_ONLY_CFG",
    ("int4wo", ""): "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    ("int4wo", "awq"): "INT4_AWQ_CFG",
}


def quantized_by_modelopt(model: nn.Module, loader: Iterable[Any] | None, asked: Asked) -> nn.Module:
    """A quantized copy of the model, in `eval()`.

    Raises:
        ImportError: ModelOpt is not installed.
        ValueError: there was no batch, or a value of the model is not finite.
    """
    tool = modelopt()
    result = copy.deepcopy(model).eval()
    run = None if loader is None else calibration(loader, asked.call)
    with torch.no_grad():
        try:
            tool.quantize(result, configuration(tool, result, asked), run)
        except AssertionError as error:  # of ModelOpt's calibrators
            raise ValueError(f"a value is infinite or NaN: such a model cannot be calibrated ({error})") from error
    return result


def calibration(loader: Iterable[Any], call: Callable[[Any, Any], Any]) -> Callable[[nn.Module], None]:
    """What runs all batches through a model; ModelOpt calls it as often as its algorithm needs."""
    batches = list(loader) if isinstance(loader, Iterator) else loader

    def run(model: nn.Module) -> None:
        calls: list[nn.Module] = []
        watch = model.register_forward_pre_hook(lambda module, _: calls.append(module))
        for batch in with_first(batches)[1]:
            call(model, batch)
        watch.remove()
        if not calls:
            raise ValueError("run did not call the model")

    return run


def modelopt() -> Any:
    try:
        return importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        fix = "pip install 'trt-dynamo[modelopt]'"
        raise ImportError(f"tool='modelopt' needs NVIDIA's ModelOpt: {fix} ({error})") from error


def configuration(tool: Any, model: nn.Module, asked: Asked) -> dict[str, Any]:
    """ModelOpt's own, with what the caller says otherwise."""
    found: dict[str, Any] = copy.deepcopy(getattr(tool, CONFIGURATIONS[asked.dtype, asked.method]))
    if asked.method == "smooth":
        found["algorithm"] = {"method": "smoothquant", "alpha": asked.strength}
    entries = found["quant_cfg"]
    for entry in entries:
        if asked.group is not None and entry["quantizer_name"] == "*weight_quantizer":
            bits = 4 if asked.dtype == "int4wo" else 8
            entry["cfg"] = {"num_bits": bits, "block_sizes": {-1: asked.group, "type": "static"}}
    modules = [(name, module) for name, module in model.named_modules() if name]
    names = [name for name, module in modules if kept(name, asked.keep) or multiplies_nothing(module)]
    entries += [{"quantizer_name": f"{name}.*quantizer", "enable": False} for name in names]
    return found


def multiplies_nothing(module: nn.Module) -> bool:
    """Whether it is a norm, a pooling layer or the like. ModelOpt quantizes the inputs of some, which brings no faster
    products, and costs a transformer much: there lie the sums of its residuals, of which few channels reach far.
    """
    weight = getattr(module, "weight", None)
    return not any(True for _ in module.children()) and (not isinstance(weight, Tensor) or weight.ndim < 2)
