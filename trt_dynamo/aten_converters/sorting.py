"""Order: `ITopKLayer`, which takes up to 3840 elements; and searches in sorted numbers, by counting.

Which of two equal elements comes first is open in TensorRT, as it is in torch for all but a stable sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.reduction import place_of
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.scatter import refuse_large
from trt_dynamo.aten_converters.shapes import floordiv, product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import trt

aten = torch.ops.aten

LARGEST_K = 3840


def top(net: Network, x: Tensor, k: Dim, axis: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) elements along an axis, in order, and where they are."""
    if net.most(k) > LARGEST_K:
        raise Unsupported(f"the order of up to {net.most(k)} elements: TensorRT takes {LARGEST_K}")
    shape = [k if i == axis else d for i, d in enumerate(x.shape)]
    if 0 in shape:
        return net.full(shape, 0, x.dtype), net.full(shape, 0, torch.int64)
    data = net.cast(x, torch.int32) if x.dtype is torch.bool else x
    # TensorRT wants a rank of 2 at least.
    data = net.unsqueeze(data, [0]) if x.ndim == 1 else data
    layer = net.raw.add_topk(
        data.raw,
        getattr(trt.TopKOperation, "MAX" if largest else "MIN"),
        k if isinstance(k, int) else 1,
        1 << (axis + data.ndim - x.ndim),
    )
    if layer is not None and not isinstance(k, int):
        layer.set_input(1, net.size_tensor(k, torch.int32).raw)
    wide = [*([1] if x.ndim == 1 else []), *shape]
    values, places = (net.out(layer, i, shape=wide, dtype=d) for i, d in enumerate((data.dtype, torch.int32)))
    if x.ndim == 1:
        values, places = net.squeeze(values, [0]), net.squeeze(places, [0])
    return net.cast(values, x.dtype), net.cast(places, torch.int64)


def scalar(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """What every choice from a single element gives."""
    return x, net.scalar(0, torch.int64)


@converter(aten.topk.default)
def topk(
    net: Network, x: Tensor, k: Dim, dim: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    return top(net, x, k, dim % x.ndim, largest=largest) if x.ndim else scalar(net, x)


@converter(aten.sort.default)
def sort(net: Network, x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    if x.ndim == 0:
        return scalar(net, x)
    if net.most(x.shape[dim]) > LARGEST_K:
        return by_rank(net, x, dim % x.ndim, descending)
    return top(net, x, x.shape[dim], dim % x.ndim, largest=descending)


@converter(aten.sort.stable)
def stable_sort(
    net: Network, x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    if not stable or not net.used[1] or x.ndim == 0:
        return sort(net, x, dim, descending)
    return by_rank(net, x, dim % x.ndim, descending)


def by_rank(net: Network, x: Tensor, axis: int, descending: bool) -> tuple[Tensor, Tensor]:
    """A stable sort: an element's place is the number of those that go before it, equal ones among them."""
    size = x.shape[axis]
    refuse_large(net, product(x.shape) * size)
    if 0 in x.shape:
        return x, net.full(x.shape, 0, torch.int64)
    ahead, behind = net.unsqueeze(x, [axis]), net.unsqueeze(x, [axis + 1])
    op = "GREATER" if descending else "LESS"
    earlier = net.elementwise("LESS", net.linspace((1, size), 0, (0, 1)), net.linspace((size, 1), 0, (1, 0)))
    earlier = net.reshape(earlier, [*[1] * axis, size, size, *[1] * (x.ndim - axis - 1)])
    wins, same = net.elementwise(op, ahead, behind), net.elementwise("EQUAL", ahead, behind)
    if x.is_float:
        # NaN counts as the greatest, and one as the other.
        last, first = (net.unary("ISNAN", side) for side in ((ahead, behind) if descending else (behind, ahead)))
        wins = net.elementwise("OR", wins, net.elementwise("AND", last, net.logical_not(first)))
        same = net.elementwise("OR", same, net.elementwise("AND", last, first))
    before = net.elementwise("OR", wins, net.elementwise("AND", same, earlier))
    rank = net.reduce("SUM", net.cast(before, torch.int64), [axis + 1])
    steps = [1 if i == axis else 0 for i in range(x.ndim)]
    places = net.linspace(x.shape, 0, steps)
    return net.scatter(x, rank, x, axis), net.scatter(places, rank, places, axis)


@converter(aten.kthvalue.default)
def kthvalue(net: Network, x: Tensor, k: Dim, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    if x.ndim == 0:
        return scalar(net, x)
    axis = dim % x.ndim
    net.refuse_empty(x, [axis])
    values, places = top(net, x, k, axis, largest=False)
    last = [net.narrow(found, axis, k - 1, 1) for found in (values, places)]
    values, places = last if keepdim else (net.squeeze(found, [axis]) for found in last)
    return values, places


@converter(aten.median.dim)
def median_dim(net: Network, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of the two middle elements, or the first NaN."""
    if x.ndim == 0:
        return scalar(net, x)
    values, places = kthvalue(net, x, floordiv(x.shape[dim] + 1, 2), dim, keepdim)
    if x.is_float and net.used[1]:
        unknown = net.reduce("MAX", net.unary("ISNAN", x), [dim], keepdim)
        places = net.where(unknown, place_of(net, "MAX", x, dim % x.ndim, keepdim), places)
    return keep_nan(net, x, values, [dim], keepdim), places


@converter(aten.median.default)
def median(net: Network, x: Tensor) -> Tensor:
    count = product(x.shape)
    if count == 0:
        return net.full((), math.nan if x.is_float else torch.iinfo(x.dtype).min, x.dtype)
    values, _ = kthvalue(net, net.reshape(x, (count,)), floordiv(count + 1, 2))
    return keep_nan(net, x, values, range(x.ndim), False)


@converter(aten.nanmedian.dim)
def nanmedian_dim(net: Network, x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of the two middle elements of those that are numbers: in order, with the others behind them."""
    if not x.is_float or x.ndim == 0:
        return median_dim(net, x, dim, keepdim)
    axis = dim % x.ndim
    net.refuse_empty(x, [axis])
    unknown = net.unary("ISNAN", x)
    values, places = sort(net, net.where(unknown, math.inf, x), axis)
    known = net.reduce("SUM", net.cast(net.logical_not(unknown), torch.int64), [axis], keepdim=True)
    middle = net.elementwise("FLOOR_DIV", net.elementwise("MAX", net.elementwise("SUB", known, 1), 0), 2)
    value, place = (net.gather_elements(found, middle, axis) for found in (values, places))
    value = net.where(net.elementwise("EQUAL", known, 0), math.nan, value)
    return (value, place) if keepdim else (net.squeeze(value, [axis]), net.squeeze(place, [axis]))


@converter(aten.nanmedian.default)
def nanmedian(net: Network, x: Tensor) -> Tensor:
    return nanmedian_dim(net, net.reshape(x, (product(x.shape),)), 0)[0]


@converter(aten.mode.default)
def mode(net: Network, x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest of the most frequent elements, and the last place where it stands."""
    if x.ndim == 0:
        return scalar(net, x)
    axis, size = dim % x.ndim, x.shape[dim]
    net.refuse_empty(x, [axis])
    refuse_large(net, product(x.shape) * size)
    number = net.cast(x, torch.int32) if x.dtype is torch.bool else x
    same = net.elementwise("EQUAL", net.unsqueeze(number, [axis]), net.unsqueeze(number, [axis + 1]))
    count = net.reduce("SUM", net.cast(same, torch.int64), [axis + 1])
    often = net.elementwise("EQUAL", count, net.reduce("MAX", count, [axis], keepdim=True))
    top_value = math.inf if x.is_float else torch.iinfo(number.dtype).max
    value = net.reduce("MIN", net.where(often, number, net.scalar(top_value, number.dtype)), [axis], keepdim=True)
    places = net.linspace(x.shape, 0, [1 if i == axis else 0 for i in range(x.ndim)])
    place = net.reduce("MAX", net.where(net.elementwise("EQUAL", number, value), places, -1), [axis], keepdim)
    return net.cast(value if keepdim else net.squeeze(value, [axis]), x.dtype), place


def keep_nan(net: Network, x: Tensor, result: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """NaN where one of the elements is."""
    if not x.is_float or not dims:
        return result
    has_nan = net.reduce("MAX", net.unary("ISNAN", x), dims, keepdim)
    return net.where(has_nan, float("nan"), result)


# -- searches ----------------------------------------------------------------------------------------------------------


@converter(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(
    net: Network, x: Tensor | float, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    return count_before(
        net, boundaries, x if isinstance(x, Tensor) else net.constant(torch.tensor(x)), right, net.result_dtype()
    )


@converter(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(
    net: Network,
    ordered: Tensor,
    x: Tensor | float,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    if sorter is not None:
        ordered = net.gather_elements(ordered, sorter, ordered.ndim - 1) if 0 not in ordered.shape else ordered
    x = x if isinstance(x, Tensor) else net.constant(torch.tensor(x))
    right = side == "right" if side else right
    if ordered.ndim == 1:
        return count_before(net, ordered, x, right, net.result_dtype())
    return count_before(net, net.unsqueeze(ordered, [ordered.ndim - 1]), x, right, net.result_dtype())


def count_before(net: Network, ordered: Tensor, x: Tensor, right: bool, dtype: torch.dtype) -> Tensor:
    """How many of the ordered numbers are less than each element (with `right`: or equal); for NaN, all."""
    size = ordered.shape[-1]
    refuse_large(net, product(x.shape) * size)
    if size == 0:
        return net.full(net.result_shape(), 0, dtype)
    column = net.unsqueeze(x, [x.ndim])
    beyond = net.elementwise("GREATER", ordered, column)
    if not right:
        beyond = net.elementwise("OR", beyond, net.elementwise("EQUAL", ordered, column))
    return net.reduce("SUM", net.cast(net.logical_not(beyond), dtype), [-1])


@converter(aten.repeat_interleave.Tensor)
def repeat_interleave(net: Network, repeats: Tensor, *, output_size: Dim | None = None) -> Tensor:
    """Each place as often as `repeats` says: a new place belongs to the first running sum beyond it."""
    if output_size is None:
        raise Unsupported("a result whose size depends on data")
    ends = net.running_sum(net.cast(repeats, torch.int64), 0)
    return net.cast(
        count_before(net, ends, net.linspace((output_size,), 0, (1,)), True, torch.int64), net.result_dtype()
    )
