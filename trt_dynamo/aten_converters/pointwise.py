"""Elementwise arithmetic, comparisons and logic: `IUnaryLayer`, `IElementWiseLayer`, `ISelectLayer`."""

from __future__ import annotations

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind

from trt_dynamo.aten_converters.network import Network, Operand, Tensor
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

FLOAT_UNARY = {
    aten.exp.default: "EXP",
    aten.log.default: "LOG",
    aten.sqrt.default: "SQRT",
    aten.sin.default: "SIN",
    aten.cos.default: "COS",
    aten.erf.default: "ERF",
    aten.reciprocal.default: "RECIP",
}


def register_unary(target: torch._ops.OpOverload, op: str) -> None:
    @converter(target)
    def unary(net: Network, x: Tensor) -> Tensor:
        return net.unary(op, x, kind=Kind.INT_TO_FLOAT)


for target, op in FLOAT_UNARY.items():
    register_unary(target, op)


@converter(aten.add.Tensor, aten.add.Scalar)
def add(net: Network, a: Operand, b: Operand, *, alpha: float = 1) -> Tensor:
    return net.elementwise("SUM", a, b if alpha == 1 else net.elementwise("PROD", b, alpha))


@converter(aten.mul.Tensor, aten.mul.Scalar)
def mul(net: Network, a: Operand, b: Operand) -> Tensor:
    return net.elementwise("PROD", a, b)
