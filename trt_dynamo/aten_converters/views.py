"""Ops that move or repeat elements without computing: shuffles, slices, concatenations."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.code_grids import dequantize_layer
from trt_dynamo.aten_converters.layout import dense_order, memory_order
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import ceildiv, is_static, maximum, minimum, modulo, product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim, dim_of

aten = torch.ops.aten


# -- shuffles ----------------------------------------------------------------------------------------------------------


@converter(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten.view_copy.default,
)
def view(net: Network, x: Tensor, size: Sequence[Dim], stride: object = None) -> Tensor:
    return net.reshape(x, net.result_shape())


@converter(aten.permute.default, aten.permute_copy.default)
def permute(net: Network, x: Tensor, dims: Sequence[int]) -> Tensor:
    return net.permute(x, dims)


@converter(aten.transpose.int)
def transpose(net: Network, x: Tensor, a: int, b: int) -> Tensor:
    order = list(range(x.ndim))
    if x.ndim:
        order[a], order[b] = order[b], order[a]
    return net.permute(x, order)


@converter(aten.t.default)
def t(net: Network, x: Tensor) -> Tensor:
    return net.permute(x, range(x.ndim)[::-1])


@converter(aten.expand.default)
def expand(net: Network, x: Tensor, size: Sequence[Dim], *, implicit: bool = False) -> Tensor:
    return net.expand(x, net.result_shape())


@converter(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(net: Network, x: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
    wanted = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return net.squeeze(x, [d % x.ndim for d in wanted if x.ndim and net.was_one(x.shape[d])])


@converter(aten.unsqueeze.default)
def unsqueeze(net: Network, x: Tensor, dim: int) -> Tensor:
    return net.unsqueeze(x, [dim % (x.ndim + 1)])


@converter(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default
)
def clone(net: Network, x: Tensor) -> Tensor:
    return x


@converter(aten.native_dropout.default)
def dropout(net: Network, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Nothing is dropped outside of training; what is random stays in eager, where each call differs."""
    if train is None or (train and p > 0):
        raise Unsupported("random numbers: an engine would give the same in each call")
    return x, net.full(x.shape, True, torch.bool)


@converter(aten._to_copy.default)
def to_copy(net: Network, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or x.dtype
    if torch.float8_e4m3fn in (x.dtype, dtype) and x.dtype is not dtype:
        if not dtype.is_floating_point or dtype is torch.float8_e4m3fn:
            raise Unsupported("a cast to float8, where TensorRT would saturate and torch makes NaN")
        return net.cast(
            dequantize_layer(net, x.raw, torch.tensor(1.0), None, Tensor(x.raw, torch.float32, x.shape)), dtype
        )
    return net.cast(x, dtype)


@converter(aten.copy.default)
def copy(net: Network, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return net.expand(net.cast(source, x.dtype), x.shape)


# -- slices ------------------------------------------------------------------------------------------------------------


def start_of(net: Network, start: Dim | None, size: Dim) -> Dim:
    """Where a slice of a dim begins: torch counts a negative start from the end, and brings one outside back in."""
    if start is None or start == 0:
        return 0
    negative = net.less(start, 0)
    if negative is None:
        start = start + size * minimum(maximum(-start, 0), 1)
        return maximum(minimum(start, size), 0)
    if negative:
        start = size + start
        return start if net.less(0, start) else maximum(start, 0)
    return start if net.less(start, size) else minimum(start, size)


def length_of(net: Network, start: Dim, end: Dim | None, size: Dim, step: int) -> Dim:
    """How many elements a slice of a dim has, where FX knows no more of it than that it depends on data."""
    stop = size if end is None or end == sys.maxsize else start_of(net, end, size)
    return maximum(ceildiv(stop - start, step), 0)


@converter(aten.slice.Tensor)
def slice_(
    net: Network, x: Tensor, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1
) -> Tensor:
    axis = dim % x.ndim
    size, length = x.shape[axis], net.result_shape()[axis]
    first = start_of(net, start, size)
    if not net.sizes.known(length):
        length = length_of(net, first, end, size, step)
    return net.narrow(x, axis, first, length, step)


def place_of(net: Network, index: Dim, size: Dim) -> Dim:
    """An index, counted from the start."""
    negative = net.less(index, 0)
    if negative is None or (not negative and net.less(index, size) is None):
        raise Unsupported(f"the index {index} depends on data, and may be out of range")
    return index + size if negative else index


@converter(aten.select.int)
def select(net: Network, x: Tensor, dim: int, index: Dim) -> Tensor:
    axis = dim % x.ndim
    place = place_of(net, index, x.shape[axis])
    if is_static(x.shape) and isinstance(place, int):
        return net.squeeze(net.narrow(x, axis, place, 1), [axis])
    # A gather at one place drops the dim by itself: no shape arithmetic.
    return net.gather(x, net.size_tensor(place), axis)


@converter(aten.narrow_copy.default)
def narrow_copy(net: Network, x: Tensor, dim: int, start: Dim, length: Dim) -> Tensor:
    axis = dim % x.ndim
    return net.narrow(x, axis, start_of(net, start, x.shape[axis]), length)


def pieces(net: Network, x: Tensor, sizes: Sequence[Dim], axis: int) -> tuple[Tensor | None, ...]:
    """`x` cut along the axis; None for what nobody reads."""
    starts = [sum(sizes[:i], start=0) for i in range(len(sizes))]
    used = net.used if len(net.used) == len(sizes) else (True,) * len(sizes)
    return tuple(net.narrow(x, axis, s, n) if u else None for s, n, u in zip(starts, sizes, used, strict=True))


@converter(
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.split_with_sizes_copy.default,
)
def split(net: Network, x: Tensor, sizes: Dim | Sequence[Dim], dim: int = 0) -> tuple[Tensor | None, ...]:
    axis = dim % x.ndim
    return pieces(net, x, [net.result_shape(i)[axis] for i in range(len(net.expected))], axis)


@converter(aten.unbind.int, aten.unbind_copy.int)
def unbind(net: Network, x: Tensor, dim: int = 0) -> tuple[Tensor | None, ...]:
    return tuple(select(net, x, dim, i) if used else None for i, used in enumerate(net.used))


@converter(aten.flip.default)
def flip(net: Network, x: Tensor, dims: Sequence[int]) -> Tensor:
    axes = {d % x.ndim for d in dims if x.ndim}
    start = [d - 1 if i in axes and d != 0 else 0 for i, d in enumerate(x.shape)]
    return net.slice(x, start, x.shape, [-1 if i in axes else 1 for i in range(x.ndim)])


@converter(aten.roll.default)
def roll(net: Network, x: Tensor, shifts: Sequence[Dim], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        flat = net.reshape(x, (product(x.shape),))
        return net.reshape(roll(net, flat, shifts, (0,)), x.shape)
    start: list[Dim] = [0] * x.ndim
    for shift, dim in zip(shifts, dims, strict=True):
        start[dim] = start[dim] - shift
    start = [modulo(s, d) if s != 0 and d != 0 else 0 for s, d in zip(start, x.shape, strict=True)]
    return net.slice(x, start, x.shape, [1] * x.ndim, "WRAP")


@converter(aten.repeat.default)
def repeat(net: Network, x: Tensor, repeats: Sequence[Dim]) -> Tensor:
    shape = net.result_shape()
    x = net.unsqueeze_to(x, len(shape))
    if 0 in shape:
        return net.full(shape, 0, x.dtype)
    # What is repeated along dims of 1 is only stretched; a slice that wraps around does the others.
    grown = [r if d == 1 else d for d, r in zip(x.shape, repeats, strict=True)]
    return net.slice(net.expand(x, grown), [0] * len(shape), shape, [1] * len(shape), "WRAP")


@converter(aten.diagonal.default)
def diagonal(net: Network, x: Tensor, offset: Dim = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """The rows lie one after the other; their diagonal is every (columns + 1)-th element."""
    first, second = dim1 % x.ndim, dim2 % x.ndim
    rest = [axis for axis in range(x.ndim) if axis not in (first, second)]
    *outer, rows, columns = (x.shape[axis] for axis in (*rest, first, second))
    *_, length = net.result_shape()
    if length == 0:
        return net.full(net.result_shape(), 0, x.dtype)
    flat = net.reshape(net.permute(x, [*rest, first, second]), (*outer, rows * columns))
    start = offset if net.seen(offset) >= 0 else -offset * columns
    return net.narrow(flat, len(outer), start, length, columns + 1)


@converter(aten.unfold.default)
def unfold(net: Network, x: Tensor, dim: int, size: int, step: int) -> Tensor:
    if x.ndim == 0:
        return net.full((size,), 0, x.dtype) if size == 0 else net.reshape(x, (1,))
    axis = dim % x.ndim
    count = net.result_shape()[axis]
    windows = net.gather(x, net.linspace((count, size), 0, (step, 1)), axis)
    return net.permute(windows, [*(i for i in range(windows.ndim) if i != axis + 1), axis + 1])


@converter(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(
    net: Network, x: Tensor, size: Sequence[Dim], stride: Sequence[Dim], offset: Dim | None = None
) -> Tensor:
    """Any strides over the memory of a dense tensor: a permuted reshape where they say so, else a look-up."""
    memory = net.reshape(net.permute(x, dims_in_memory(net, x)), (product(x.shape),))
    shape = net.result_shape()
    whole = not offset and product(shape) == product(x.shape)
    order = dense_order([net.seen(d) for d in shape], [net.seen(d) for d in stride]) if whole else None
    if order is not None:
        packed = net.reshape(memory, [shape[axis] for axis in order])
        return net.permute(packed, [order.index(axis) for axis in range(len(order))])
    return net.gather(memory, net.linspace(shape, offset or 0, stride), 0)


def dims_in_memory(net: Network, x: Tensor) -> tuple[int, ...]:
    """The order in which torch holds the dims of the first argument, which must own its whole memory."""
    assert net.node is not None
    value = net.node.args[0].meta["val"]  # type: ignore[union-attr]
    order = memory_order(value)
    held, needed = dim_of(value.untyped_storage().nbytes()), product(x.shape) * value.element_size()
    if order is None or value.storage_offset() != 0 or net.seen(held) != net.seen(needed):
        raise Unsupported("strides over a tensor that is itself a part of another")
    return order


@converter(aten.as_strided_scatter.default)
def as_strided_scatter(
    net: Network, x: Tensor, source: Tensor, size: Sequence[Dim], stride: Sequence[Dim], offset: Dim | None = None
) -> Tensor:
    if 0 in source.shape:
        return x
    order = dims_in_memory(net, x)
    held = net.permute(x, order)
    count = product(source.shape)
    places = net.reshape(net.linspace(source.shape, offset or 0, stride), (count,))
    memory = net.reshape(held, (product(x.shape),))
    written = net.scatter(memory, places, net.reshape(net.cast(source, x.dtype), (count,)), 0)
    return net.permute(net.reshape(written, held.shape), [order.index(axis) for axis in range(x.ndim)])


# -- concatenations ----------------------------------------------------------------------------------------------------


@converter(aten.cat.default)
def cat(net: Network, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch lets a 1-D tensor without elements stand among tensors of any rank, and promotes the others."""
    shape, dtype = net.result_shape(), net.result_dtype()
    axis = dim % max(len(shape), 1)
    parts = [net.cast(x, dtype) for x in tensors if x.shape != (0,) and x.shape[axis : axis + 1] != (0,)]
    if not parts:
        return net.full(shape, 0, dtype)
    return net.cat(parts, axis)


@converter(aten.stack.default)
def stack(net: Network, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    axis = dim % (tensors[0].ndim + 1)
    return net.cat([net.unsqueeze(net.cast(x, net.result_dtype()), [axis]) for x in tensors], axis)


@converter(aten.slice_scatter.default)
def slice_scatter(
    net: Network,
    x: Tensor,
    source: Tensor,
    dim: int = 0,
    start: Dim | None = None,
    end: Dim | None = None,
    step: int = 1,
) -> Tensor:
    axis, source = dim % x.ndim, net.cast(source, x.dtype)
    first, count = start_of(net, start, x.shape[axis]), source.shape[axis]
    if count == 0 or count == x.shape[axis]:
        return x if count == 0 else source
    if step == 1:
        return replace(net, x, source, axis, first)
    steps = [step if i == axis else 0 for i in range(x.ndim)]
    return net.scatter(x, net.linspace(source.shape, first, steps), source, axis)


@converter(aten.select_scatter.default)
def select_scatter(net: Network, x: Tensor, source: Tensor, dim: int, index: Dim) -> Tensor:
    axis = dim % x.ndim
    place = place_of(net, index, x.shape[axis])
    return replace(net, x, net.unsqueeze(net.cast(source, x.dtype), [axis]), axis, place)


def replace(net: Network, x: Tensor, source: Tensor, axis: int, start: Dim) -> Tensor:
    """`x`, its elements from `start` on replaced by those of `source` along one dim."""
    end = start + source.shape[axis]
    rest = x.shape[axis] - end
    before = [net.narrow(x, axis, 0, start)] if start != 0 else []
    after = [net.narrow(x, axis, end, rest)] if rest != 0 else []
    return net.cat([*before, source, *after], axis)


@converter(aten.diagonal_scatter.default)
def diagonal_scatter(net: Network, x: Tensor, source: Tensor, offset: Dim = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    first, second = dim1 % x.ndim, dim2 % x.ndim
    order = [*(axis for axis in range(x.ndim) if axis not in (first, second)), first, second]
    *outer, rows, columns = (x.shape[axis] for axis in order)
    if source.shape[-1] == 0:
        return x
    start = offset if net.seen(offset) >= 0 else -offset * columns
    flat = net.reshape(net.permute(x, order), (*outer, rows * columns))
    places = net.linspace(source.shape, start, [*(0 for _ in outer), columns + 1])
    written = net.scatter(flat, places, net.cast(source, x.dtype), len(outer))
    return net.permute(net.reshape(written, (*outer, rows, columns)), [order.index(axis) for axis in range(x.ndim)])
