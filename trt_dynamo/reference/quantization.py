"""Layers that quantize: QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE. INT4 is kept as int8, FP4 and E8M0 as float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trt_dynamo.reference.layer import Layer, Run, dims, evaluates

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
            # Blocks of equal size, but that the last may be cut short.
            scale = scale.repeat_interleave(-(-size // blocks), dim).narrow(dim, 0, size)
    return scale


def rounded(x: Tensor, kind: str) -> Tensor:
    """x, saturated and rounded (halves to even) to the values of a low type."""
    low, high = LIMITS[kind]
    x = x.clamp(low, high)
    if kind == "FP8":
        return x.to(torch.float8_e4m3fn)
    x = x.nan_to_num(nan=0.0)  # the others have no NaN
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
        whole = torch.round(y) if kind.startswith("INT") else y
        return rounded(whole + spread(zero.float(), x.shape, axis), kind)

    return run


@evaluates("DEQUANTIZE")
def dequantize(layer: Layer) -> Run:
    axis = layer.native.axis

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        y = x.float() if zero is None else x.float() - spread(zero.float(), x.shape, axis)
        return y * spread(scale, x.shape, axis)

    return run


@evaluates("DYNAMIC_QUANTIZE")
def dynamic_quantize(layer: Layer) -> Run:
    """Blocks quantized by scales of their own: the data, and the scales.

    A block's scale is its largest magnitude over the largest value of the output's type, and, where scales are FP8,
    over the second input. TensorRT documents neither this nor how E8M0 scales are rounded: up, here, as in cuDNN.
    """
    native = layer.native
    kind, scale_kind = layer.output_types
    rank = len(layer.input_shapes[0])
    block = list(dims(native.block_shape)) or [1] * rank
    if not len(dims(native.block_shape)):
        block[native.axis] = native.block_size
    limit = LIMITS[kind][1]

    def run(x: Tensor, outer: Tensor | None = None) -> tuple[Tensor, Tensor]:
        largest = block_maximum(x.abs(), block)
        scale = largest / limit
        factor = 1.0 if outer is None else outer.float()
        if scale_kind == "FP8":
            scale = rounded(scale / factor, "FP8").float()
        elif scale_kind == "E8M0":
            scale = torch.exp2(torch.ceil(torch.log2(scale)).clamp(-127, 127))
        whole = spread_blocks(scale * factor, x.shape)
        data = torch.where(whole == 0, torch.zeros_like(x), x / whole)
        return rounded(data, kind), scale

    return run


def block_maximum(x: Tensor, block: Sequence[int]) -> Tensor:
    """The largest element of each block; -1 is a block as long as the dim."""
    for axis, size in enumerate(block):
        length = x.shape[axis] if size == -1 else size
        x = x.unflatten(axis, (-1, length)).amax(axis + 1)
    return x


def spread_blocks(scale: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        scale = scale.repeat_interleave(size // scale.shape[axis], axis)
    return scale
