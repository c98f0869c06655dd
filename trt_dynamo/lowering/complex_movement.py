"""Rules for complex numbers that are moved about: the same op on the pairs, whose last dim keeps its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.complex_arithmetic import full_pair
from trt_dynamo.lowering.pairs import Number, Operand, Pair, Rule, axes, axis, pair, rule

aten = torch.ops.aten


def sized(op: Any, last: int) -> Rule:
    """An op whose second argument is a shape: the pairs add a dim to it."""
    return lambda x, size, **rest: Pair(op(x.value, [*size, last], **rest))


for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default):
    rule(op)(sized(op, 2))
rule(aten.repeat.default)(sized(aten.repeat.default, 1))


def along(op: Any, default: int = 0) -> Rule:
    """An op whose second argument is a dim."""

    def moved(x: Pair, dim: int = default, *args: Any, **rest: Any) -> Any:
        if not x.ndim:
            raise Unsupported("a dim of a number")
        result = op(x.value, axis(x, dim), *args, **rest)
        return Pair(result) if isinstance(result, torch.Tensor) else [Pair(each) for each in result]

    return moved


ALONG = (
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.unbind.int, aten.index_select.default,
    aten.narrow_copy.default,
)  # fmt: skip
for op in ALONG:
    rule(op)(along(op))


def plain(op: Any) -> Rule:
    """An op that asks for no dim."""
    return lambda x, *args, **rest: Pair(op(x.value, *args, **rest))


for op in (aten.squeeze.default, aten.lift_fresh_copy.default):
    rule(op)(plain(op))


@rule(aten.clone.default, aten.contiguous.default)
def clone(x: Pair, **_: Any) -> Pair:
    """Its strides are those that the graph states."""
    return Pair(x.value.clone())


@rule(aten.copy.default)
def copy(x: Operand, source: Operand, *_: Any) -> Any:
    if isinstance(x, torch.Tensor):
        raise Unsupported("a copy of complex numbers into reals")
    assert isinstance(x, Pair)
    value = full_pair(source, x).value.to(x.dtype)
    return Pair(value.expand(x.value.shape).clone())


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default)
def split(x: Pair, size: Any, dim: int = 0) -> list[Pair]:
    return [
        Pair(each)
        for each in torch.split(x.value, list(size) if isinstance(size, list | tuple) else size, axis(x, dim))
    ]


@rule(aten.permute.default)
def permute(x: Pair, dims: Sequence[int]) -> Pair:
    return Pair(x.value.permute([*(axis(x, dim) for dim in dims), x.ndim]))


@rule(aten.transpose.int)
def transpose(x: Pair, a: int, b: int) -> Pair:
    return Pair(x.value.transpose(axis(x, a), axis(x, b))) if x.ndim else Pair(aten.alias(x.value))


@rule(aten.t.default)
def t(x: Pair) -> Pair:
    return Pair(x.value.transpose(0, 1)) if x.ndim == 2 else Pair(aten.alias(x.value))


@rule(aten.unsqueeze.default)
def unsqueeze(x: Pair, dim: int) -> Pair:
    return Pair(x.value.unsqueeze(dim % (x.ndim + 1)))


@rule(aten.squeeze.dims)
def squeeze(x: Pair, dims: Sequence[int]) -> Pair:
    return Pair(aten.squeeze.dims(x.value, axes(x, dims) if dims else []))


@rule(aten.flip.default)
def flip(x: Pair, dims: Sequence[int]) -> Pair:
    return Pair(x.value.flip(axes(x, dims) if dims else []))


@rule(aten.roll.default)
def roll(x: Pair, shifts: Any, dims: Any = ()) -> Pair:
    if not x.ndim:
        return Pair(x.value.clone())
    if not dims:
        return Pair(x.value.flatten(0, -2).roll(shifts, 0).view(x.value.shape))
    return Pair(x.value.roll(shifts, axes(x, dims)))


@rule(aten.cat.default)
def cat(tensors: Sequence[Operand], dim: int = 0) -> Pair:
    (like, *_) = (x for x in tensors if isinstance(x, Pair))
    pairs = [full_pair(x, like) for x in tensors]
    wide = next((x for x in pairs if x.ndim > 1), pairs[0])
    return Pair(torch.cat([x.value for x in pairs if x.ndim == wide.ndim], axis(wide, dim)))


@rule(aten.stack.default)
def stack(tensors: Sequence[Operand], dim: int = 0) -> Pair:
    (like, *_) = (x for x in tensors if isinstance(x, Pair))
    return Pair(torch.stack([full_pair(x, like).value for x in tensors], dim % (like.ndim + 1)))


@rule(aten.diagonal.default)
def diagonal(x: Pair, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Pair:
    """Its dim comes last, behind that of the pairs."""
    return Pair(x.value.diagonal(offset, axis(x, dim1), axis(x, dim2)).transpose(-1, -2))


@rule(aten.unfold.default)
def unfold(x: Pair, dim: int, size: int, step: int) -> Pair:
    """The windows' dim comes last, behind that of the pairs."""
    if not x.ndim:
        raise Unsupported("windows of a number")
    return Pair(x.value.unfold(axis(x, dim), size, step).transpose(-1, -2))


@rule(aten.as_strided.default)
def as_strided(x: Pair, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Pair:
    doubled = [2 * s for s in stride]
    return Pair(x.value.as_strided([*size, 2], [*doubled, 1], None if offset is None else 2 * offset))


@rule(aten.constant_pad_nd.default)
def pad(x: Pair, pads: Sequence[int], value: Number = 0) -> Pair:
    if value == 0:
        return Pair(aten.constant_pad_nd(x.value, [0, 0, *pads], 0.0))
    fill = complex(value)
    return pair(aten.constant_pad_nd(x.re, pads, fill.real), aten.constant_pad_nd(x.im, pads, fill.imag))


def apart(op: Any) -> Rule:
    """An op that does the same to the real as to the imaginary parts."""

    def moved(*args: Any, **rest: Any) -> Pair:
        if any(isinstance(x, torch.Tensor) and x.dtype.is_floating_point for x in args):
            raise Unsupported("complex numbers among reals")
        re, im = ([getattr(x, part) if isinstance(x, Pair) else x for x in args] for part in ("re", "im"))
        return pair(op(*re, **rest), op(*im, **rest))

    return moved


APART = (
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default,
    aten.take.default, aten.scatter.src, aten.scatter_add.default, aten.diagonal_scatter.default,
)  # fmt: skip
for op in APART:
    rule(op)(apart(op))


# -- indices ----------------------------------------------------------------------------------------------------------


def doubled(index: torch.Tensor) -> torch.Tensor:
    """An index of elements as one of their parts."""
    return index.unsqueeze(-1).expand(*index.shape, 2)


@rule(aten.index.Tensor)
def index(x: Pair, indices: Sequence[torch.Tensor | None]) -> Pair:
    return Pair(aten.index.Tensor(x.value, list(indices)))


@rule(aten.gather.default)
def gather(x: Pair, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Pair:
    if not x.ndim or index.ndim != x.ndim:
        raise Unsupported("elements gathered from a number")
    return Pair(torch.gather(x.value, axis(x, dim), doubled(index)))


@rule(aten.slice_scatter.default)
def slice_scatter(x: Pair, source: Pair, dim: int = 0, *args: Any, **rest: Any) -> Pair:
    return Pair(aten.slice_scatter(x.value, source.value, axis(x, dim), *args, **rest))


@rule(aten.select_scatter.default)
def select_scatter(x: Pair, source: Pair, dim: int, index: int) -> Pair:
    return Pair(aten.select_scatter(x.value, source.value, axis(x, dim), index))


@rule(aten.index_put.default)
def index_put(x: Pair, indices: Sequence[torch.Tensor | None], values: Pair, accumulate: bool = False) -> Pair:
    masks = [i for i in indices if i is not None and i.dtype is torch.bool]
    if masks and values.ndim:
        raise Unsupported("complex numbers written where a mask says")
    return Pair(aten.index_put(x.value, list(indices), values.value, accumulate))
