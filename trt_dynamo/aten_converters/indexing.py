"""Ops that read or write elements at indices: `IGatherLayer`, `IScatterLayer`.

torch counts a negative index from the end; TensorRT does so only where it knows the dim. Indices are made whole first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.data_dependent import MASKS, masks_as_places, spread
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.scatter import add_rows
from trt_dynamo.aten_converters.shapes import product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

INDEX_TYPES = (torch.int64, torch.int32)


def whole(net: Network, index: Tensor, size: Dim) -> Tensor:
    """The index with negative places counted from the end."""
    if index.dtype not in INDEX_TYPES:
        raise Unsupported(f"an index of {str(index.dtype).removeprefix('torch.')}")
    if index.value is not None and (index.value.numel() == 0 or int(index.value.min()) >= 0):
        return index
    if index.value is not None and isinstance(size, int):
        return net.constant(torch.where(index.value < 0, index.value + size, index.value))
    return net.where(net.elementwise("LESS", index, 0), net.elementwise("SUM", index, size), index)


# -- reads -------------------------------------------------------------------------------------------------------------


@converter(aten.embedding.default)
def embedding(
    net: Network, weight: Tensor, indices: Tensor, padding_idx: Dim = -1, scale_grad: bool = False, sparse: bool = False
) -> Tensor:
    return net.gather(weight, indices, 0)


@converter(aten.index_select.default)
def index_select(net: Network, x: Tensor, dim: int, index: Tensor) -> Tensor:
    index = net.unsqueeze_to(index, 1)
    if x.ndim == 0:
        return net.reshape(x, ())
    axis = dim % x.ndim
    return net.gather(x, whole(net, index, x.shape[axis]), axis)


@converter(aten.gather.default)
def gather(net: Network, x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """The index may be smaller than `x` in the other dims; TensorRT wants them equal."""
    if index.ndim == 0 or x.ndim == 0:
        wide = net.gather_elements(net.unsqueeze_to(x, 1), net.unsqueeze_to(index, 1), 0)
        return net.reshape(wide, index.shape)
    axis = dim % x.ndim
    if product(index.shape) == 0:
        return net.full(index.shape, 0, x.dtype)
    shape = [have if i == axis else want for i, (have, want) in enumerate(zip(x.shape, index.shape, strict=True))]
    return net.gather_elements(net.slice(x, [0] * x.ndim, shape, [1] * x.ndim), index, axis)


def indexed_first(net: Network, x: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor, list[int], Tensor]:
    """`x` with the indexed dims in front, the order of dims that this took, and the indices as rows of places."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    order = [*axes, *(axis for axis in range(x.ndim) if axis not in axes)]
    given = [whole(net, index, x.shape[axis]) for axis, index in enumerate(indices) if index is not None]
    shape: tuple[Dim, ...] = ()
    for index in given:
        shape = net.broadcast(shape, index.shape)
    columns = [net.unsqueeze(net.expand(net.cast(index, torch.int64), shape), [len(shape)]) for index in given]
    return net.permute(x, order), order, net.cat(columns, len(shape))


@converter(aten.index.Tensor)
def index(net: Network, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    indices = masks_as_places(net, indices)
    axes = [axis for axis, place in enumerate(indices) if place is not None]
    if not axes:
        return x
    if len(axes) == 1:
        (axis,) = axes
        place = indices[axis]
        assert place is not None
        return net.gather(x, whole(net, place, x.shape[axis]), axis)
    front, _, rows = indexed_first(net, x, indices)
    shape = [*rows.shape[:-1], *front.shape[len(axes) :]]
    found = net.gather_nd(front, rows)
    # Indices that stand side by side put their dims in their own place, others in front.
    together = axes == list(range(axes[0], axes[-1] + 1))
    if not together or axes[0] == 0:
        return found
    taken, before = rows.ndim - 1, axes[0]
    return net.permute(found, [*range(taken, taken + before), *range(taken), *range(taken + before, len(shape))])


# -- writes ------------------------------------------------------------------------------------------------------------


@converter(aten.scatter.src, aten.scatter.value)
def scatter(net: Network, x: Tensor, dim: int, index: Tensor, source: Tensor | Dim | float) -> Tensor:
    """torch leaves open which of two writes to one place wins, as TensorRT does."""
    if x.ndim == 0 or index.ndim == 0:
        written = net.unsqueeze_to(source, 1) if isinstance(source, Tensor) else source
        return net.reshape(scatter(net, net.unsqueeze_to(x, 1), 0, net.unsqueeze_to(index, 1), written), x.shape)
    if product(index.shape) == 0:
        return x
    if isinstance(source, Tensor):
        updates = net.slice(net.cast(source, x.dtype), [0] * x.ndim, index.shape, [1] * x.ndim)
    else:
        updates = net.full(index.shape, source, x.dtype)
    return net.scatter(x, index, updates, dim % x.ndim)


@converter(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    net: Network, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    values = net.cast(values, x.dtype)
    given = [place for place in indices if place is not None]
    if len(given) == 1 and given[0].dtype in MASKS:
        return masked_put(net, x, indices, values, accumulate)
    indices = masks_as_places(net, indices)
    front, order, rows = indexed_first(net, x, indices)
    depth, taken, shape = int(rows.shape[-1]), rows.ndim - 1, (*rows.shape[:-1], *front.shape[int(rows.shape[-1]) :])
    if 0 in shape or 0 in x.shape:
        return x
    # `values` lie as the result of reading would; side by side, the indices' dims stand at their own place in it.
    before = order[0] if order[:depth] == list(range(order[0], order[0] + depth)) else 0
    read = [*shape[taken : taken + before], *shape[:taken], *shape[taken + before :]]
    values = net.permute(
        net.expand(values, read), [*range(before, before + taken), *range(before), *range(before + taken, len(read))]
    )
    written = add_rows(net, front, rows, values) if accumulate else net.scatter_nd(front, rows, values)
    return net.permute(written, [order.index(axis) for axis in range(x.ndim)])


def masked_put(net: Network, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool) -> Tensor:
    """A choice between two tensors: the one has a row of the values at each place of the mask."""
    ((axis, mask),) = [(axis, place) for axis, place in enumerate(indices) if place is not None]
    mask = net.cast(mask, torch.bool)
    rest = x.shape[axis + mask.ndim :]
    row = values.ndim - len(rest) - 1  # the dim of the values that counts the true places
    if row >= 0 and mask.ndim == 0:
        raise Unsupported("a mask of rank 0")
    if row >= 0 and values.shape[row] == 1:
        ones = [1] * mask.ndim
        values = net.reshape(values, [*values.shape[:row], *ones, *values.shape[row + 1 :]])
    elif row >= 0:
        if isinstance(values.shape[row], int):
            raise Unsupported("values for the places of a mask: how many depends on data")
        values = spread(net, values, mask, row)
    mask = net.reshape(mask, (*mask.shape, *(1 for _ in rest))) if rest else mask
    new = net.elementwise("SUM", x, values) if accumulate else values
    return net.expand(net.where(mask, new, x), x.shape)


@converter(aten.masked_scatter.default)
def masked_scatter(net: Network, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th true place takes the n-th element of the source: a running count of the mask says which."""
    mask = net.expand(mask, net.result_shape())
    x = net.expand(x, net.result_shape())
    chosen = spread(net, net.reshape(source, (product(source.shape),)), mask, 0)
    return net.where(mask, chosen, x)


@converter(aten.take.default)
def take(net: Network, x: Tensor, index: Tensor) -> Tensor:
    count = product(x.shape)
    return net.gather(net.reshape(x, (count,)), whole(net, index, count), 0)


@converter(aten.put.default)
def put(net: Network, x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    flat = net.reshape(x, (product(x.shape),))
    return net.reshape(index_put(net, flat, [index], net.reshape(source, index.shape), accumulate), x.shape)
