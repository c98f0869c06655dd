"""Convolution and its transpose: `IConvolutionLayer`, `IDeconvolutionLayer`.

Kernel and bias stay constants of their own, in torch's layout, which is also TensorRT's: each can be refitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import is_rtx, to_trt, trt

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its spatial dims, one number for each; `shape` is that of the result."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    groups: int
    shape: tuple[Dim, ...]


@converter(aten.convolution.default)
def convolution(
    net: Network,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    spatial, shape = x.ndim - 2, net.result_shape()
    if not x.is_float:
        raise Unsupported(f"convolution of {str(x.dtype).removeprefix('torch.')}: TensorRT has floats only")
    if spatial not in (1, 2, 3):
        raise Unsupported(f"convolution over {spatial} dims")
    net.static_shape(weight, "kernel")
    if 0 in shape:
        return net.full(shape, 0, x.dtype)
    sizes = [list(s) * (spatial if len(s) == 1 else 1) for s in (stride, padding, dilation, output_padding)]
    if spatial == 1:
        # TensorRT convolves over two or three dims: one of size 1 is put before the last.
        sizes = [[first, *s] for first, s in zip((1, 0, 1, 0), sizes, strict=True)]
        x, weight, shape = net.unsqueeze(x, [2]), net.unsqueeze(weight, [2]), (*shape[:2], 1, *shape[2:])
    make = deconvolve if transposed else convolve
    result = make(net, x, weight, bias, Geometry(sizes[0], sizes[1], sizes[2], sizes[3], groups, shape))
    return net.squeeze(result, [2]) if spatial == 1 else result


def convolve(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    maps = int(weight.shape[0])
    layer = net.made(net.raw.add_convolution_nd(x.raw, maps, kernel_size(weight), trt.Weights(to_trt(x.dtype))))
    give(layer, weight, bias, geometry)
    layer.padding_nd = geometry.padding
    return net.out(layer, shape=geometry.shape, dtype=x.dtype)


def deconvolve(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`output_padding` is what is not cut off at the end; where there is nothing left to keep, zeros are added."""
    dtype, shape = x.dtype, geometry.shape
    if dtype is torch.bfloat16 and is_rtx():
        # TensorRT for RTX has no bfloat16 kernels for it, and fails to build one with a bias in the layer.
        x, weight = net.cast(x, torch.float32), net.cast(weight, torch.float32)
        bias = bias and net.cast(bias, torch.float32)
    if is_rtx() and max(geometry.stride) > 1 and max(geometry.dilation) > 1:
        # Nor kernels for strides and dilation at once: the kernel itself gets zeros between its elements.
        weight, geometry = (
            dilate(net, weight, geometry.dilation),
            dataclasses.replace(geometry, dilation=[1] * len(geometry.dilation)),
        )
    cuts = [cut - more for cut, more in zip(geometry.padding, geometry.output_padding, strict=True)]
    grows = min(cuts) < 0
    maps = int(weight.shape[1]) * geometry.groups
    layer = net.made(net.raw.add_deconvolution_nd(x.raw, maps, kernel_size(weight), trt.Weights(to_trt(x.dtype))))
    apart = grows or x.dtype is not dtype
    give(layer, weight, None if apart else bias, geometry)
    layer.pre_padding, layer.post_padding = geometry.padding, [max(cut, 0) for cut in cuts]
    result = net.out(layer, shape=None if grows else shape, dtype=x.dtype)
    if grows:
        result = net.slice(result, [0] * x.ndim, shape, [1] * x.ndim, "FILL")
    if apart and bias is not None:
        result = net.elementwise("SUM", result, net.reshape(bias, (maps, *(1 for _ in cuts))))
    return net.cast(result, dtype)


def dilate(net: Network, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """The kernel with zeros between its elements."""
    outer, size = weight.shape[:2], kernel_size(weight)
    wide = net.reshape(weight, (*outer, *(d for k in size for d in (k, 1))))
    shape = (*outer, *(d for pair in zip(size, dilation, strict=True) for d in pair))
    wide = net.slice(wide, [0] * len(shape), shape, [1] * len(shape), "FILL")
    joined = net.reshape(wide, (*outer, *(k * d for k, d in zip(size, dilation, strict=True))))
    kept = (*outer, *((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)))
    return net.slice(joined, [0] * len(kept), kept, [1] * len(kept))


def kernel_size(weight: Tensor) -> list[int]:
    return [int(d) for d in weight.shape[2:]]


def give(
    layer: trt.IConvolutionLayer | trt.IDeconvolutionLayer | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> None:
    """What both layers take, the kernel and the bias as tensors."""
    if layer is None:
        raise Unsupported("TensorRT refused the convolution")
    layer.set_input(1, weight.raw)
    if bias is not None:
        layer.set_input(2, bias.raw)
    layer.stride_nd, layer.dilation_nd, layer.num_groups = geometry.stride, geometry.dilation, geometry.groups
