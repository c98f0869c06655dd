"""`quantize`: a model in floats becomes one whose weights, and inputs of layers, are codes; by torchao or ModelOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from trt_dynamo.quantization.asked import Asked, called
from trt_dynamo.quantization.calibrated import calibrated, torchao
from trt_dynamo.quantization.modelopt import quantized_by_modelopt
from trt_dynamo.quantization.weight_only import quantize_weights


def quantize(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    dtype: str = "int8",
    *,
    method: str | None = None,
    percentile: float = 99.99,
    strength: float = 0.8,
    group: int | None = None,
    keep: Sequence[str] = (),
    run: Callable[[Any, Any], Any] | None = None,
    dynamic: bool = True,
    tool: str = "torchao",
) -> nn.Module:
    """A quantized copy of the model, for `torch.compile(..., backend="tensorrt")`: linear layers and convolutions
    read inputs and weights as INT8 or FP8 codes, with one scale per input and one per output channel of a weight;
    embeddings read their weights as codes of the same type, with one scale per row.

    The model is exported as it is called with the first batch, and calibrated with all. With "int8wo" and "int4wo" only
    weights become codes, the model stays the module that it was, and there is nothing to calibrate.

    Args:
        model: in floats, in the device and state in which it will be used; it is exported in `eval()`.
        loader: batches, such as a DataLoader's. A mapping is given to the model as keyword arguments, a tuple or list
            as positional ones, anything else as the one argument. A hundred or so are enough.
        dtype: "int8", or "fp8" (float8_e4m3fn, for compute capability 8.9 and later). Weights alone: "int8wo", or
            "int4wo" (of linear layers; those of embeddings become int8).
        method: what an input's scale is made of. "minmax": its largest magnitude, the default for fp8. "smooth", that
            for int8: the same, after the range of channels that reach far went from the inputs of linear layers into
            their weights, as in SmoothQuant. "entropy": the limit that TensorRT's entropy calibrator would choose
            (int8). "percentile": the magnitude below which `percentile` percent lie. Weights always have their largest.
        percentile, strength: of the methods "percentile" and "smooth"; a strength of 1 moves all into the weights.
        group: of "int8wo" and "int4wo": how many weights of a row share a scale, by default all of them, and 32.
        keep: patterns (`*` and `?`) over the names of modules; what matches, and all that is in it, stays in floats.
        run: calls the model with a batch where that is not enough: `lambda model, batch: model(batch[0])`.
        dynamic: keeps the sizes of inputs open, as far as the model lets them be.
        tool: "torchao", or "modelopt", NVIDIA's: it leaves the model the module that it was, embeddings in floats, and
            128 weights to a scale of "int4wo". Its methods are "smooth" and "minmax" for int8, "minmax" for fp8, and
            for int4wo none, or "awq", which is calibrated.

    Raises:
        ImportError: the tool is not installed.
        ValueError: a value of an argument is unknown, there was no batch, or a value of the model is not finite.
    """
    asked = Asked(tool, dtype, method or "", percentile, strength, group, tuple(keep), run or called, dynamic)
    batches = asked.batches(loader)
    if tool == "modelopt":
        return quantized_by_modelopt(model, batches, asked)
    if batches is None:
        torchao("torchao.quantization")
        return quantize_weights(model, dtype, group, asked.keep)
    return calibrated(model, batches, asked)
