"""What runs along a dim: `ICumulativeLayer` for sums; for the others, log2(n) steps over the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trt_dynamo.aten_converters.functions import logaddexp
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import isnan
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

Step = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


@converter(aten.cumsum.default)
def cumsum(net: Network, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    wide = net.wide(net.cast(x, net.result_dtype()))
    return net.cast(net.running_sum(wide, dim % x.ndim) if x.ndim else wide, net.result_dtype())


def scan(net: Network, xs: tuple[Tensor, ...], fills: tuple[float, ...], axis: int, step: Step) -> tuple[Tensor, ...]:
    """Each element with all before it, by an associative `step(before, after)`; the fills change nothing as `before`.

    After k rounds each element holds what the 2**k elements up to it make. A dim without a known end takes 31 of them.
    """
    longest = net.largest(xs[0].shape[axis])
    reach = 1
    while reach < longest:
        starts = [-reach if i == axis else 0 for i in range(xs[0].ndim)]
        before = tuple(
            net.slice(x, starts, x.shape, [1] * x.ndim, "FILL", net.scalar(fill, x.dtype))
            for x, fill in zip(xs, fills, strict=True)
        )
        xs = step(before, xs)
        reach *= 2
    return xs


@converter(aten.cumprod.default)
def cumprod(net: Network, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    wide = net.wide(net.cast(x, net.result_dtype()))
    if x.ndim:
        (wide,) = scan(net, (wide,), (1,), dim % x.ndim, lambda a, b: (net.elementwise("PROD", a[0], b[0]),))
    return net.cast(wide, net.result_dtype())


@converter(aten.logcumsumexp.default)
def logcumsumexp(net: Network, x: Tensor, dim: int) -> Tensor:
    wide = net.wide(x)
    if x.ndim:
        (wide,) = scan(net, (wide,), (-math.inf,), dim % x.ndim, lambda a, b: (logaddexp(net, a[0], b[0]),))
    return net.cast(wide, x.dtype)


def register_running_extreme(target: torch._ops.OpOverload, wins: str) -> None:
    @converter(target)
    def running_extreme(net: Network, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The later of equal elements counts, and NaN from the first on."""
        if x.ndim == 0:
            return x, net.scalar(0, torch.int64)
        if x.dtype is torch.bool:
            value, place = running_extreme(net, net.cast(x, torch.int32), dim)
            return net.cast(value, torch.bool), place
        axis = dim % x.ndim
        least = -math.inf if x.is_float else torch.iinfo(x.dtype).min
        fill = least if wins == "GREATER" else math.inf if x.is_float else torch.iinfo(x.dtype).max

        def step(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            stays = net.elementwise("AND", net.elementwise(wins, a[0], b[0]), net.logical_not(isnan(net, b[0])))
            if x.is_float:
                stays = net.elementwise(
                    "OR", stays, net.elementwise("AND", isnan(net, a[0]), net.logical_not(isnan(net, b[0])))
                )
            return net.where(stays, a[0], b[0]), net.where(stays, a[1], b[1])

        counted = net.linspace(x.shape, 0, [int(i == axis) for i in range(x.ndim)])
        value, place = scan(net, (x, counted), (fill, 0), axis, step)
        return value, place


register_running_extreme(aten.cummax.default, "GREATER")
register_running_extreme(aten.cummin.default, "LESS")
