"""Layers that quantize: QUANTIZE, DEQUANTIZE. INT4 is kept as int8, FP4 as the float32 values that it can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_dynamo.reference.layer import Layer, Run, evaluates

LIMITS = {"INT8": (-128, 127), "INT4": (-8, 7), "FP8": (-448.0, 448.0), "FP4": (-6.0, 6.0)}


def spread(scale: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """A scale (one, one per index of the axis, or one per block) in a shape that broadcasts over `shape`."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1 and (len(shape) != 1 or scale.shape[0] == shape[0]):
        return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    for dim, size in enumerate(shape):
        blocks = scale.shape[dim]
        if blocks not in (1, size):
            scale = scale.repeat_interleave(-(-size // blocks), dim).narrow(dim, 0, size)
    return scale


def rounded(x: Tensor, kind: str) -> Tensor:
    """x, saturated and rounded (halves to even) to the values of a low type."""
    low, high = LIMITS[kind]
    x = x.clamp(low, high)
    if kind == "FP8":
        return x.to(torch.float8_e4m3fn)
    if kind == "FP4":
        return to_fp4(x)
    return torch.round(x).to(torch.int8)


def to_fp4(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; halfway, the one with the even last bit."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, x)


@evaluates("QUANTIZE")
def quantize(layer: Layer) -> Run:
    axis, kind = layer.native.axis, layer.output_types[0]
    if kind not in LIMITS:
        raise layer.unsupported(f"output type {kind}")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        y = x / spread(scale, x.shape, axis)
        if zero is None:
            return rounded(y, kind)
        return rounded(torch.round(y) + spread(zero, x.shape, axis), kind)

    return run


@evaluates("DEQUANTIZE")
def dequantize(layer: Layer) -> Run:
    axis = layer.native.axis

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        y = x.float() if zero is None else x.float() - spread(zero.float(), x.shape, axis)
        return y * spread(scale, x.shape, axis)

    return run
