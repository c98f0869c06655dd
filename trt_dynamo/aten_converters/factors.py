"""Who reads a weight made of codes, and which codes TensorRT multiplies with which. In: a node that is such a weight.
Out: whether it is one to its readers, and whether its products can be built.

A position or a mask in integers that is cast to floats looks like codes, but is none: nobody multiplies matrices with
it. TensorRT for RTX does not build a concatenation of such constants in codes.

Of a quantized input, TensorRT for RTX builds products only with weights of the same type of codes that have one scale,
or one for each index of an axis; with all others its compiler fails. Such weights stay floats.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch.fx import Node

aten, prims = torch.ops.aten, torch.ops.prims

FAKE_QUANTIZE = torch.ops.trt_dynamo.fake_quantize.default
FP8 = torch.float8_e4m3fn

CASTS = (aten._to_copy.default, prims.convert_element_type.default)
VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
)
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
PASSED = (*CASTS, *VIEWS, *TURNS)
# What a weight may go through on the way to its product.
PREPARED = (
    *PASSED,
    FAKE_QUANTIZE,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
)

# Who reads weights.
READERS = (
    aten.mm.default,
    aten.mv.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.addmv.default,
    aten.baddbmm.default,
    aten.addbmm.default,
    aten.matmul.default,
    aten.linear.default,
    aten._grouped_mm.default,
    aten.convolution.default,
    aten.embedding.default,
)

# What an input's codes are, by the op that reads them.
KINDS = {
    "quantized_decomposed.dequantize_per_tensor.default": torch.int8,
    "quantized_decomposed.dequantize_per_tensor.tensor": torch.int8,
    "torchao.dequantize_affine.default": torch.int8,
    "torchao.dequantize_affine_float8_non_decomposed.default": FP8,
    "aten.fake_quantize_per_tensor_affine_cachemask.default": torch.int8,
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default": torch.int8,
}


def becomes_weight(node: Node) -> bool:
    """Whether somebody reads the node as a weight, scaled perhaps."""
    return any(user.target in READERS for user, _ in readers(node, PREPARED))


def suits(weight: Node, kind: torch.dtype, *, blocks: bool) -> bool:
    """Whether all who read the weight can be built if it is held in codes of the kind."""
    if any(user.target is aten.cat.default for user, _ in readers(weight, PREPARED)):
        return False
    others = {other for factor in factors(weight) if (other := input_kind(factor)) is not None}
    return not others or (others == {kind} and not blocks)


def factors(weight: Node) -> Iterator[Node]:
    """What the weight is multiplied with: the other operands of its readers."""
    for user, node in readers(weight, PASSED):
        yield from (other for other in user.all_input_nodes if other is not node)


def readers(weight: Node, passed: Collection[object]) -> Iterator[tuple[Node, Node]]:
    """Who reads the weight, behind what it is `passed` through, and the node that each reads."""
    waiting, seen = [weight], {weight}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.target not in passed:
                yield user, node
            elif user not in seen:
                seen.add(user)
                waiting.append(user)


def input_kind(node: Node) -> torch.dtype | None:
    """The type of codes that the node's values were rounded to, or None: they are floats."""
    while node.target in PASSED or node.target is operator.getitem:
        if not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    if node.target is FAKE_QUANTIZE:
        return FP8 if node.args[3] else torch.int8
    return KINDS.get(str(node.target))
