"""Gamma, Bessel and normal distribution functions, by the classical fits to single precision.

Sources: Abramowitz and Stegun, Handbook of Mathematical Functions (6.1.41, 6.3.18, 6.4.12, 9.8.1 to 9.8.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.functions import (
    ERFINV_END,
    ERFINV_MIDDLE,
    erfc,
    erfc_scaled,
    formula,
    polynomial,
    with_one,
)
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import copysign, extreme
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten


# -- the gamma function ------------------------------------------------------------------------------------------------

# Stirling's series holds from here on; a smaller argument is moved up by so much.
FAR = 8


def moved_up(net: Network, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`x`, or `x + 8` where it is less than 8; where that was; and `x`, `x + 1`, ... `x + 7` there, 1 elsewhere."""
    near = net.elementwise("LESS", x, float(FAR))
    steps = [net.where(near, net.elementwise("SUM", x, float(i)), 1.0) for i in range(FAR)]
    return net.where(near, net.elementwise("SUM", x, float(FAR)), x), near, steps


def mirrored(net: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where `x` is below 1/2, its mirror image `1 - x`, and the angle `pi * x` less whole turns."""
    left = net.elementwise("LESS", x, 0.5)
    angle = net.elementwise("PROD", net.elementwise("SUB", x, net.unary("ROUND", x)), math.pi)
    return left, net.where(left, net.elementwise("SUB", 1.0, x), x), angle


@formula(aten.lgamma.default)
def lgamma(net: Network, x: Tensor) -> Tensor:
    left, right, angle = mirrored(net, x)
    z, _, steps = moved_up(net, right)
    series = polynomial(net, inverse_square(net, z), (1 / 12, -1 / 360, 1 / 1260, -1 / 1680))
    main = net.elementwise("PROD", net.elementwise("SUB", z, 0.5), net.elementwise("SUB", net.unary("LOG", z), 1.0))
    value = net.elementwise("SUM", main, net.elementwise("DIV", series, z))
    value = net.elementwise("SUM", value, 0.5 * math.log(2 * math.pi) - 0.5)
    product = steps[0]
    for step in steps[1:]:
        product = net.elementwise("PROD", product, step)
    value = net.elementwise("SUB", value, net.unary("LOG", product))
    sine = net.unary("ABS", net.unary("SIN", angle))
    image = net.elementwise("SUB", net.elementwise("SUB", math.log(math.pi), net.unary("LOG", sine)), value)
    # At its poles, the whole numbers from 0 down, the image may be infinity less infinity.
    pole = net.elementwise("AND", left, net.elementwise("EQUAL", sine, 0))
    infinite = net.elementwise("OR", net.unary("ISINF", x), pole)
    return net.where(infinite, math.inf, net.where(left, image, value))


def inverse_square(net: Network, z: Tensor) -> Tensor:
    return net.unary("RECIP", net.elementwise("PROD", z, z))


@formula(aten.digamma.default)
def digamma(net: Network, x: Tensor) -> Tensor:
    """Infinite at 0, with the other sign; NaN at negative whole numbers."""
    left, right, angle = mirrored(net, x)
    z, near, steps = moved_up(net, right)
    series = polynomial(net, inverse_square(net, z), (0.0, 1 / 12, -1 / 120, 1 / 252, -1 / 240))
    value = net.elementwise("SUB", net.unary("LOG", z), net.elementwise("DIV", 0.5, z))
    value = net.elementwise("SUB", value, series)
    for step in steps:
        value = net.elementwise("SUB", value, net.where(near, net.unary("RECIP", step), 0.0))
    image = net.elementwise("SUB", value, net.elementwise("DIV", math.pi, net.unary("TAN", angle)))
    pole = net.elementwise("AND", net.elementwise("EQUAL", net.unary("ROUND", x), x), net.elementwise("LESS", x, 0.0))
    value = net.where(pole, math.nan, net.where(left, image, value))
    return net.where(net.elementwise("EQUAL", x, 0.0), copysign(net, math.inf, net.unary("NEG", x)), value)


def trigamma(net: Network, x: Tensor) -> Tensor:
    left, right, angle = mirrored(net, x)
    z, near, steps = moved_up(net, right)
    series = polynomial(net, inverse_square(net, z), (1.0, 1 / 6, -1 / 30, 1 / 42, -1 / 30))
    value = net.elementwise("DIV", series, z)
    value = net.elementwise("SUM", value, net.elementwise("PROD", inverse_square(net, z), 0.5))
    for step in steps:
        value = net.elementwise("SUM", value, net.where(near, inverse_square(net, step), 0.0))
    sine = net.elementwise("DIV", net.unary("SIN", angle), math.pi)
    return net.where(left, net.elementwise("SUB", inverse_square(net, sine), value), value)


@formula(aten.polygamma.default)
def polygamma(net: Network, order: int, x: Tensor) -> Tensor:
    if order > 1:
        raise Unsupported(f"order {order}: only 0 and 1")
    return digamma(net, x) if order == 0 else trigamma(net, x)


# -- modified Bessel functions -----------------------------------------------------------------------------------------

BESSEL_NEAR = 3.75
I0_NEAR = (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813)
I0_FAR = (0.39894228, 0.01328592, 0.00225319, -0.00157565, 0.00916281, -0.02057706, 0.02635537, -0.01647633, 0.00392377)
I1_NEAR = (0.5, 0.87890594, 0.51498869, 0.15084934, 0.02658733, 0.00301532, 0.00032411)
I1_FAR = (
    0.39894228,
    -0.03988024,
    -0.00362018,
    0.00163801,
    -0.01031555,
    0.02282967,
    -0.02895312,
    0.01787654,
    -0.00420059,
)


def bessel(net: Network, x: Tensor, near: Sequence[float], far: Sequence[float], *, odd: bool, scaled: bool) -> Tensor:
    """One of them, `scaled` by `exp(-|x|)`."""
    size = net.unary("ABS", x)
    inside = net.elementwise("LESS", size, BESSEL_NEAR)
    ratio = net.elementwise("DIV", x, BESSEL_NEAR)
    close = polynomial(net, net.elementwise("PROD", ratio, ratio), near)
    close = net.elementwise("PROD", close, x) if odd else close
    outer = net.where(inside, BESSEL_NEAR, size)
    apart = net.elementwise(
        "DIV", polynomial(net, net.elementwise("DIV", BESSEL_NEAR, outer), far), net.unary("SQRT", outer)
    )
    apart = copysign(net, apart, x) if odd else apart
    if scaled:
        return net.where(inside, net.elementwise("PROD", close, net.unary("EXP", net.unary("NEG", size))), apart)
    return net.where(inside, close, net.elementwise("PROD", apart, net.unary("EXP", size)))


@formula(aten.i0.default, aten.special_modified_bessel_i0.default)
def i0(net: Network, x: Tensor) -> Tensor:
    return bessel(net, x, I0_NEAR, I0_FAR, odd=False, scaled=False)


@formula(aten.special_i0e.default)
def i0e(net: Network, x: Tensor) -> Tensor:
    return bessel(net, x, I0_NEAR, I0_FAR, odd=False, scaled=True)


@formula(aten.special_i1.default, aten.special_modified_bessel_i1.default)
def i1(net: Network, x: Tensor) -> Tensor:
    return bessel(net, x, I1_NEAR, I1_FAR, odd=True, scaled=False)


@formula(aten.special_i1e.default)
def i1e(net: Network, x: Tensor) -> Tensor:
    return bessel(net, x, I1_NEAR, I1_FAR, odd=True, scaled=True)


# -- the normal distribution -------------------------------------------------------------------------------------------


@formula(aten.special_erfcx.default)
def erfcx(net: Network, x: Tensor) -> Tensor:
    """`exp(x * x) * erfc(x)`, of which neither factor need be a number."""
    tail = net.unary("EXP", erfc_scaled(net, net.unary("ABS", x)))
    growth = net.elementwise("PROD", net.unary("EXP", net.elementwise("PROD", x, x)), 2.0)
    return net.where(net.elementwise("LESS", x, 0.0), net.elementwise("SUB", growth, tail), tail)


@formula(aten.special_ndtri.default)
def ndtri(net: Network, p: Tensor) -> Tensor:
    """The inverse of `erfc(u) / 2` for the smaller of `p` and `1 - p`, by a fit and two of Newton's steps."""
    small = extreme(net, p, net.elementwise("SUB", 1.0, p), "LESS")
    y = net.elementwise("SUB", 1.0, net.elementwise("PROD", small, 2.0))
    square = net.elementwise("PROD", y, y)
    middle = net.elementwise("DIV", polynomial(net, square, ERFINV_MIDDLE[0]), with_one(net, square, ERFINV_MIDDLE[1]))
    root = net.unary("SQRT", net.unary("NEG", net.unary("LOG", small)))
    end = net.elementwise("DIV", polynomial(net, root, ERFINV_END[0]), with_one(net, root, ERFINV_END[1]))
    u = net.where(net.elementwise("GREATER", y, 0.7), end, net.elementwise("PROD", middle, y))
    for _ in range(2):
        gap = net.elementwise("SUB", erfc(net, u), net.elementwise("PROD", small, 2.0))
        slope = net.elementwise(
            "PROD", net.unary("EXP", net.unary("NEG", net.elementwise("PROD", u, u))), 2 / math.sqrt(math.pi)
        )
        u = net.elementwise("SUM", u, net.elementwise("DIV", gap, slope))
    x = net.elementwise("PROD", u, math.sqrt(2))
    x = net.where(net.elementwise("EQUAL", small, 0.0), math.inf, x)
    return net.where(net.elementwise("LESS", p, 0.5), net.unary("NEG", x), x)
