"""Writes that combine what falls on one place.

TensorRT's scatter has no sum: a table says which write goes where, and a reduction over it combines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import extreme
from trt_dynamo.aten_converters.reduction import extreme_of
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

# So many entries of the table at most: one for each write and each place.
LARGEST_TABLE = 2**26

# Reduction: TensorRT's, its elementwise counterpart, and what changes nothing.
REDUCE = {
    "sum": ("SUM", "SUM", 0.0),
    "add": ("SUM", "SUM", 0.0),
    "mean": ("SUM", "SUM", 0.0),
    "prod": ("PROD", "PROD", 1.0),
    "multiply": ("PROD", "PROD", 1.0),
    "amax": ("MAX", "MAX", -math.inf),
    "amin": ("MIN", "MIN", math.inf),
}

# What the reductions mean for bool.
LOGICAL = {"sum": "amax", "add": "amax", "amax": "amax", "prod": "amin", "multiply": "amin", "amin": "amin"}


def refuse_large(net: Network, entries: Dim) -> None:
    """Raises `Unsupported` for a table that took too much memory at the sizes seen."""
    if net.guessed(entries) > LARGEST_TABLE:
        raise Unsupported(
            f"a table of {net.guessed(entries)} entries, one for each write and each place, would be too large"
        )


def neutral(how: str, dtype: torch.dtype) -> float | int:
    value = REDUCE[how][2]
    if dtype.is_floating_point or math.isfinite(value):
        return value if dtype.is_floating_point else int(value)
    limits = torch.iinfo(dtype)
    return limits.min if value < 0 else limits.max


@converter(aten.scatter_add.default)
def scatter_add(net: Network, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return scatter_reduce(net, x, dim, index, source, "sum")


@converter(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with(net: Network, x: Tensor, dim: int, index: Tensor, source: Tensor | float, *, reduce: str) -> Tensor:
    if not isinstance(source, Tensor):
        source = net.full(index.shape, source, x.dtype)
    return scatter_reduce(net, x, dim, index, source, reduce)


@converter(aten.scatter_reduce.two)
def scatter_reduce(
    net: Network, x: Tensor, dim: int, index: Tensor, source: Tensor, how: str, *, include_self: bool = True
) -> Tensor:
    if x.ndim == 0 or index.ndim == 0:
        flat = [net.unsqueeze_to(t, 1) for t in (x, index, source)]
        return net.reshape(scatter_reduce(net, flat[0], 0, flat[1], flat[2], how, include_self=include_self), x.shape)
    if x.dtype is torch.bool:
        numbers = (net.cast(x, torch.int32), dim, index, net.cast(source, torch.int32), LOGICAL[how])
        return net.cast(scatter_reduce(net, *numbers, include_self=include_self), torch.bool)
    if product(index.shape) == 0 or product(x.shape) == 0:
        return x
    axis = dim % x.ndim
    index, source = cover(net, x, index, source, axis)
    writes = index.shape[axis]
    refuse_large(net, product(x.shape) * writes)
    # The table has the places at `axis` and the writes behind it.
    places = net.linspace(
        [x.shape[axis] if i == axis else 1 for i in range(x.ndim + 1)], 0, [int(i == axis) for i in range(x.ndim + 1)]
    )
    hits = net.elementwise("EQUAL", net.unsqueeze(index, [axis]), places)
    return combine(net, x, hits, net.unsqueeze(source, [axis]), axis + 1, how, include_self)


@converter(aten.index_reduce.default)
def index_reduce(
    net: Network, x: Tensor, dim: int, index: Tensor, source: Tensor, how: str, *, include_self: bool = True
) -> Tensor:
    """`scatter_reduce` with one index for a whole slice."""
    if x.ndim == 0:
        return scatter_reduce(
            net, x, 0, net.reshape(index, ()), net.reshape(source, ()), how, include_self=include_self
        )
    axis = dim % x.ndim
    row = net.reshape(index, [index.shape[0] if i == axis else 1 for i in range(x.ndim)])
    return scatter_reduce(net, x, axis, net.expand(row, source.shape), source, how, include_self=include_self)


def cover(net: Network, x: Tensor, index: Tensor, source: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Index and source brought to the size of `x` in the other dims; what is added writes nowhere."""
    source = net.slice(source, [0] * x.ndim, index.shape, [1] * x.ndim)
    shape = [n if i == axis else d for i, (d, n) in enumerate(zip(x.shape, index.shape, strict=True))]
    start, stride = [0] * x.ndim, [1] * x.ndim
    if tuple(shape) == index.shape:
        return index, source
    return net.slice(index, start, shape, stride, "FILL", net.scalar(-1, index.dtype)), net.slice(
        source, start, shape, stride, "FILL"
    )


def combine(net: Network, x: Tensor, hits: Tensor, source: Tensor, axis: int, how: str, include_self: bool) -> Tensor:
    """`x` combined with what the table's hits bring to each place; `axis` is where the writes lie in it."""
    reduction, elementwise, _ = REDUCE[how]
    work = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    nothing = neutral(how, x.dtype)
    table = net.where(hits, net.cast(source, work), net.scalar(nothing, work))
    largest_or_least = reduction in ("MAX", "MIN")
    brought = extreme_of(net, reduction, table, [axis]) if largest_or_least else net.reduce(reduction, table, [axis])
    own = net.cast(x, work)
    count = net.reduce("SUM", net.cast(hits, torch.int64), [axis])
    touched = net.elementwise("GREATER", count, 0)
    kept = own if include_self else net.where(touched, net.scalar(nothing, work), own)
    if largest_or_least:
        result = extreme(net, kept, brought, "GREATER" if reduction == "MAX" else "LESS")
    else:
        result = net.elementwise(elementwise, kept, brought)
    if how == "mean":
        among = net.elementwise("MAX", net.elementwise("SUM", count, int(include_self)), 1)
        result = net.elementwise("DIV" if x.is_float else "FLOOR_DIV", result, net.cast(among, work))
    return net.cast(result, x.dtype)


def add_rows(net: Network, x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`x` with `values` added at rows of places, which go into its first dims."""
    depth = int(rows.shape[-1])
    writes, places, rest = product(rows.shape[:-1]), product(x.shape[:depth]), product(x.shape[depth:])
    table = writes * places * (1 if x.is_float else rest)
    refuse_large(net, table)
    flat = net.reshape(linear(net, rows, x.shape[:depth]), (1, writes))
    hits = net.elementwise("EQUAL", flat, net.linspace((places, 1), 0, (1, 0)))
    source, target = net.reshape(values, (writes, rest)), net.reshape(x, (places, rest))
    if x.is_float:
        brought = chosen_sum(net, net.cast(hits, torch.float32), net.cast(source, torch.float32))
        added = net.cast(net.elementwise("SUM", net.cast(target, torch.float32), brought), x.dtype)
    else:
        added = combine(net, target, net.unsqueeze(hits, [2]), net.unsqueeze(source, [0]), 1, "sum", True)
    return net.reshape(added, x.shape)


def chosen_sum(net: Network, members: Tensor, rows: Tensor) -> Tensor:
    """`members @ rows` for members of 0 and 1, where 0 times an infinity or NaN is 0: these are counted apart."""
    unknown = net.unary("ISNAN", rows)
    above, below = (net.elementwise(op, rows, 0.0) for op in ("GREATER", "LESS"))
    infinite = net.unary("ISINF", rows)
    finite = net.where(net.elementwise("OR", unknown, infinite), 0.0, rows)
    # NaN is a sum of both infinities.
    marks = [
        net.cast(net.elementwise("OR", unknown, net.elementwise("AND", infinite, side)), torch.float32)
        for side in (above, below)
    ]
    width = rows.shape[1]
    found = net.matmul(members, net.cat([finite, *marks], 1))
    total, plus, minus = (net.narrow(found, 1, i * width, width) for i in range(3))
    total = net.where(net.elementwise("GREATER", plus, 0.0), net.elementwise("SUM", total, math.inf), total)
    return net.where(net.elementwise("GREATER", minus, 0.0), net.elementwise("SUM", total, -math.inf), total)


def linear(net: Network, rows: Tensor, sizes: Sequence[Dim]) -> Tensor:
    """Rows of places as places in the flattened dims."""
    pitch = [product(sizes[i + 1 :]) for i in range(len(sizes))]
    return net.reduce("SUM", net.elementwise("PROD", rows, net.numbers(pitch)), [-1])


BAG_MODES = ("sum", "mean", "amax")


@converter(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(
    net: Network,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad: bool = False,
    mode: int = 0,
    sparse: bool = False,
    sample_weights: Tensor | None = None,
    include_last: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor | None, ...]:
    """A table of bags and indices says which rows of the weight each bag combines."""
    if any(net.used[1:]):
        raise Unsupported("what an embedding bag keeps for its gradient")
    shape, count = net.result_shape(), indices.shape[0]
    if 0 in shape or count == 0:
        return net.full(shape, 0, weight.dtype), None, None, None
    inside = bag_members(net, net.cast(offsets, torch.int64), shape[0], count, include_last)
    if padding_idx >= 0:
        inside = net.elementwise("AND", inside, net.logical_not(net.elementwise("EQUAL", indices, padding_idx)))
    rows = net.gather(weight, indices, 0)
    if sample_weights is not None:
        rows = net.elementwise("PROD", rows, net.unsqueeze(sample_weights, [1]))
    if BAG_MODES[mode] == "amax":
        refuse_large(net, product(shape) * count)
        nothing = net.full(shape, 0, weight.dtype)
        result = combine(net, nothing, net.unsqueeze(inside, [2]), net.unsqueeze(rows, [0]), 1, "amax", False)
        return result, None, None, None
    refuse_large(net, shape[0] * count)
    members = net.cast(inside, torch.float32)
    result = chosen_sum(net, members, net.cast(rows, torch.float32))
    if BAG_MODES[mode] == "mean":
        result = net.elementwise(
            "DIV", result, net.elementwise("MAX", net.reduce("SUM", members, [1], keepdim=True), 1.0)
        )
    return net.cast(result, weight.dtype), None, None, None


def bag_members(net: Network, offsets: Tensor, bags: Dim, count: Dim, include_last: bool) -> Tensor:
    """[bags, count]: whether an index lies in a bag, which goes from its own offset to the next."""
    ends = offsets if include_last else net.cat([offsets, net.reshape(net.size_tensor(count), (1,))], 0)
    start, end = (net.unsqueeze(net.narrow(ends, 0, i, bags), [1]) for i in (0, 1))
    place = net.linspace((1, count), 0, (0, 1))
    before = net.elementwise("LESS", place, start)
    return net.elementwise("AND", net.logical_not(before), net.elementwise("LESS", place, end))
