"""Functions of one or two floats that no single layer computes, each by a formula that holds over the whole line.

The half types are computed in float32 and rounded once, as torch does it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import copysign, extreme, signbit
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

Formula = Callable[..., Tensor]


def formula(*targets: OpOverload) -> Callable[[Formula], Formula]:
    """Registers a function of floats: it gets its tensors as floats, the half types as float32; its result is rounded.

    The function itself stays as it is, for use within another formula.
    """

    def register(function: Formula) -> Formula:
        @functools.wraps(function)
        def rounded_once(net: Network, **arguments: Any) -> Tensor:
            dtype = net.result_dtype()
            given = {k: net.wide(net.cast(v, dtype)) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            return net.cast(function(net, **given), dtype)

        converter(*targets)(rounded_once)
        return function

    return register


def polynomial(net: Network, x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The sum of `coefficients[i] * x ** i`, by Horner's rule."""
    total = net.elementwise("PROD", x, coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        total = net.elementwise("PROD", net.elementwise("SUM", total, coefficient), x)
    return net.elementwise("SUM", total, coefficients[0])


# -- exponentials and logarithms ---------------------------------------------------------------------------------------


@formula(aten.rsqrt.default)
def rsqrt(net: Network, x: Tensor) -> Tensor:
    return net.unary("RECIP", net.unary("SQRT", x))


@formula(aten.exp2.default)
def exp2(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("POW", 2.0, x)


@formula(aten.expm1.default)
def expm1(net: Network, x: Tensor) -> Tensor:
    """`tanh(x / 2) * (exp(x) + 1)`: nothing cancels near zero."""
    half = net.activation("TANH", net.elementwise("PROD", x, 0.5))
    return net.elementwise("PROD", half, net.elementwise("SUM", net.unary("EXP", x), 1.0))


@formula(aten.log1p.default)
def log1p(net: Network, x: Tensor) -> Tensor:
    """`log(1 + x)`, less what rounding `1 + x` left out: `log(u) * x / (u - 1)` for the rounded `u` (W. Kahan)."""
    u = net.elementwise("SUM", x, 1.0)
    log, step = net.unary("LOG", u), net.elementwise("SUB", u, 1.0)
    plain = net.elementwise("OR", net.elementwise("EQUAL", step, 0.0), net.unary("ISINF", u))
    mended = net.elementwise("PROD", log, net.elementwise("DIV", x, net.where(plain, 1.0, step)))
    # Where `u` is 1 the result is `x` itself; where it is infinite, the logarithm.
    return net.where(plain, net.where(net.unary("ISINF", u), log, x), mended)


@formula(aten.log2.default)
def log2(net: Network, x: Tensor) -> Tensor:
    return logarithm(net, x, 2.0)


@formula(aten.log10.default)
def log10(net: Network, x: Tensor) -> Tensor:
    return logarithm(net, x, 10.0)


def logarithm(net: Network, x: Tensor, base: float) -> Tensor:
    """Exact at whole powers of the base, where a floor or a ceil may follow."""
    found = net.elementwise("PROD", net.unary("LOG", x), 1 / math.log(base))
    whole = net.unary("ROUND", found)
    return net.where(net.elementwise("EQUAL", net.elementwise("POW", base, whole), x), whole, found)


@formula(aten.logaddexp.default)
def logaddexp(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`max(a, b) + log1p(exp(-|a - b|))`; equal infinities are their own sum."""
    larger = extreme(net, a, b, "GREATER")
    gap = net.unary("ABS", net.elementwise("SUB", a, b))
    total = net.elementwise("SUM", larger, log1p(net, net.unary("EXP", net.unary("NEG", gap))))
    return net.where(equal_infinities(net, a, b), a, total)


@formula(aten.logaddexp2.default)
def logaddexp2(net: Network, a: Tensor, b: Tensor) -> Tensor:
    larger = extreme(net, a, b, "GREATER")
    gap = net.unary("ABS", net.elementwise("SUB", a, b))
    rest = net.elementwise("PROD", log1p(net, exp2(net, net.unary("NEG", gap))), 1 / math.log(2))
    return net.where(equal_infinities(net, a, b), a, net.elementwise("SUM", larger, rest))


def equal_infinities(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return net.elementwise("AND", net.unary("ISINF", a), net.elementwise("EQUAL", a, b))


# -- angles ------------------------------------------------------------------------------------------------------------


@formula(aten.atan2.default)
def atan2(net: Network, y: Tensor, x: Tensor) -> Tensor:
    """The arc of the smaller over the larger size, put into its octant; zeros and infinities have signs."""
    rise, run = net.unary("ABS", y), net.unary("ABS", x)
    steep = net.elementwise("GREATER", rise, run)
    small, large = net.where(steep, run, rise), net.where(steep, rise, run)
    same = net.elementwise("EQUAL", rise, run)
    ratio = net.elementwise("DIV", small, large)
    # 0/0 counts as 0, inf/inf as 1.
    alike = net.cast(net.elementwise("GREATER", rise, 0.0), x.dtype)
    arc = net.unary("ATAN", net.where(same, alike, ratio))
    arc = net.where(steep, net.elementwise("SUB", math.pi / 2, arc), arc)
    arc = net.where(signbit(net, x), net.elementwise("SUB", math.pi, arc), arc)
    return net.where(signbit(net, y), net.unary("NEG", arc), arc)


@formula(aten.hypot.default)
def hypot(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`large * sqrt(1 + (small / large) ** 2)`, which does not overflow; infinite beside anything infinite, NaN too."""
    a, b = net.unary("ABS", a), net.unary("ABS", b)
    small, large = extreme(net, a, b, "LESS"), extreme(net, a, b, "GREATER")
    ratio = net.elementwise("DIV", small, net.where(net.elementwise("EQUAL", large, 0.0), 1.0, large))
    root = net.unary("SQRT", net.elementwise("SUM", net.elementwise("PROD", ratio, ratio), 1.0))
    infinite = net.elementwise("OR", net.unary("ISINF", a), net.unary("ISINF", b))
    return net.where(infinite, math.inf, net.elementwise("PROD", large, root))


@formula(aten.sinc.default)
def sinc(net: Network, x: Tensor) -> Tensor:
    angle = net.elementwise("PROD", x, math.pi)
    zero = net.elementwise("EQUAL", x, 0.0)
    return net.where(zero, 1.0, net.elementwise("DIV", net.unary("SIN", angle), net.where(zero, 1.0, angle)))


# -- the error function and its kin ------------------------------------------------------------------------------------

# Chebyshev's fit to log(erfc(x) / t) + x*x for t = 1 / (1 + x/2), relative error below 1.2e-7 (Numerical Recipes, 6.2).
ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip

# Rational fits to the inverse of erf, for the middle and the ends.
ERFINV_MIDDLE = (
    (0.886226899, -1.645349621, 0.914624893, -0.140543331),
    (-2.118377725, 1.442710462, -0.329097515, 0.012229801),
)
ERFINV_END = (-1.970840454, -1.624906493, 3.429567803, 1.641345311), (3.543889200, 1.637067800)


def erfc_scaled(net: Network, size: Tensor) -> Tensor:
    """`log(erfc(x)) + x * x` for x of 0 or more; `t` goes to 0 with `1/x`."""
    t = net.unary("RECIP", net.elementwise("SUM", net.elementwise("PROD", size, 0.5), 1.0))
    return net.elementwise("SUM", polynomial(net, t, ERFC), net.unary("LOG", t))


@formula(aten.erfc.default)
def erfc(net: Network, x: Tensor) -> Tensor:
    """`1 - erf(x)` but for large x, of which it would leave nothing."""
    size = net.unary("ABS", x)
    tail = net.unary("EXP", net.elementwise("SUB", erfc_scaled(net, size), net.elementwise("PROD", size, size)))
    near = net.elementwise("SUB", 1.0, net.unary("ERF", x))
    return net.where(net.elementwise("GREATER", x, 0.5), tail, near)


@formula(aten.erfinv.default)
def erfinv(net: Network, y: Tensor) -> Tensor:
    """A rational fit, then two of Newton's steps; plus or minus infinity at plus or minus 1, NaN beyond."""
    size = net.unary("ABS", y)
    square = net.elementwise("PROD", y, y)
    middle = net.elementwise(
        "PROD",
        y,
        net.elementwise("DIV", polynomial(net, square, ERFINV_MIDDLE[0]), with_one(net, square, ERFINV_MIDDLE[1])),
    )
    root = net.unary(
        "SQRT", net.unary("NEG", net.unary("LOG", net.elementwise("PROD", net.elementwise("SUB", 1.0, size), 0.5)))
    )
    end = net.elementwise("DIV", polynomial(net, root, ERFINV_END[0]), with_one(net, root, ERFINV_END[1]))
    x = net.where(net.elementwise("GREATER", size, 0.7), copysign(net, end, y), middle)
    for _ in range(2):
        slope = net.elementwise(
            "PROD", net.unary("EXP", net.unary("NEG", net.elementwise("PROD", x, x))), 2 / math.sqrt(math.pi)
        )
        x = net.elementwise("SUB", x, net.elementwise("DIV", net.elementwise("SUB", net.unary("ERF", x), y), slope))
    outside = net.where(
        net.elementwise("EQUAL", size, 1.0), copysign(net, net.full((), math.inf, y.dtype), y), math.nan
    )
    return net.where(net.elementwise("LESS", size, 1.0), x, outside)


def with_one(net: Network, x: Tensor, coefficients: Sequence[float]) -> Tensor:
    return polynomial(net, x, (1.0, *coefficients))
