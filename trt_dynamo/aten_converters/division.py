"""Division with its roundings and remainders, of integers (exact) and of floats (as exact as torch's)."""

from __future__ import annotations

from typing import TypeAlias

import sympy
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind

from trt_dynamo.aten_converters.network import Network, Operand, Tensor
from trt_dynamo.aten_converters.pointwise import signbit
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

Number: TypeAlias = Operand | sympy.Expr


@converter(aten.trunc.default)
def trunc(net: Network, x: Tensor) -> Tensor:
    if not x.is_float:
        return x
    return net.where(net.elementwise("LESS", x, 0), net.unary("CEIL", x), net.unary("FLOOR", x))


@converter(aten.frac.default)
def frac(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("SUB", x, trunc(net, x))


@converter(aten.round.decimals)
def round_decimals(net: Network, x: Tensor, *, decimals: int) -> Tensor:
    """torch scales by a power of ten, up for digits behind the point, down for zeros before it."""
    if not x.is_float or decimals == 0:
        return net.unary("ROUND", x) if x.is_float else x
    there, back = ("PROD", "DIV") if decimals > 0 else ("DIV", "PROD")
    scale = 10.0 ** abs(decimals)
    rounded = net.unary("ROUND", net.elementwise(there, net.wide(x), scale))
    return net.cast(net.elementwise(back, rounded, scale), x.dtype)


@converter(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div(net: Network, a: Number, b: Number, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is None:
        return net.elementwise("DIV", a, b, kind=Kind.INT_TO_FLOAT)
    if rounding_mode == "floor":
        return floor_divide(net, a, b)
    a, b, dtype = operands(net, a, b)
    return net.cast(trunc(net, net.elementwise("DIV", a, b)), dtype)


@converter(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(net: Network, a: Number, b: Number) -> Tensor:
    """Of floats, as Python has it: the quotient that goes with the remainder, not the rounded quotient's floor."""
    a, b, dtype = operands(net, a, b)
    if not a.is_float:
        return net.cast(net.elementwise("FLOOR_DIV", a, b), dtype)
    rest = exact_fmod(net, a, b)
    quotient = net.elementwise("DIV", net.elementwise("SUB", a, rest), b)
    below = differs_in_sign(net, rest, b)
    quotient = net.elementwise("SUB", quotient, net.cast(below, a.dtype))
    floor = net.unary("ROUND", quotient)
    return net.cast(net.where(net.elementwise("EQUAL", b, 0), net.elementwise("DIV", a, b), floor), dtype)


@converter(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(net: Network, a: Number, b: Number) -> Tensor:
    """The rest with the divisor's sign."""
    a, b, dtype = operands(net, a, b)
    if not a.is_float:
        turns = net.elementwise("PROD", net.elementwise("FLOOR_DIV", a, b), b)
        return net.cast(net.elementwise("SUB", a, turns), dtype)
    rest = exact_fmod(net, a, b)
    return net.cast(net.where(differs_in_sign(net, rest, b), net.elementwise("SUM", rest, b), rest), dtype)


@converter(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(net: Network, a: Number, b: Number) -> Tensor:
    """The rest with the dividend's sign."""
    a, b, dtype = operands(net, a, b)
    if a.is_float:
        return net.cast(exact_fmod(net, a, b), dtype)
    turns = net.elementwise("PROD", net.elementwise("DIV", a, b), b)
    return net.cast(net.elementwise("SUB", a, turns), dtype)


def operands(net: Network, a: Number, b: Number) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both as torch divides them, the half types as float32, and the dtype of the result."""
    left, right = net.promote(a, b)
    return net.wide(left), net.wide(right), left.dtype


def differs_in_sign(net: Network, rest: Tensor, b: Tensor) -> Tensor:
    """Whether the rest is not zero and lies on the other side of zero than the divisor."""
    below, divisor_below = net.elementwise("LESS", rest, 0), net.elementwise("LESS", b, 0)
    there = net.logical_not(net.elementwise("EQUAL", rest, 0))
    return net.elementwise("AND", there, net.elementwise("XOR", below, divisor_below))


def exact_fmod(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`a - q * b` for the whole quotient `q`, exact for quotients up to 2**45: by a large multiple first, then by
    `b`.
    """
    size, divisor = net.unary("ABS", a), net.unary("ABS", b)
    rest = rest_of(net, rest_of(net, size, net.elementwise("PROD", divisor, 2.0**22)), divisor)
    return net.where(signbit(net, a), net.unary("NEG", rest), rest)


def rest_of(net: Network, size: Tensor, divisor: Tensor) -> Tensor:
    """The rest of a division of positive floats, exact for quotients up to 2**23.

    The product is had as a sum of two floats (Dekker's product), so the quotient's own rounding shows as a rest that is
    negative or too large, and is mended.
    """
    quotient = net.unary("FLOOR", net.elementwise("DIV", size, divisor))
    high, low = exact_product(net, quotient, divisor)
    rest = net.elementwise("SUB", net.elementwise("SUB", size, high), low)
    rest = net.where(net.elementwise("LESS", rest, 0), net.elementwise("SUM", rest, divisor), rest)
    rest = net.where(net.elementwise("LESS", rest, divisor), rest, net.elementwise("SUB", rest, divisor))
    # A smaller dividend is the rest itself, of an infinite divisor too.
    return net.where(net.elementwise("LESS", size, divisor), size, rest)


def exact_product(net: Network, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The product of two float32s as a float and what its rounding left out."""
    (a_high, a_low), (b_high, b_low) = halves(net, a), halves(net, b)
    product = net.elementwise("PROD", a, b)
    error = net.elementwise("SUB", net.elementwise("PROD", a_high, b_high), product)
    for left, right in ((a_high, b_low), (a_low, b_high), (a_low, b_low)):
        error = net.elementwise("SUM", error, net.elementwise("PROD", left, right))
    return product, error


def halves(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as the sum of two floats of 12 bits each (Veltkamp's splitting)."""
    moved = net.elementwise("PROD", x, 4097.0)
    high = net.elementwise("SUB", moved, net.elementwise("SUB", moved, x))
    return high, net.elementwise("SUB", x, high)
