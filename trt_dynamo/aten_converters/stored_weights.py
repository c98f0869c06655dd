"""Weights that a graph makes of codes, `(codes - zero) * scale`, in whatever ops it says so: torchao's tensor classes,
`weight.to(x.dtype) * scales`, codes of four bits that are unpacked; and weights that a graph rounds to codes and back.

Comes in: a segment's graph, and a network that knows the weights' values. Goes out: which nodes become constants of
codes with a dequantize layer, and which are then read by nobody. In ops, TensorRT would hold such a weight as floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch.fx import Node

from trt_dynamo.aten_converters.code_grids import along, dequantize_layer, stored, stored_in_four_bits
from trt_dynamo.aten_converters.factors import CASTS, FAKE_QUANTIZE, TURNS, VIEWS, becomes_weight, suits
from trt_dynamo.aten_converters.folding import constant_of
from trt_dynamo.aten_converters.network import HALVES, Network, Tensor
from trt_dynamo.operators.fake_quantize import codes_and_scale

aten = torch.ops.aten

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, *HALVES)
FOUR_BITS = (-8, 7)
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """What a node computes: `(codes - zero) * scale` in `dtype`; zero and scale broadcast over the codes. `order` is
    that of its dims, where these were permuted at the end: the codes keep their own.
    """

    codes: torch.Tensor
    dtype: torch.dtype
    zero: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    order: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight:
    """int8 codes around 0, or FP8; `scale` is one number, one per index of `axis`, or (with no axis) one per block:
    then it has the rank of the codes, and along one dim fewer elements.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    axis: int | None
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    @property
    def four_bits(self) -> bool:
        """Whether they are stored in four bits, which TensorRT has for the weights of matrix products."""
        if self.codes.dtype is FP8:
            return False
        low, high = FOUR_BITS
        small = low <= int(self.codes.min()) and int(self.codes.max()) <= high
        return small and self.codes.ndim == 2 and self.codes.numel() % 2 == 0


def stored_weights(net: Network, nodes: Iterable[Node]) -> tuple[dict[Node, StoredWeight], set[Node]]:
    """The nodes that are weights made of codes, and those that nobody reads once these are stored.

    Raises:
        Unsupported: there is one, and the engine's weights shall be replaceable.
    """
    chains: dict[Node, Chain] = {}
    for node in nodes:
        chain = extended(net, node, chains) if node.op == "call_function" else None
        if chain is not None:
            chains[node] = chain
    found: dict[Node, StoredWeight] = {}
    unread: set[Node] = set()
    if not chains:
        return found, unread
    for node in reversed(list(nodes)):
        if node.op != "call_function" or not node.users or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if all(user in found or user in unread for user in node.users):
            unread.add(node)
        elif node in chains and node.target not in TURNS and (weight := fitted(net, node, chains[node])) is not None:
            found[node] = weight
    return found, unread


def put(net: Network, weight: StoredWeight) -> Tensor:
    """The constant and its dequantize layer."""
    raw = (stored_in_four_bits if weight.four_bits else stored)(net, weight.codes)
    scale = weight.scale
    # TensorRT for RTX does not build INT4 with a scale of another type than the result's.
    narrow = weight.four_bits and weight.dtype is not torch.float32
    exact = not narrow or kept_in(scale, weight.dtype)
    made = Tensor(raw, weight.dtype if exact else torch.float32, tuple(weight.codes.shape))
    scale = scale.to(made.dtype) if narrow and exact else scale
    result = net.cast(dequantize_layer(net, raw, scale, weight.axis, made), weight.dtype)
    return result if weight.order is None else net.permute(result, weight.order)


def kept_in(scale: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers keep the precision of a half type: none is too small or too large for it."""
    limits = torch.finfo(dtype)
    return bool(((scale >= limits.smallest_normal) & (scale <= limits.max)).all())


# -- what a graph says ------------------------------------------------------------------------------------------------


def extended(net: Network, node: Node, chains: Mapping[Node, Chain]) -> Chain | None:
    """The chain that a node ends, where it goes on from one, or begins with codes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or not node.args:
        return None
    first = node.args[0]
    if node.target is FAKE_QUANTIZE:
        return by_limit(net, node)
    if node.target in CASTS:
        chain = begun(net, node, first, chains)
        return None if chain is None else dataclasses.replace(chain, dtype=value.dtype)
    if isinstance(first, Node) and first in chains and chains[first].order is None:
        if node.target in VIEWS:
            return reshaped(chains[first], value.shape)
        if node.target in TURNS:
            return dataclasses.replace(chains[first], order=order_of(node, value.ndim))
    if node.target in (aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor) and len(node.args) == 2 and not node.kwargs:
        return combined(net, node, value, chains)
    return None


def by_limit(net: Network, node: Node) -> Chain | None:
    """The chain that begins with a weight in floats and the largest magnitude that its codes shall stand for."""
    weight, amax = (constant_of(net, source) if isinstance(source, Node) else None for source in node.args[:2])
    if not isinstance(weight, torch.Tensor) or not isinstance(amax, torch.Tensor) or weight.ndim < 2:
        return None
    bits, exponent_bits, unsigned, narrow = (int(number) for number in node.args[2:])  # type: ignore[arg-type]
    codes, scale = codes_and_scale(weight, amax, bits, exponent_bits, bool(unsigned), bool(narrow))
    held = codes.to(FP8 if exponent_bits else torch.int32)
    return Chain(held, weight.dtype, scale=scale.reshape([1] * (weight.ndim - scale.ndim) + list(scale.shape)))


def order_of(node: Node, rank: int) -> tuple[int, ...]:
    """The order of dims that a permutation makes."""
    sizes = torch.empty(tuple(range(1, rank + 1)), device="meta")
    moved = node.target(sizes, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(int(size) - 1 for size in moved.shape)


def begun(net: Network, node: Node, source: object, chains: Mapping[Node, Chain]) -> Chain | None:
    """The chain behind a node's source, or a new one, where that is codes that are known and become a weight."""
    if not isinstance(source, Node):
        return None
    if source in chains:
        return chains[source]
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (*INTEGERS, FP8) or value.ndim < 2:
        return None
    if not becomes_weight(node):
        return None
    codes = constant_of(net, source)
    return Chain(codes, torch.float32) if isinstance(codes, torch.Tensor) and codes.numel() else None


def combined(net: Network, node: Node, value: torch.Tensor, chains: Mapping[Node, Chain]) -> Chain | None:
    """A chain after a zero point was taken off, or a scale was put on."""
    pairs = [(node.args[0], node.args[1])]
    if node.target is aten.mul.Tensor:
        pairs.append((node.args[1], node.args[0]))
    for source, other in pairs:
        chain = begun(net, node, source, chains)
        if chain is None or chain.order is not None or chain.codes.shape != value.shape:
            continue
        number = known_number(net, other)
        if number is None or number.ndim > value.ndim:
            continue
        chain = dataclasses.replace(chain, dtype=value.dtype)
        number = number.reshape([1] * (value.ndim - number.ndim) + list(number.shape))
        if node.target is aten.sub.Tensor:
            return without_zero(chain, number)
        if chain.scale is None:
            return dataclasses.replace(chain, scale=1 / number if node.target is aten.div.Tensor else number)
    return None


def known_number(net: Network, other: object) -> torch.Tensor | None:
    """A number, or a tensor that is known, in float32."""
    if isinstance(other, int | float):
        return torch.tensor(float(other))
    value = constant_of(net, other) if isinstance(other, Node) else None
    return value.float() if isinstance(value, torch.Tensor) else None


def without_zero(chain: Chain, zero: torch.Tensor) -> Chain | None:
    known = chain.scale is not None or chain.zero is not None or chain.codes.dtype is FP8
    if known or bool((zero != zero.round()).any()):
        return None
    return dataclasses.replace(chain, zero=zero)


def reshaped(chain: Chain, shape: torch.Size) -> Chain | None:
    def whole(number: torch.Tensor | None) -> torch.Tensor | None:
        return None if number is None else number.broadcast_to(chain.codes.shape).reshape(shape)

    return Chain(chain.codes.reshape(shape), chain.dtype, whole(chain.zero), whole(chain.scale))


# -- what TensorRT takes ----------------------------------------------------------------------------------------------


def fitted(net: Network, node: Node, chain: Chain) -> StoredWeight | None:
    """The weight in TensorRT's terms, where these are the numbers that torch makes of it."""
    codes, scale = around_zero(chain), chain.scale if chain.scale is not None else torch.ones((1,) * chain.codes.ndim)
    if codes is None:
        return None
    scale, axis = blocks(scale.broadcast_to(codes.shape))
    if (codes.dtype is FP8 and scale.ndim > 1) or not bool(((scale > 0) & scale.isfinite()).all()):
        return None
    if not suits(node, codes.dtype, blocks=scale.ndim > 1):
        return None
    weight, expected = StoredWeight(codes, scale, axis, chain.dtype, chain.order), constant_of(net, node)
    return weight if isinstance(expected, torch.Tensor) and same(weight, expected) else None


def around_zero(chain: Chain) -> torch.Tensor | None:
    """The codes without their zero point, where they are int8 then; FP8 as it is."""
    if chain.codes.dtype is FP8:
        return chain.codes
    codes = chain.codes.to(torch.int32)
    if chain.zero is not None:
        codes = codes - chain.zero.to(torch.int32)
    return codes.to(torch.int8) if int(codes.min()) >= -128 and int(codes.max()) <= 127 else None


def same(weight: StoredWeight, expected: torch.Tensor) -> bool:
    """Whether the numbers are equal, but for the last bits."""
    codes, scale = weight.codes.float(), weight.scale
    if weight.axis is not None:
        scale = scale.reshape(along(codes.ndim, weight.axis))
    elif scale.ndim:
        for axis, (size, count) in enumerate(zip(codes.shape, scale.shape, strict=True)):
            scale = scale.repeat_interleave(size // count, axis)
    made = codes * scale if weight.order is None else (codes * scale).permute(weight.order)
    limits = torch.finfo(expected.dtype)
    return torch.allclose(made, expected.float(), rtol=4 * limits.eps, atol=limits.smallest_normal * limits.eps)


def blocks(scale: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """The fewest numbers that say the same as one per element: one, one per index of an axis, or one per block of
    equal length along one dim, which must be one of the last two.
    """
    lengths = [steady(scale, axis) for axis in range(scale.ndim)]
    whole = [length == size for length, size in zip(lengths, scale.shape, strict=True)]
    if all(whole):
        return scale.flatten()[0].clone(), None
    varies = [axis for axis, is_whole in enumerate(whole) if not is_whole]
    if len(varies) == 1 and lengths[varies[0]] == 1:
        axis = varies[0]
        return scale.movedim(axis, 0).flatten(1)[:, 0].clone(), axis
    last_two = range(scale.ndim - 1, max(scale.ndim - 3, -1), -1)
    chosen = max(last_two, key=lambda axis: lengths[axis])
    index = torch.arange(0, scale.shape[chosen], lengths[chosen])
    return scale.index_select(chosen, index).contiguous(), None


def steady(scale: torch.Tensor, axis: int) -> int:
    """The largest length of equal blocks along an axis within which nothing changes."""
    size = scale.shape[axis]
    if scale.stride(axis) == 0 or size == 1:
        return size
    changes = (scale.narrow(axis, 1, size - 1) != scale.narrow(axis, 0, size - 1)).movedim(axis, 0).flatten(1).any(1)
    return math.gcd(size, *(place + 1 for place in changes.nonzero().flatten().tolist()))
