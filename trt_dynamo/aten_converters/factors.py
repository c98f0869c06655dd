"""Which codes TensorRT multiplies with which. In: a node that is a weight made of codes. Out: whether its products can
be built.

Of a quantized input, TensorRT for RTX builds products only with weights of the same type of codes that have one scale,
or one for each index of an axis; with all others its compiler fails. Such weights stay floats.
"""

from __future__ import annotations

from collections.abc import Iterator

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

# What an input's codes are, by the op that reads them.
KINDS = {
    "quantized_decomposed.dequantize_per_tensor.default": torch.int8,
    "quantized_decomposed.dequantize_per_tensor.tensor": torch.int8,
    "torchao.dequantize_affine.default": torch.int8,
    "torchao.dequantize_affine_float8_non_decomposed.default": FP8,
    "aten.fake_quantize_per_tensor_affine_cachemask.default": torch.int8,
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default": torch.int8,
}


def suits(weight: Node, kind: torch.dtype, *, blocks: bool) -> bool:
    """Whether all products of the weight can be built if it is held in codes of the kind."""
    others = {other for factor in factors(weight) if (other := input_kind(factor)) is not None}
    return not others or (others == {kind} and not blocks)


def factors(weight: Node) -> Iterator[Node]:
    """What the weight is multiplied with: the other operands of its readers."""
    waiting, seen = [weight], {weight}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.target in PASSED:
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
            else:
                yield from (other for other in user.all_input_nodes if other is not node)


def input_kind(node: Node) -> torch.dtype | None:
    """The type of codes that the node's values were rounded to, or None: they are floats."""
    while node.target in PASSED or str(node.target) == "<built-in function getitem>":
        if not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    if node.target is FAKE_QUANTIZE:
        return FP8 if node.args[3] else torch.int8
    return KINDS.get(str(node.target))
