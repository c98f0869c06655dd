"""Layers that move elements without looking at them, and FILL, which makes them.

SHUFFLE, SLICE, CONCATENATION, SQUEEZE, UNSQUEEZE, SHAPE, REVERSE_SEQUENCE, FILL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError
from trt_dynamo.reference.layer import Layer, Run, dims, evaluates
from trt_dynamo.reference.pointwise import cast
from trt_dynamo.reference.steps import CPU, HOST_ELEMENTS


@evaluates("SHUFFLE", exact=True, host=(1,))
def shuffle(layer: Layer) -> Run:
    """Transpose, reshape, transpose; each of the three may be missing."""
    native = layer.native
    first, second = list(native.first_transpose), list(native.second_transpose)
    fixed = None if layer.has_input(1) or native.reshape_dims is None else dims(native.reshape_dims)
    keeps_zero = not native.zero_is_placeholder

    def run(x: Tensor, shape: Tensor | None = None) -> Tensor:
        x = x.permute(first[: x.dim()])
        wanted = fixed if shape is None else shape.tolist()
        if wanted is not None:
            x = x.reshape(resolved(wanted, x.shape, keeps_zero))
        return x.permute(second[: x.dim()])

    return run


def resolved(wanted: Sequence[int], shape: Sequence[int], keeps_zero: bool) -> list[int]:
    """The dims of a reshape: 0 copies the input's dim unless it is meant, -1 is what is left."""
    result = [shape[i] if dim == 0 and not keeps_zero else dim for i, dim in enumerate(wanted)]
    if -1 in result:
        rest = math.prod(dim for dim in result if dim != -1)
        result[result.index(-1)] = math.prod(shape) // rest if rest else 0
    return result


@evaluates("SLICE", exact=True, host=(1, 2, 3, 5))
def slice_layer(layer: Layer) -> Run:
    """Start, size, stride and axes are attributes or, each, an input."""
    native = layer.native
    mode = native.mode.name
    fixed = {
        role: dims(getattr(native, role))
        for index, role in ((1, "start"), (2, "shape"), (3, "stride"), (5, "axes"))
        if not layer.has_input(index) and getattr(native, role, None) is not None
    }

    def run(
        x: Tensor,
        start: Tensor | None = None,
        size: Tensor | None = None,
        stride: Tensor | None = None,
        fill: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> Tensor:
        given = {"start": start, "shape": size, "stride": stride, "axes": axes}
        read = fixed | {role: value.tolist() for role, value in given.items() if value is not None}
        for position, axis in enumerate(read.get("axes") or range(x.dim())):
            part = (read["start"][position], read["shape"][position], read["stride"][position])
            x = sliced(x, axis % x.dim(), *part, mode, fill)
        return x

    return run


def sliced(x: Tensor, axis: int, start: int, length: int, stride: int, mode: str, fill: Tensor | None) -> Tensor:
    """`length` elements of an axis from `start` on, `stride` apart; `mode` says what lies outside."""
    size = x.shape[axis]
    if start == 0 and stride == 1 and length == size:
        return x
    last = start + (length - 1) * stride
    if length <= 0:
        return x.narrow(axis, 0, 0)
    if 0 <= start < size and 0 <= last < size and stride > 0:
        return x.narrow(axis, start, last - start + 1)[(slice(None),) * axis + (slice(None, None, stride),)]
    if stride == 0 and 0 <= start < size:
        return x.narrow(axis, start, 1).expand([length if i == axis else dim for i, dim in enumerate(x.shape)])
    # on the host, because what it says decides, also where `x` is on meta
    index = start + stride * torch.arange(length, device="cpu")
    return picked(x, axis, index, mode, fill)


def picked(x: Tensor, axis: int, index: Tensor, mode: str, fill: Tensor | None) -> Tensor:
    size = x.shape[axis]
    outside = (index < 0) | (index >= size)
    if mode == "FILL":
        value = torch.zeros((), dtype=x.dtype, device=x.device) if fill is None else fill.reshape(()).to(x.device)
        shape = [1] * x.dim()
        shape[axis] = -1
        if size == 0:
            return value.expand([index.numel() if i == axis else dim for i, dim in enumerate(x.shape)])
        chosen = x.index_select(axis, index.clamp(0, size - 1).to(x.device))
        return torch.where(outside.to(x.device).reshape(shape), value, chosen)
    if size == 0:
        raise EngineError(f"a slice reads {index.numel()} elements of an empty axis in mode {mode}")
    if mode == "CLAMP":
        index = index.clamp(0, size - 1)
    elif mode == "WRAP":
        index = index % size
    elif mode == "REFLECT":
        period = max(2 * (size - 1), 1)
        index = index % period
        index = torch.where(index >= size, period - index, index)
    elif bool(outside.any()):
        raise EngineError(f"a slice reads outside of the bounds: {index.tolist()} of {size}")
    return x.index_select(axis, index.to(x.device))


@evaluates("CONCATENATION", exact=True)
def concatenation(layer: Layer) -> Run:
    axis = layer.native.axis
    return lambda *tensors: torch.cat(tensors, axis)


@evaluates("SQUEEZE", exact=True, host=(1,))
def squeeze(layer: Layer) -> Run:
    """Without axes, TensorRT removes the dims that are 1 in the definition, not those that happen to be 1."""
    ones = [axis for axis, dim in enumerate(layer.input_shapes[0]) if dim == 1]

    def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = ones if axes is None else [axis % x.dim() for axis in axes.reshape(-1).tolist()]
        if any(x.shape[axis] != 1 for axis in chosen):
            raise EngineError(f"squeeze of the axes {chosen} of a tensor {tuple(x.shape)}")
        return x.squeeze(tuple(chosen))

    return run


@evaluates("UNSQUEEZE", exact=True, host=(1,))
def unsqueeze(layer: Layer) -> Run:
    def run(x: Tensor, axes: Tensor) -> Tensor:
        chosen = axes.reshape(-1).tolist()
        for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
            x = x.unsqueeze(axis)
        return x

    return run


@evaluates("SHAPE", exact=True)
def shape(layer: Layer) -> Run:
    dtype = layer.dtype
    return lambda x: torch.tensor(x.shape, dtype=dtype, device="cpu")


@evaluates("REVERSE_SEQUENCE", exact=True)
def reverse_sequence(layer: Layer) -> Run:
    """Of each item along the batch axis, the first `lengths[item]` elements along the sequence axis, reversed."""
    batch, along = layer.native.batch_axis, layer.native.sequence_axis

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        batch_axis, axis = batch % x.dim(), along % x.dim()
        position = torch.arange(x.shape[axis], device=x.device)
        ends = lengths.reshape(-1, 1).long()
        index = torch.where(position < ends, ends - 1 - position, position)
        index = index if batch_axis < axis else index.t()
        view = [dim if i in (batch_axis, axis) else 1 for i, dim in enumerate(x.shape)]
        return torch.gather(x, axis, index.reshape(view).expand(x.shape))

    return run


@evaluates("FILL", exact=True, host=(0, 1, 2), places=True)
def fill(layer: Layer) -> Run:
    """Evenly spaced or random values; shape, first and second parameter are attributes or, each, an input."""
    native = layer.native
    kind, dtype = native.operation.name, layer.dtype
    fixed = () if layer.has_input(0) else dims(native.shape)
    alpha = 0.0 if layer.has_input(1) else native.alpha
    beta = 0.0 if layer.has_input(2) else native.beta

    def run(
        shape: Tensor | None = None,
        first: Tensor | None = None,
        second: Tensor | None = None,
        *,
        device: torch.device,
    ) -> Tensor:
        size = list(fixed) if shape is None else shape.tolist()
        a = alpha if first is None else first.item()
        b = [beta] if second is None else second.reshape(-1).tolist()
        place = CPU if math.prod(size) <= HOST_ELEMENTS and not dtype.is_floating_point else device
        if kind == "RANDOM_UNIFORM":
            return (torch.rand(size, dtype=torch.float32, device=place) * (b[0] - a) + a).to(dtype)
        if kind == "RANDOM_NORMAL":
            return (torch.randn(size, dtype=torch.float32, device=place) * b[0] + a).to(dtype)
        return linspace(size, a, b, dtype, place)

    return run


def linspace(
    size: Sequence[int], start: float, steps: Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """start + the sum over the dims of step * index. Integers are exact; floats are rounded once."""
    work = torch.float64 if dtype.is_floating_point else torch.int64
    total = torch.full([1] * len(size), start, dtype=work, device=device)
    for axis, step in zip(range(len(size)), [*steps, *[0] * len(size)], strict=False):
        view = [1] * len(size)
        view[axis] = size[axis]
        total = total + (torch.arange(size[axis], dtype=work, device=device) * step).reshape(view)
    return cast(total.expand(list(size)).contiguous(), dtype)
