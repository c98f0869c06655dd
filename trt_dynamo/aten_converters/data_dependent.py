"""Ops that find places: `INonZeroLayer`, which TensorRT has and TensorRT-RTX does not, and running counts, which all
have.

How many true elements a mask has is known when the engine runs. Such a result has a size of its own, which the network
reads off the layer that finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo import trt as tensorrt
from trt_dynamo.aten_converters.network import HALVES, Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.scatter import refuse_large
from trt_dynamo.aten_converters.shapes import maximum, product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

MASKS = (torch.bool, torch.uint8)

FULL_TENSORRT_ONLY = (aten.nonzero.default, aten.nonzero_numpy.default, aten.masked_select.default)
NO_ENGINE = "the size of its result depends on data, for which TensorRT-RTX has no engine"


def flat(net: Network, x: Tensor) -> Tensor:
    return net.reshape(x, (product(x.shape),))


def true_places(net: Network, mask: Tensor) -> Tensor:
    """Where the mask is true, in torch's order: (rank, count), int64. A network looks for each mask once.

    Raises:
        Unsupported: TensorRT-RTX, which builds no engine with the layer.
    """
    if not tensorrt.has_data_dependent_sizes():
        raise Unsupported(NO_ENGINE)
    found = net.places.get(mask.raw.name)
    if found is None:
        layer = net.raw.add_non_zero(net.cast(mask, torch.bool).raw)
        found = net.places[mask.raw.name] = net.cast(net.out(layer), torch.int64)
    return found


@converter(aten.nonzero.default)
def nonzero(net: Network, x: Tensor) -> Tensor:
    if x.ndim == 0:
        raise Unsupported("a tensor of rank 0, whose result has no elements but a size")
    return net.permute(true_places(net, x), [1, 0])


@converter(aten.nonzero_numpy.default)
def nonzero_numpy(net: Network, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(places_by_dim(net, net.unsqueeze_to(x, 1)))


@converter(aten.masked_select.default)
def masked_select(net: Network, x: Tensor, mask: Tensor) -> Tensor:
    shape = net.broadcast(x.shape, mask.shape)
    (places,) = places_by_dim(net, flat(net, net.expand(mask, shape)))
    return net.gather(flat(net, net.expand(x, shape)), places, 0)


def places_by_dim(net: Network, mask: Tensor) -> list[Tensor]:
    """Where the mask is true: for each of its dims the places in it, as an index."""
    rows = true_places(net, mask)
    return [net.reshape(net.narrow(rows, 0, axis, 1), rows.shape[1:]) for axis in range(mask.ndim)]


def masks_as_places(net: Network, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The indices, in the place of each mask as many as it has dims."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in MASKS:
            result.append(index)
        elif index.ndim == 0:
            raise Unsupported("a mask of rank 0")
        else:
            result += places_by_dim(net, index)
    return result


def place_among_true(net: Network, mask: Tensor) -> Tensor:
    """For each element of a flat mask, how many true ones come before it; from the last one on, its own number."""
    count = net.running_sum(net.cast(flat(net, mask), torch.int64), 0)
    return net.elementwise("MAX", net.elementwise("SUB", count, 1), 0)


def spread(net: Network, rows: Tensor, mask: Tensor, axis: int) -> Tensor:
    """The n-th row along `axis` at the n-th true place of the mask, whose dims take the place of that dim; elsewhere
    anything.
    """
    if not isinstance(rows.shape[axis], int) or rows.shape[axis] == 0:
        # Where no element is true, each looks at a row all the same.
        one = [1 if i == axis else d for i, d in enumerate(rows.shape)]
        rows = net.cat([rows, net.full(one, 0, rows.dtype)], axis)
    found = net.gather(rows, place_among_true(net, mask), axis)
    return net.reshape(found, [*rows.shape[:axis], *mask.shape, *rows.shape[axis + 1 :]])


@converter(aten.nonzero_static.default)
def nonzero_static(net: Network, x: Tensor, *, size: Dim, fill_value: int = -1) -> Tensor:
    """Each true element writes its place at its number among the true ones; what is false or too much writes to a place
    that is cut off.
    """
    shape = net.result_shape()
    if 0 in shape or 0 in x.shape:
        return net.full(shape, fill_value, torch.int64)
    mask, count = flat(net, net.cast(x, torch.bool)), product(x.shape)
    number = place_among_true(net, mask)
    taken = net.elementwise("AND", mask, net.elementwise("LESS", number, size))
    target = net.where(taken, number, size)
    numbers = net.linspace((count,), 0, (1,))
    places = net.scatter_nd(net.full((size + 1,), -1, torch.int64), net.unsqueeze(target, [1]), numbers)
    places = net.narrow(places, 0, 0, size)
    empty = net.elementwise("LESS", places, 0)
    columns = []
    for axis, dim in enumerate(x.shape):
        row = net.elementwise("FLOOR_DIV", places, maximum(product(x.shape[axis + 1 :]), 1))
        turns = net.elementwise("PROD", net.elementwise("FLOOR_DIV", row, maximum(dim, 1)), dim)
        columns.append(net.unsqueeze(net.where(empty, fill_value, net.elementwise("SUB", row, turns)), [1]))
    return net.cat(columns, 1)


@converter(aten.histc.default)
def histc(net: Network, x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """How many elements lie between two edges: those from the one on, less those from the next on. The last bin has
    both of its edges.
    """
    if not min < max:
        raise Unsupported("the edges of its bins depend on data")
    if x.dtype in HALVES:
        raise Unsupported("bins in a half type, whose edges are rounded in torch's own way")
    edges = torch.linspace(min, max, bins + 1, dtype=torch.float64)[:-1].to(x.dtype)
    refuse_large(net, product(x.shape) * bins)
    column = net.unsqueeze(flat(net, x), [1])
    above = net.elementwise("GREATER", column, float(max))
    reached = net.logical_not(net.elementwise("LESS", column, net.unsqueeze(net.constant(edges), [0])))
    reached = net.elementwise("AND", reached, net.elementwise("EQUAL", column, column))
    counts = [net.reduce("SUM", net.cast(t, torch.float32), [0]) for t in (reached, above)]
    every = net.cat(counts, 0)
    return net.cast(
        net.elementwise("SUB", net.narrow(every, 0, 0, bins), net.narrow(every, 0, 1, bins)), net.result_dtype()
    )
