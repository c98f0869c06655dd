"""Elementwise arithmetic, minima and maxima, choices: `IUnaryLayer`, `IElementWiseLayer`, `ISelectLayer`.

NaN goes through a minimum, a maximum and a clamp as in torch. TensorRT does not say what its MIN and MAX make of it
(its constant folding drops it), so floats are compared, which every device does alike, and chosen.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import sympy
import torch
from torch._ops import OpOverload
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind

from trt_dynamo.aten_converters.network import Network, Operand, Tensor
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

Number: TypeAlias = Operand | sympy.Expr

# Integers and bools come out as floats.
FLOAT_UNARY = {
    aten.exp.default: "EXP",
    aten.log.default: "LOG",
    aten.sqrt.default: "SQRT",
    aten.sin.default: "SIN",
    aten.cos.default: "COS",
    aten.tan.default: "TAN",
    aten.sinh.default: "SINH",
    aten.cosh.default: "COSH",
    aten.asin.default: "ASIN",
    aten.acos.default: "ACOS",
    aten.atan.default: "ATAN",
    aten.asinh.default: "ASINH",
    aten.acosh.default: "ACOSH",
    aten.atanh.default: "ATANH",
    aten.erf.default: "ERF",
    aten.reciprocal.default: "RECIP",
}
ROUNDING = {aten.ceil.default: "CEIL", aten.floor.default: "FLOOR", aten.round.default: "ROUND"}
NUMERIC_UNARY = {aten.abs.default: "ABS", aten.neg.default: "NEG"}
BINARY = {
    (aten.mul.Tensor, aten.mul.Scalar): ("PROD", Kind.DEFAULT),
    (aten.div.Tensor, aten.div.Scalar): ("DIV", Kind.INT_TO_FLOAT),
}


def register_unary(target: OpOverload, op: str) -> None:
    @converter(target)
    def unary(net: Network, x: Tensor) -> Tensor:
        return net.unary(op, x, kind=Kind.INT_TO_FLOAT)


def register_rounding(target: OpOverload, op: str) -> None:
    @converter(target)
    def rounding(net: Network, x: Tensor) -> Tensor:
        return net.unary(op, x) if x.is_float else x


def register_numeric(target: OpOverload, op: str) -> None:
    @converter(target)
    def numeric(net: Network, x: Tensor) -> Tensor:
        return x if x.dtype is torch.bool else net.unary(op, x)


def register_binary(targets: tuple[OpOverload, ...], op: str, kind: Kind) -> None:
    @converter(*targets)
    def binary(net: Network, a: Number, b: Number) -> Tensor:
        return net.elementwise(op, a, b, kind=kind)


for target, op in FLOAT_UNARY.items():
    register_unary(target, op)
for target, op in ROUNDING.items():
    register_rounding(target, op)
for target, op in NUMERIC_UNARY.items():
    register_numeric(target, op)
for targets, (op, kind) in BINARY.items():
    register_binary(targets, op, kind)


@converter(aten.add.Tensor, aten.add.Scalar)
def add(net: Network, a: Number, b: Number, *, alpha: float = 1) -> Tensor:
    return with_factor(net, "SUM", a, b, alpha)


@converter(aten.sub.Tensor, aten.sub.Scalar)
def sub(net: Network, a: Number, b: Number, *, alpha: float = 1) -> Tensor:
    return with_factor(net, "SUB", a, b, alpha)


@converter(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(net: Network, a: Number, b: Number, *, alpha: float = 1) -> Tensor:
    return with_factor(net, "SUB", b, a, alpha)


def with_factor(net: Network, op: str, a: Number, b: Number, factor: float | sympy.Expr) -> Tensor:
    """`a` and `factor * b` combined, all in the dtype of both: a small integer would wrap before it is promoted."""
    if factor == 1:
        return net.elementwise(op, a, b)
    left, right = net.promote(a, b)
    dtype = left.dtype
    scaled = net.elementwise("PROD", net.wide(right), net.operand(factor, net.wide(right).dtype))
    return net.cast(net.elementwise(op, net.wide(left), scaled), dtype)


@converter(aten.sign.default, aten.sgn.default)
def sign(net: Network, x: Tensor) -> Tensor:
    """The sign of NaN is 0 in torch."""
    if x.dtype is torch.bool:
        return x
    return net.where(isnan(net, x), 0, net.unary("SIGN", x)) if x.is_float else net.unary("SIGN", x)


@converter(aten.signbit.default)
def signbit(net: Network, x: Tensor) -> Tensor:
    """True of -0.0 too, of which the reciprocal tells."""
    below = net.elementwise("LESS", x, 0)
    return net.elementwise("OR", below, net.elementwise("LESS", net.unary("RECIP", x), 0)) if x.is_float else below


@converter(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(net: Network, x: Number, source: Number) -> Tensor:
    x, source = net.promote(x, source, kind=Kind.INT_TO_FLOAT)
    size = net.unary("ABS", x)
    return net.where(signbit(net, source), net.unary("NEG", size), size)


@converter(aten.isnan.default)
def isnan(net: Network, x: Tensor) -> Tensor:
    return net.unary("ISNAN", x) if x.is_float else nowhere(net, x)


@converter(aten.isinf.default)
def isinf(net: Network, x: Tensor) -> Tensor:
    return net.unary("ISINF", x) if x.is_float else nowhere(net, x)


@converter(aten.angle.default)
def angle(net: Network, x: Tensor) -> Tensor:
    """Of a real number: pi below zero, else 0; NaN of NaN."""
    dtype = net.result_dtype()
    turned = net.where(net.elementwise("LESS", x, 0), net.scalar(math.pi, dtype, x.ndim), net.scalar(0, dtype, x.ndim))
    return net.where(isnan(net, x), x, turned) if x.is_float else turned


@converter(aten.ldexp.Tensor)
def ldexp(net: Network, x: Tensor, exponent: Tensor) -> Tensor:
    """`x * 2 ** exponent`."""
    dtype = net.result_dtype()
    factor = net.elementwise("POW", 2.0, net.wide(net.cast(exponent, dtype)))
    return net.cast(net.elementwise("PROD", net.wide(net.cast(x, dtype)), factor), dtype)


def nowhere(net: Network, x: Tensor) -> Tensor:
    """False for each element, without shape arithmetic."""
    return net.elementwise("AND", net.cast(x, torch.bool), False)


@converter(torch.ops.prims.convert_element_type.default)
def convert_element_type(net: Network, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where Dynamo makes tensors of Python floats that change from call to call, this casts them."""
    return net.cast(x, dtype)


# -- powers ------------------------------------------------------------------------------------------------------------

# Powers up to this one are multiplied out, which is exact for integers and right for any base on every device.
LARGEST_PRODUCT = 16


@converter(aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.pow.Tensor_Scalar)
def power(net: Network, base: Number, exponent: Number) -> Tensor:
    dtype = net.result_dtype()
    if isinstance(exponent, int | float) and isinstance(base, Tensor):
        wide = net.wide(net.cast(base, dtype))
        if exponent == 0:
            return net.full(base.shape, 1, dtype)
        if exponent in (0.5, -0.5):
            root = net.unary("SQRT", wide)
            return net.cast(root if exponent > 0 else net.unary("RECIP", root), dtype)
        if abs(exponent) <= LARGEST_PRODUCT and exponent == int(exponent) and (exponent > 0 or wide.is_float):
            result = product_of(net, wide, abs(int(exponent)))
            return net.cast(result if exponent > 0 else net.unary("RECIP", result), dtype)
    return net.cast(
        net.elementwise("POW", net.wide(net.operand(base, dtype)), net.wide(net.operand(exponent, dtype))), dtype
    )


def product_of(net: Network, x: Tensor, times: int) -> Tensor:
    """`x` to a whole power, by squaring."""
    if times == 1:
        return x
    half = product_of(net, x, times // 2)
    square = net.elementwise("PROD", half, half)
    return net.elementwise("PROD", square, x) if times % 2 else square


# -- the lesser, the greater, a choice ---------------------------------------------------------------------------------


def extreme(net: Network, a: Number, b: Number, wins: str) -> Tensor:
    """`a` where it wins against `b` or is NaN, else `b`. `wins` is GREATER or LESS."""
    a, b = net.promote(a, b)
    if not a.is_float:
        return net.elementwise("MAX" if wins == "GREATER" else "MIN", a, b)
    return net.where(net.elementwise("OR", net.elementwise(wins, a, b), isnan(net, a)), a, b)


@converter(aten.maximum.default)
def maximum(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return extreme(net, a, b, "GREATER")


@converter(aten.minimum.default)
def minimum(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return extreme(net, a, b, "LESS")


def number_of_two(net: Network, a: Tensor, b: Tensor, wins: str) -> Tensor:
    """As `extreme`, but a number goes before NaN."""
    a, b = net.promote(a, b)
    if not a.is_float:
        return extreme(net, a, b, wins)
    return net.where(net.elementwise("OR", net.elementwise(wins, a, b), isnan(net, b)), a, b)


@converter(aten.fmax.default)
def fmax(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return number_of_two(net, a, b, "GREATER")


@converter(aten.fmin.default)
def fmin(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return number_of_two(net, a, b, "LESS")


@converter(aten.clamp.default, aten.clamp.Tensor)
def clamp(net: Network, x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    return clamped(net, net.cast(x, net.result_dtype()), low, high)


def clamped(net: Network, x: Tensor, low: Number | None, high: Number | None) -> Tensor:
    """The upper bound comes last: where the lower one is greater, torch gives the upper one."""
    for bound, outside, wins in ((low, "LESS", "GREATER"), (high, "GREATER", "LESS")):
        if bound is None:
            continue
        if isinstance(bound, int | float) and bound == bound and x.is_float:
            # The bound is no NaN: one comparison says it all.
            x = net.where(net.elementwise(outside, x, bound), net.scalar(bound, x.dtype, x.ndim), x)
        else:
            x = extreme(net, x, net.operand(bound, x.dtype), wins)
    return x


@converter(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(net: Network, condition: Tensor, a: Number, b: Number) -> Tensor:
    return net.where(condition, a, b)


@converter(aten.heaviside.default)
def heaviside(net: Network, x: Tensor, at_zero: Tensor) -> Tensor:
    """0 below zero, 1 above, `at_zero` at it; NaN stays 0, as its comparisons say."""
    x, at_zero = net.promote(x, at_zero)
    above = net.cast(net.elementwise("GREATER", x, 0), x.dtype)
    return net.where(net.elementwise("EQUAL", x, 0), at_zero, above)
