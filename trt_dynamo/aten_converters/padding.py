"""Padding of every kind: a slice that reaches beyond its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import trt_dynamo.operators.resampling  # noqa: F401  it defines circular padding
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import modulo
from trt_dynamo.profiles import Dim

aten = torch.ops.aten


def padded(net: Network, x: Tensor, pad: Sequence[Dim], mode: str, fill: Tensor | None = None) -> Tensor:
    """`pad` holds two amounts for each of the last dims, the last dim first; a negative one cuts."""
    start: list[Dim] = [0] * x.ndim
    for i, amount in enumerate(pad[::2]):
        start[-1 - i] = -amount
    shape = net.result_shape()
    if 0 in shape or 0 in x.shape:
        return net.full(shape, 0 if fill is None or fill.value is None else fill.value.item(), x.dtype)
    return net.slice(x, start, shape, [1] * x.ndim, mode, fill)


@converter(aten.constant_pad_nd.default)
def constant_pad(net: Network, x: Tensor, pad: Sequence[Dim], value: float = 0) -> Tensor:
    return padded(net, x, pad, "FILL", net.scalar(value, x.dtype))


@converter(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def reflection_pad(net: Network, x: Tensor, pad: Sequence[Dim]) -> Tensor:
    return padded(net, x, pad, "REFLECT")


@converter(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def replication_pad(net: Network, x: Tensor, pad: Sequence[Dim]) -> Tensor:
    return padded(net, x, pad, "CLAMP")


@converter(torch.ops.trt_dynamo.pad_circular.default)
def pad_circular(net: Network, x: Tensor, amounts: Sequence[Dim]) -> Tensor:
    """What negative amounts cut off is gone before the rest is repeated around it."""
    shape, cut, kept = net.result_shape(), [0] * x.ndim, list(x.shape)
    start: list[Dim] = [0] * x.ndim
    for i, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        less = [max(-net.seen(amount), 0) for amount in (before, after)]
        cut[-1 - i], kept[-1 - i] = less[0], kept[-1 - i] - less[0] - less[1]
        start[-1 - i] = 0 if less[0] else modulo(-before, kept[-1 - i])
    if 0 in shape:
        return net.full(shape, 0, x.dtype)
    return net.slice(net.slice(x, cut, kept, [1] * x.ndim), start, shape, [1] * x.ndim, "WRAP")
