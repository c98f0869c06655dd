"""Layers that combine along axes: REDUCE, SOFTMAX, RAGGED_SOFTMAX, TOPK, CUMULATIVE, NORMALIZATION, LRN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trt_dynamo.reference.layer import STORAGE, Layer, Run, axes_of, evaluates

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def lowest(x: Tensor) -> float | int:
    return -float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).min


def highest(x: Tensor) -> float | int:
    return float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max


def extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    """MAX or MIN; over nothing, the lowest or highest value. NaN does not count, as in TensorRT's constant folding."""
    if any(x.shape[axis] == 0 for axis in axes):
        shape = [1 if i in axes else dim for i, dim in enumerate(x.shape) if keep or i not in axes]
        return x.new_full(shape, lowest(x) if largest else highest(x))
    if x.is_floating_point():
        x = torch.where(torch.isnan(x), lowest(x) if largest else highest(x), x)
    return (torch.amax if largest else torch.amin)(x, axes, keep)


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def average(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Integers round towards zero."""
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(torch.sum(x, axes, keep), max(count, 1), rounding_mode="trunc")


REDUCTIONS: dict[str, Reduce] = {
    "SUM": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
    "PROD": product,
    "MAX": lambda x, axes, keep: extreme(x, axes, keep, largest=True),
    "MIN": lambda x, axes, keep: extreme(x, axes, keep, largest=False),
    "AVG": average,
}


@evaluates("REDUCE")
def reduce(layer: Layer) -> Run:
    native = layer.native
    axes, keep, kind = axes_of(native.axes), native.keep_dims, native.op.name
    if kind == "NONE" or not axes:
        return lambda x: x
    function = REDUCTIONS[kind]
    return lambda x: function(x, axes, keep)


@evaluates("SOFTMAX")
def softmax(layer: Layer) -> Run:
    axes = axes_of(layer.native.axes)
    if len(axes) != 1:
        raise layer.unsupported(f"a softmax over {len(axes)} axes")
    return lambda x: torch.softmax(x, axes[0])


@evaluates("RAGGED_SOFTMAX")
def ragged_softmax(layer: Layer) -> Run:
    """Each row's softmax over as many of its first elements as `bounds` says; zeros after them."""

    def run(x: Tensor, bounds: Tensor) -> Tensor:
        inside = torch.arange(x.shape[-1], device=x.device) < bounds.reshape(*x.shape[:-1], 1)
        return torch.softmax(x.masked_fill(~inside, -float("inf")), -1).masked_fill(~inside, 0)

    return run


@evaluates("TOPK", host=(1,))
def topk(layer: Layer) -> Run:
    """Sorted values and their positions; of equal values the first comes first (TensorRT does not say)."""
    native = layer.native
    axes, largest, fixed = axes_of(native.axes), native.op.name == "MAX", native.k
    if len(axes) != 1:
        raise layer.unsupported(f"a top-k over {len(axes)} axes")
    axis, index_type = axes[0], STORAGE[layer.output_types[1]]

    def run(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = fixed if k is None else int(k)
        if count > x.shape[axis]:
            raise ValueError(f"k is {count} and the axis has {x.shape[axis]} elements")
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count).to(index_type)

    return run


@evaluates("CUMULATIVE", host=(1,))
def cumulative(layer: Layer) -> Run:
    exclusive, reverse, kind = layer.native.exclusive, layer.native.reverse, layer.native.op.name
    if kind != "SUM":
        raise layer.unsupported(f"op {kind}")

    def run(x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis) % x.dim()
        y = x.flip(along) if reverse else x
        total = torch.cumsum(y, along, dtype=x.dtype)
        total = shifted(total, along) if exclusive else total
        return total.flip(along) if reverse else total

    return run


def shifted(x: Tensor, axis: int) -> Tensor:
    """One zero in front along the axis, the last element dropped."""
    if x.shape[axis] == 0:
        return x
    return torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)


@evaluates("NORMALIZATION")
def normalization(layer: Layer) -> Run:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias; with groups, the channels are the second dim."""
    native = layer.native
    axes, epsilon, groups = axes_of(native.axes), native.epsilon, native.num_groups
    if groups != 1 and axes != list(range(2, len(layer.input_shapes[0]))):
        raise layer.unsupported(f"{groups} groups with the axes {axes}: TensorRT expects all axes after the channel")
    whole = groups == 1

    def run(x: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        y = x if whole else x.unflatten(1, (groups, -1))
        over = axes if whole else list(range(2, y.dim()))
        if y.numel() == 0:  # which torch warns of
            return x.clone()
        variance, mean = torch.var_mean(y, over, correction=0, keepdim=True)
        normal = ((y - mean) * torch.rsqrt(variance + epsilon)).reshape(x.shape)
        return normal * per_channel(factor, x, groups) + per_channel(bias, x, groups)

    return run


def per_channel(value: Tensor, x: Tensor, groups: int) -> Tensor:
    """A scale given per group, as INormalizationLayer's first version takes it, repeated for each of its channels."""
    if groups == 1 or value.shape[1] in (1, x.shape[1]):
        return value
    return value.repeat_interleave(x.shape[1] // groups, 1)


@evaluates("LRN")
def lrn(layer: Layer) -> Run:
    """x / (k + alpha / window * sum of squares over the window of channels) ** beta, as ONNX and torch have it."""
    native = layer.native
    window, alpha, beta, k = native.window_size, native.alpha, native.beta, native.k
    return lambda x: functional.local_response_norm(x, window, alpha, beta, k)
