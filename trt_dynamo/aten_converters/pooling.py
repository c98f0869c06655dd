"""Pooling: `IPoolingLayer` where it means what torch does, else strided slices (dilation, integers, indices)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import extreme
from trt_dynamo.aten_converters.reduction import extreme_of
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import ceildiv, is_static, product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import trt

aten = torch.ops.aten

# A window taken apart costs a slice and a comparison for each of its elements.
LARGEST_SLICED = 64


@dataclasses.dataclass(frozen=True)
class Windows:
    """How windows move over the last dims, one number for each; `shape` is the result's in those dims."""

    size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil: bool
    shape: tuple[Dim, ...]

    @property
    def reach(self) -> list[Dim]:
        """How many elements the windows cover, from the first padding on."""
        every = zip(self.shape, self.stride, self.size, self.dilation, strict=True)
        return [(n - 1) * stride + (size - 1) * dilation + 1 for n, stride, size, dilation in every]


def windows(
    net: Network,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    dims: int,
) -> Windows:
    size, padding, dilation = (list(s) * (dims if len(s) == 1 else 1) for s in (size, padding, dilation))
    stride = list(stride) * (dims if len(stride) == 1 else 1) or size
    return Windows(size, stride, padding, dilation, ceil, net.result_shape()[-dims:])


def listed(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value


def pool(net: Network, x: Tensor, kind: str, w: Windows, *, exclude_padding: bool = True) -> Tensor:
    """The layer over the last dims. torch drops a window that begins beyond the input; TensorRT does not."""
    dims = len(w.size)
    outer, inner = x.shape[:-dims], x.shape[-dims:]
    batched = x if x.ndim == dims + 2 else net.unsqueeze(x, [0])
    layer = net.raw.add_pooling_nd(batched.raw, getattr(trt.PoolingType, kind), w.size)
    if layer is None:
        raise Unsupported("TensorRT refused the pooling")
    layer.stride_nd, layer.padding_nd, layer.average_count_excludes_padding = w.stride, w.padding, exclude_padding
    made = w.shape
    if w.ceil and is_static(inner):
        layer.post_padding = [max(int(r) - int(d) - p, 0) for r, d, p in zip(w.reach, inner, w.padding, strict=True)]
    elif w.ceil:
        layer.padding_mode = trt.PaddingMode.EXPLICIT_ROUND_UP
        every = zip(inner, w.padding, w.size, w.stride, strict=True)
        made = tuple(ceildiv(d + 2 * p - k, s) + 1 for d, p, k, s in every)
    fits = all(net.seen(have) == net.seen(want) for have, want in zip(made, w.shape, strict=True))
    result = net.out(layer, shape=(*batched.shape[:2], *(w.shape if fits else made)), dtype=x.dtype)
    if not fits:
        result = net.slice(result, [0] * result.ndim, (*batched.shape[:2], *w.shape), [1] * result.ndim)
    return result if len(outer) == 2 else net.squeeze(result, [0])


# -- maximum -----------------------------------------------------------------------------------------------------------


def register_max(target: torch._ops.OpOverload, dims: int) -> None:
    @converter(target)
    def max_pool(
        net: Network,
        x: Tensor,
        size: Sequence[int],
        stride: Sequence[int] = (),
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        w = windows(net, size, stride, listed(padding), listed(dilation), ceil, dims)
        if 0 in net.result_shape():
            return net.full(net.result_shape(), 0, x.dtype), net.full(net.result_shape(), 0, torch.int64)
        if x.is_float and set(w.dilation) == {1} and not net.used[1]:
            return pool(net, x, "MAX", w), None
        return sliced_max(net, x, w)


register_max(aten.max_pool2d_with_indices.default, 2)
register_max(aten.max_pool3d_with_indices.default, 3)


def lowest(dtype: torch.dtype) -> float | int:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def sliced_max(net: Network, x: Tensor, w: Windows) -> tuple[Tensor, Tensor | None]:
    """The maximum over the windows' elements, a slice for each; of indices, the first largest or the last NaN's."""
    if math.prod(w.size) > LARGEST_SLICED:
        raise Unsupported(f"a window of {math.prod(w.size)} elements with dilation, integers or indices")
    dims, wants_index = len(w.size), net.used[1]
    fill = net.scalar(lowest(x.dtype), x.dtype)
    padded = pad(net, x, w.padding, w.reach, fill)
    best, places, inner = None, None, x.shape[-dims:]
    for offset in itertools.product(*(range(size) for size in w.size)):
        value = strided(net, padded, w, offset)
        place = positions(net, inner, w, offset) if wants_index else None
        if best is None or not wants_index:
            best, places = value if best is None else extreme(net, best, value, "GREATER"), place
            continue
        better = net.elementwise("GREATER", value, best)
        if x.is_float:
            better = net.elementwise("OR", better, net.unary("ISNAN", value))
        best, places = net.where(better, value, best), net.where(better, place, places)
    assert best is not None
    return best, None if places is None else net.expand(places, net.result_shape(1))


def pad(net: Network, x: Tensor, before: Sequence[int], size: Sequence[Dim], fill: Tensor | None = None) -> Tensor:
    """The last dims of `x` with so many elements before, brought to `size`."""
    outer = x.ndim - len(size)
    return net.slice(x, [*[0] * outer, *(-b for b in before)], [*x.shape[:outer], *size], [1] * x.ndim, "FILL", fill)


def strided(net: Network, padded: Tensor, w: Windows, offset: Sequence[int]) -> Tensor:
    """Of each window the element at `offset`."""
    outer = padded.ndim - len(offset)
    start = [o * d for o, d in zip(offset, w.dilation, strict=True)]
    return net.slice(padded, [*[0] * outer, *start], [*padded.shape[:outer], *w.shape], [*[1] * outer, *w.stride])


def positions(net: Network, inner: Sequence[Dim], w: Windows, offset: Sequence[int]) -> Tensor:
    """Where in the flat input each window's element at `offset` lies."""
    pitch = [product(inner[axis + 1 :]) for axis in range(len(inner))]
    start: Dim = 0
    for o, d, p, step in zip(offset, w.dilation, w.padding, pitch, strict=True):
        start = start + (o * d - p) * step
    return net.linspace(w.shape, start, [s * step for s, step in zip(w.stride, pitch, strict=True)])


# -- average -----------------------------------------------------------------------------------------------------------


def register_average(target: torch._ops.OpOverload, dims: int) -> None:
    @converter(target)
    def avg_pool(
        net: Network,
        x: Tensor,
        size: Sequence[int],
        stride: Sequence[int] = (),
        padding: int | Sequence[int] = 0,
        ceil: bool = False,
        include_pad: bool = True,
        divisor: int | None = None,
    ) -> Tensor:
        if not x.is_float:
            raise Unsupported("averages of integers: TensorRT pools floats only")
        w = windows(net, size, stride, listed(padding), [1], ceil, dims)
        if 0 in net.result_shape():
            return net.full(net.result_shape(), 0, x.dtype)
        if divisor is not None:
            x = pad(net, x, w.padding, w.reach)
            mean = pool(net, x, "AVERAGE", dataclasses.replace(w, padding=[0] * dims, ceil=False))
            return net.elementwise("PROD", mean, math.prod(w.size) / divisor)
        if include_pad and ceil and any(w.padding):
            # torch counts the padding, but not what a last window reaches beyond it.
            every = zip(x.shape[-dims:], w.padding, strict=True)
            x = pad(net, x, w.padding, [d + 2 * p for d, p in every])
            w = dataclasses.replace(w, padding=[0] * dims)
        return pool(net, x, "AVERAGE", w, exclude_padding=not include_pad or ceil)


register_average(aten.avg_pool2d.default, 2)
register_average(aten.avg_pool3d.default, 3)


# -- adaptive ----------------------------------------------------------------------------------------------------------


def register_adaptive(average: torch._ops.OpOverload, maximum: torch._ops.OpOverload, dims: int) -> None:
    @converter(average)
    def adaptive_avg_pool(net: Network, x: Tensor, size: Sequence[int]) -> Tensor:
        """Along each dim a product with a matrix of weights, where the windows differ in size."""
        shape = net.result_shape()
        if 0 in shape:
            return net.full(shape, 0, x.dtype)
        w = even_windows(x, shape[-dims:])
        if shape[-dims:] == (1,) * dims:
            return net.reduce("AVG", x, range(-dims, 0), keepdim=True)
        if w is not None:
            return pool(net, x, "AVERAGE", w)
        wide = net.cast(x, torch.float32)
        for axis in range(x.ndim - dims, x.ndim):
            if x.shape[axis] != shape[axis]:
                wide = product_along(net, wide, axis, averaging(net, x.shape[axis], shape[axis]))
        return net.cast(wide, x.dtype)

    @converter(maximum)
    def adaptive_max_pool(net: Network, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Along each dim the elements of each window side by side, their number made equal by a repeated last one."""
        shape = net.result_shape()
        if 0 in shape:
            return net.full(shape, 0, x.dtype), net.full(shape, 0, torch.int64)
        if net.used[1]:
            return adaptive_max_with_indices(net, x, shape, dims)
        if shape[-dims:] == (1,) * dims:
            return extreme_of(net, "MAX", x, [x.ndim - 1 - i for i in range(dims)], keepdim=True), None
        w = even_windows(x, shape[-dims:])
        if w is not None:
            return pool(net, x, "MAX", w), None
        for axis in range(x.ndim - dims, x.ndim):
            if x.shape[axis] != shape[axis]:
                found = net.gather(x, window_elements(net, x.shape[axis], shape[axis]), axis)
                x = extreme_of(net, "MAX", found, [axis + 1], keepdim=False)
        return x, None


def adaptive_max_with_indices(net: Network, x: Tensor, shape: tuple[Dim, ...], dims: int) -> tuple[Tensor, Tensor]:
    """Each of the input's dims becomes two, which window and which element of it; the first largest wins."""
    outer, inner = x.ndim - dims, x.shape[-dims:]
    values, places = x, net.scalar(0, torch.int64, 2 * dims)
    for i in range(dims):
        index = window_elements(net, inner[i], shape[outer + i])
        values = net.gather(values, index, outer + 2 * i)
        pitch = net.elementwise("PROD", index, product(inner[i + 1 :]))
        spread = net.reshape(pitch, [d for j in range(dims) for d in (index.shape if i == j else (1, 1))])
        places = net.elementwise("SUM", places, spread)
    return first_largest(net, values, places, [outer + 2 * i + 1 for i in range(dims)])


def first_largest(net: Network, values: Tensor, places: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maximum over some axes, and its place: the first largest's or, as in eager, the last NaN's."""
    largest = extreme_of(net, "MAX", values, axes, keepdim=True)
    equal = net.elementwise("EQUAL", values, largest)
    first = net.reduce("MIN", net.where(equal, places, torch.iinfo(torch.int64).max), axes)
    if values.is_float:
        last = net.reduce("MAX", net.where(net.unary("ISNAN", values), places, -1), axes)
        first = net.where(net.elementwise("LESS", last, 0), first, last)
    return net.squeeze(largest, axes), first


def even_windows(x: Tensor, shape: tuple[Dim, ...]) -> Windows | None:
    """The windows of an adaptive pooling where all are equal, else None."""
    inner = x.shape[-len(shape) :]
    if not all(isinstance(d, int) and isinstance(n, int) and d % n == 0 for d, n in zip(inner, shape, strict=True)):
        return None
    size = [int(d) // int(n) for d, n in zip(inner, shape, strict=True)]
    return Windows(size, size, [0] * len(size), [1] * len(size), False, shape)


def product_along(net: Network, x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """`x` times a matrix whose columns sum up to 1, along one dim."""
    if x.shape[axis] == 1:
        return net.expand(x, [matrix.shape[1] if i == axis else d for i, d in enumerate(x.shape)])
    last = net.permute(x, swapped(x.ndim, axis))
    return net.permute(net.matmul(last, matrix), swapped(x.ndim, axis))


def swapped(rank: int, axis: int) -> list[int]:
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    return order


def averaging(net: Network, size: Dim, count: Dim) -> Tensor:
    """A [size, count] matrix; column `i` averages the elements of window `i`."""
    place = net.linspace((size, 1), 0, (1, 0))
    start, stop = (net.unsqueeze(ends, [0]) for ends in window_ends(net, size, count))
    outside = net.elementwise(
        "OR", net.elementwise("LESS", place, start), net.logical_not(net.elementwise("LESS", place, stop))
    )
    length = net.cast(net.elementwise("SUB", stop, start), torch.float32)
    return net.where(outside, 0.0, net.unary("RECIP", length))


def window_ends(net: Network, size: Dim, count: Dim) -> tuple[Tensor, Tensor]:
    """Where each adaptive window begins, `i * size // count`, and ends, before `ceil((i + 1) * size / count)`."""
    if isinstance(size, int) and isinstance(count, int):
        index = torch.arange(count)
        return net.constant(index * size // count), net.constant(-(-(index + 1) * size // count))
    start = net.elementwise("FLOOR_DIV", net.linspace((count,), 0, (size,)), count)
    return start, net.elementwise("FLOOR_DIV", net.linspace((count,), size + count - 1, (size,)), count)


def window_elements(net: Network, size: Dim, count: Dim) -> Tensor:
    """[count, longest]: the elements of each adaptive window, the last one repeated in the shorter windows."""
    start, stop = (net.unsqueeze(ends, [1]) for ends in window_ends(net, size, count))
    within = net.linspace((1, ceildiv(size, count) + 1), 0, (0, 1))
    return net.elementwise("MIN", net.elementwise("SUM", start, within), net.elementwise("SUB", stop, 1))


register_adaptive(aten._adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default, 2)
register_adaptive(aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool3d.default, 3)
