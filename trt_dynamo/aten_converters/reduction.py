"""Reductions: `IReduceLayer`. NaN goes through a maximum and a minimum as in torch, which TensorRT does not promise.

A place (argmax, the indices of max) is the first of the largest elements, as in torch; TensorRT does not say which of
equal elements its top-k names, so places are found by comparing. Sums of the half types are taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

from trt_dynamo.aten_converters.comparison import truth
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import product
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

Dims = Sequence[int] | int | None

# An index that no dim reaches: TensorRT's tensors have fewer elements.
NOWHERE = 2**31 - 1


def axes_of(x: Tensor, dims: Dims) -> list[int]:
    """The dims that a reduction goes over: all of them where none is named."""
    listed = [dims] if isinstance(dims, int) else dims or range(x.ndim)
    return sorted({d % x.ndim for d in listed}) if x.ndim else []


def added(net: Network, op: str, x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    """SUM, PROD or AVG in the result's dtype, the half types in float32."""
    wide = net.wide(net.cast(x, net.result_dtype()))
    return net.cast(net.reduce(op, wide, axes_of(x, dims), keepdim), net.result_dtype())


@converter(aten.sum.default, aten.sum.dim_IntList)
def sum_(
    net: Network, x: Tensor, dims: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return added(net, "SUM", x, dims, keepdim)


@converter(aten.mean.default, aten.mean.dim)
def mean(
    net: Network, x: Tensor, dims: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return added(net, "AVG", x, dims, keepdim)


@converter(aten.prod.default, aten.prod.dim_int)
def prod(
    net: Network, x: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return added(net, "PROD", x, dim, keepdim)


# -- the largest, the least, and where they are ------------------------------------------------------------------------


def extreme_of(net: Network, op: str, x: Tensor, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    """MAX or MIN over the axes; NaN where there is one, which a sum of nothing but NaNs and zeros adds."""
    found = net.reduce(op, x, axes, keepdim)
    if not x.is_float or not axes:
        return found
    holes = net.where(net.unary("ISNAN", x), x, 0.0)
    return net.elementwise("SUM", found, net.reduce("SUM", holes, axes, keepdim))


def place_of(net: Network, op: str, x: Tensor, axis: int, keepdim: bool = False) -> Tensor:
    """The index of the first largest (MAX) or least (MIN) element along the axis, or of the first NaN; int64."""
    hits = net.elementwise("EQUAL", x, extreme_of(net, op, x, [axis], keepdim=True))
    if x.is_float:
        hits = net.elementwise("OR", hits, net.unary("ISNAN", x))
    shape: list[Dim] = [d if i == axis else 1 for i, d in enumerate(x.shape)]
    counted = net.linspace(shape, 0, [int(i == axis) for i in range(x.ndim)], torch.int32)
    places = net.where(hits, counted, net.scalar(NOWHERE, torch.int32, x.ndim))
    return net.cast(net.reduce("MIN", places, [axis], keepdim), torch.int64)


def register_extreme(
    op: str, over: torch._ops.OpOverload, total: torch._ops.OpOverload, along: torch._ops.OpOverload
) -> None:
    @converter(over)
    def extreme_over(net: Network, x: Tensor, dims: Dims = (), keepdim: bool = False) -> Tensor:
        net.refuse_empty(x, axes_of(x, dims))
        return extreme_of(net, op, x, axes_of(x, dims), keepdim)

    @converter(total)
    def extreme_in_all(net: Network, x: Tensor) -> Tensor:
        net.refuse_empty(x, axes_of(x, None))
        return extreme_of(net, op, x, axes_of(x, None))

    @converter(along)
    def extreme_along(net: Network, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor | None, ...]:
        if x.ndim == 0:
            return x, net.scalar(0, torch.int64)
        axis = dim % x.ndim
        net.refuse_empty(x, [axis])
        value = extreme_of(net, op, x, [axis], keepdim) if net.used[0] else None
        return value, place_of(net, op, x, axis, keepdim) if net.used[1] else None


def register_place(op: str, target: torch._ops.OpOverload) -> None:
    @converter(target)
    def place(net: Network, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if x.ndim == 0:
            return net.scalar(0, torch.int64)
        if dim is None:
            flat = net.reshape(x, (product(x.shape),))
            return net.reshape(place_of(net, op, flat, 0), net.result_shape())
        return place_of(net, op, x, dim % x.ndim, keepdim)


register_extreme("MAX", aten.amax.default, aten.max.default, aten.max.dim)
register_extreme("MIN", aten.amin.default, aten.min.default, aten.min.dim)
register_place("MAX", aten.argmax.default)
register_place("MIN", aten.argmin.default)


# -- logic -------------------------------------------------------------------------------------------------------------


def any_of(net: Network, x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """Whether any of these bools is true; a sum, because over nothing it is 0 and a maximum is not."""
    if not axes:
        return x
    return net.elementwise("GREATER", net.reduce("SUM", net.cast(x, torch.int32), axes, keepdim), 0)


def logic_axes(x: Tensor, dims: Dims) -> list[int]:
    """Here a list without dims means none of them."""
    return axes_of(x, dims) if dims is None or isinstance(dims, int) or dims else []


@converter(aten.any.default, aten.any.dim, aten.any.dims)
def any_(net: Network, x: Tensor, dims: Dims = None, keepdim: bool = False) -> Tensor:
    return net.cast(any_of(net, truth(net, x), logic_axes(x, dims), keepdim), net.result_dtype())


@converter(aten.all.default, aten.all.dim, aten.all.dims)
def all_(net: Network, x: Tensor, dims: Dims = None, keepdim: bool = False) -> Tensor:
    """No element is false."""
    false = any_of(net, net.logical_not(truth(net, x)), logic_axes(x, dims), keepdim)
    return net.cast(net.logical_not(false), net.result_dtype())


# -- statistics and norms ----------------------------------------------------------------------------------------------


def moments(net: Network, x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the deviations from it, and their squares, the axes kept with size 1."""
    middle = net.reduce("AVG", x, axes, keepdim=True)
    deviation = net.elementwise("SUB", x, middle)
    return middle, deviation, net.elementwise("PROD", deviation, deviation)


def count_of(x: Tensor, axes: Sequence[int]) -> Dim:
    return product([x.shape[axis] for axis in axes])


@converter(aten.var.correction)
def var(net: Network, x: Tensor, dims: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Tensor:
    return net.cast(spread_of(net, x, dims, correction, keepdim), x.dtype)


def spread_of(net: Network, x: Tensor, dims: Dims, correction: float | None, keepdim: bool) -> Tensor:
    """The variance, of the half types in float32."""
    axes = axes_of(x, dims)
    total = net.reduce("SUM", moments(net, net.wide(x), axes)[2], axes, keepdim)
    taken = 1 if correction is None else correction
    return net.elementwise("DIV", total, degrees(net, count_of(x, axes), taken))


@converter(aten.std.correction)
def std(net: Network, x: Tensor, dims: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Tensor:
    return net.cast(net.unary("SQRT", spread_of(net, x, dims, correction, keepdim)), x.dtype)


@converter(aten.var_mean.correction)
def var_mean(
    net: Network, x: Tensor, dims: Dims = None, *, correction: float | None = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return var(net, x, dims, correction=correction, keepdim=keepdim), added(net, "AVG", x, dims, keepdim)


@converter(aten.std_mean.correction)
def std_mean(
    net: Network, x: Tensor, dims: Dims = None, *, correction: float | None = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return std(net, x, dims, correction=correction, keepdim=keepdim), added(net, "AVG", x, dims, keepdim)


def degrees(net: Network, count: Dim, correction: float) -> float | Tensor:
    """`max(count - correction, 0)`."""
    if not isinstance(count, sympy.Expr):
        return max(float(count) - correction, 0.0)
    return net.elementwise("MAX", net.elementwise("SUB", net.size_tensor(count, torch.float32), correction), 0.0)


@converter(aten.linalg_vector_norm.default)
def vector_norm(
    net: Network,
    x: Tensor,
    order: float = 2,
    dims: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    result = net.result_dtype()
    return net.cast(norm_of(net, net.wide(net.cast(x, result)), order, axes_of(x, dims), keepdim), result)


def norm_of(net: Network, x: Tensor, order: float, axes: Sequence[int], keepdim: bool = False) -> Tensor:
    """`sum(|x| ** order) ** (1 / order)`, at its limits the largest, the least, and the count of what is not zero."""
    size = net.unary("ABS", x)
    if order in (math.inf, -math.inf):
        return extreme_of(net, "MAX" if order > 0 else "MIN", size, axes, keepdim)
    if order == 0:
        there = net.cast(net.logical_not(net.elementwise("EQUAL", size, 0.0)), size.dtype)
        return net.reduce("SUM", there, axes, keepdim)
    if order == 1:
        return net.reduce("SUM", size, axes, keepdim)
    if order == 2:
        return net.unary("SQRT", net.reduce("SUM", net.elementwise("PROD", size, size), axes, keepdim))
    total = net.reduce("SUM", net.elementwise("POW", size, float(order)), axes, keepdim)
    return net.elementwise("POW", total, 1 / order)


@converter(aten.logsumexp.default)
def logsumexp(net: Network, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Around the largest element, or around 0 where that is infinite."""
    wide, axes = net.wide(net.cast(x, net.result_dtype())), axes_of(x, dims)
    largest = net.reduce("MAX", wide, axes, keepdim=True)
    middle = net.where(net.unary("ISINF", largest), 0.0, largest)
    total = net.unary(
        "LOG", net.reduce("SUM", net.unary("EXP", net.elementwise("SUB", wide, middle)), axes, keepdim=True)
    )
    result = net.elementwise("SUM", total, middle)
    return net.cast(result if keepdim else net.squeeze(result, axes), net.result_dtype())
