"""Rules for complex numbers, element by element: arithmetic, functions, comparisons, casts and creation.

The formulas are those of torch's own kernels where rounding, overflow, infinities or the side of a branch cut show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.pairs import Number, Operand, Pair, both, dtype_of, pair, parts, real_dtype, rule
from trt_dynamo.lowering.recording import REAL_OF

aten = torch.ops.aten

LARGEST_POWER = 16


# -- parts ------------------------------------------------------------------------------------------------------------


@rule(aten.view_as_real.default)
def view_as_real(x: Pair) -> torch.Tensor:
    return x.value


@rule(aten.view_as_complex.default)
def view_as_complex(x: torch.Tensor) -> Pair:
    return Pair(x)


@rule(aten.real.default)
def real(x: Pair) -> torch.Tensor:
    return x.re


@rule(aten.imag.default)
def imag(x: Pair) -> torch.Tensor:
    return x.im


@rule(aten.complex.default)
def complex_of(re: torch.Tensor, im: torch.Tensor) -> Pair:
    return pair(re, im)


@rule(aten.polar.default)
def polar(length: torch.Tensor, angle: torch.Tensor) -> Pair:
    return pair(length * angle.cos(), length * angle.sin())


@rule(aten._conj.default, aten.conj.default, aten._conj_physical.default, aten.conj_physical.default)
def conj(x: Pair) -> Pair:
    return pair(x.re, -x.im)


@rule(aten._neg_view.default, aten.neg.default, aten.negative.default)
def neg(x: Operand) -> Operand:
    return Pair(-x.value) if isinstance(x, Pair) else -x


@rule(aten.resolve_conj.default, aten.resolve_neg.default, aten.alias.default, aten.detach.default)
def same(x: Operand) -> Operand:
    return x


@rule(aten.abs.default)
def absolute(x: Pair) -> torch.Tensor:
    return torch.hypot(x.re, x.im)


@rule(aten.angle.default)
def angle(x: Pair) -> torch.Tensor:
    return torch.atan2(x.im, x.re)


@rule(aten.sgn.default)
def sgn(x: Pair) -> Pair:
    length = absolute(x).unsqueeze(-1)
    return Pair(torch.where(length == 0, 0.0, x.value / length))


# -- arithmetic -------------------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add.Scalar)
def add(a: Operand, b: Operand, alpha: Number = 1) -> Pair:
    b = b if alpha == 1 else mul(b, alpha)
    if isinstance(a, Pair) and isinstance(b, Pair):
        return Pair(a.value + b.value)
    (ar, ai), (br, bi) = both(a, b)
    return pair(ar + br, ai + bi)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(a: Operand, b: Operand, alpha: Number = 1) -> Pair:
    b = b if alpha == 1 else mul(b, alpha)
    if isinstance(a, Pair) and isinstance(b, Pair):
        return Pair(a.value - b.value)
    (ar, ai), (br, bi) = both(a, b)
    return pair(ar - br, ai - bi)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(a: Operand, b: Operand, alpha: Number = 1) -> Pair:
    return sub(b, a, alpha)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(a: Operand, b: Operand) -> Any:
    """With all four products, though one part may be a plain zero: infinities times zero are NaN in eager too."""
    if not isinstance(a, Pair | torch.Tensor) and not isinstance(b, Pair | torch.Tensor):
        return a * b
    (ar, ai), (br, bi) = both(a, b)
    return pair(ar * br - ai * bi, ar * bi + ai * br)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(a: Operand, b: Operand) -> Pair:
    """Both are divided by the divisor's larger part first, so that no square overflows."""
    if not isinstance(b, Pair):
        (ar, ai), (br, bi) = both(a, b)
        if isinstance(bi, float) and bi == 0.0:
            return pair((ar + ai * bi) / br, (ai - ar * bi) / br)
        b = full_like(torch.empty((), dtype=dtype_of(a)), complex(br, bi), dtype=torch.complex64)
    (ar, ai), (br, bi) = both(a, b)
    scale = torch.maximum(br.abs(), bi.abs())
    br, bi = br / scale, bi / scale
    ar, ai = ar / scale, ai / scale
    length = br * br + bi * bi
    return pair((ar * br + ai * bi) / length, (ai * br - ar * bi) / length)


@rule(aten.reciprocal.default)
def reciprocal(x: Pair) -> Pair:
    return div(1.0, x)


@rule(aten.square.default)
def square(x: Pair) -> Pair:
    result: Pair = mul(x, x)
    return result


@rule(aten.pow.Tensor_Scalar)
def power(x: Operand, exponent: Number) -> Pair:
    """Whole exponents, by squaring."""
    if not isinstance(x, Pair) or isinstance(exponent, complex) or int(exponent) != exponent:
        raise Unsupported("a power of complex numbers whose exponent is not a whole number")
    n = abs(int(exponent))
    if n == 0 or n > LARGEST_POWER:
        raise Unsupported(f"a power of complex numbers with an exponent outside of 1 to {LARGEST_POWER}")
    result, factor = None, x
    while n:
        if n & 1:
            result = factor if result is None else mul(result, factor)
        n >>= 1
        factor = square(factor) if n else factor
    assert result is not None
    return reciprocal(result) if exponent < 0 else result


# -- functions --------------------------------------------------------------------------------------------------------


@rule(aten.exp.default)
def exp(x: Pair) -> Pair:
    return polar(x.re.exp(), x.im)


@rule(aten.log.default)
def log(x: Pair) -> Pair:
    return pair(absolute(x).log(), angle(x))


@rule(aten.log2.default)
def log2(x: Pair) -> Pair:
    return Pair(log(x).value * (1 / math.log(2)))


@rule(aten.log10.default)
def log10(x: Pair) -> Pair:
    return Pair(log(x).value * (1 / math.log(10)))


@rule(aten.sqrt.default)
def sqrt(x: Pair) -> Pair:
    """The root with a real part that is not negative; the larger part comes first, and the other from it."""
    large = (0.5 * x.re.abs() + 0.5 * absolute(x)).sqrt()
    small = torch.where(large == 0, 0.0, x.im.abs() / (2 * large))
    right = x.re >= 0
    return pair(torch.where(right, large, small), torch.copysign(torch.where(right, small, large), x.im))


@rule(aten.rsqrt.default)
def rsqrt(x: Pair) -> Pair:
    return reciprocal(sqrt(x))


@rule(aten.sin.default)
def sin(x: Pair) -> Pair:
    return pair(x.re.sin() * x.im.cosh(), x.re.cos() * x.im.sinh())


@rule(aten.cos.default)
def cos(x: Pair) -> Pair:
    return pair(x.re.cos() * x.im.cosh(), -(x.re.sin() * x.im.sinh()))


@rule(aten.sinh.default)
def sinh(x: Pair) -> Pair:
    return pair(x.re.sinh() * x.im.cos(), x.re.cosh() * x.im.sin())


@rule(aten.cosh.default)
def cosh(x: Pair) -> Pair:
    return pair(x.re.cosh() * x.im.cos(), x.re.sinh() * x.im.sin())


@rule(aten.tanh.default)
def tanh(x: Pair) -> Pair:
    """Beyond 8 (in float32) the real part is 1, long before its squares overflow."""
    re = x.re.clamp(-8.0, 8.0) if x.dtype is torch.float16 else x.re.clamp(-20.0, 20.0)
    length = x.im.cos().square() + re.sinh().square()
    return pair(re.sinh() * re.cosh() / length, x.im.sin() * x.im.cos() / length)


@rule(aten.tan.default)
def tan(x: Pair) -> Pair:
    turned = tanh(pair(-x.im, x.re))
    return pair(turned.im, -turned.re)


@rule(aten.sigmoid.default)
def sigmoid(x: Pair) -> Pair:
    return reciprocal(add(exp(Pair(-x.value)), 1.0))


@rule(aten.silu.default)
def silu(x: Pair) -> Pair:
    return div(x, add(exp(Pair(-x.value)), 1.0))


@rule(aten.sinc.default)
def sinc(x: Pair) -> Pair:
    turned = Pair(x.value * math.pi)
    zero = absolute(x).unsqueeze(-1) == 0
    one = full_pair(1.0, x).value
    return Pair(torch.where(zero, one, div(sin(turned), turned).value))


# -- choices ----------------------------------------------------------------------------------------------------------


def full_pair(x: Operand, like: Pair) -> Pair:
    """An operand as a pair; a number becomes a tensor without dims."""
    if isinstance(x, Pair):
        return x
    dtype = like.dtype
    if isinstance(x, torch.Tensor):
        return pair(x.to(dtype), 0.0)
    return Pair(torch.stack([torch.full((), part, dtype=dtype, device=like.value.device) for part in parts(x, dtype)]))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(mask: torch.Tensor, a: Operand, b: Operand) -> Pair:
    like = next((x for x in (a, b) if isinstance(x, Pair)), None)
    if like is None:
        raise Unsupported("a choice between a complex number and reals")
    a, b = full_pair(a, like), full_pair(b, like)
    return Pair(torch.where(mask.unsqueeze(-1), a.value, b.value))


@rule(aten.eq.Tensor, aten.eq.Scalar)
def eq(a: Operand, b: Operand) -> torch.Tensor:
    (ar, ai), (br, bi) = both(a, b)
    return torch.logical_and(torch.eq(ar, br), torch.eq(ai, bi) if isinstance(ai, torch.Tensor) else torch.eq(bi, ai))


@rule(aten.ne.Tensor, aten.ne.Scalar)
def ne(a: Operand, b: Operand) -> torch.Tensor:
    return torch.logical_not(eq(a, b))


@rule(aten.isnan.default)
def isnan(x: Pair) -> torch.Tensor:
    return torch.logical_or(x.re.isnan(), x.im.isnan())


@rule(aten.isinf.default)
def isinf(x: Pair) -> torch.Tensor:
    return torch.logical_or(x.re.isinf(), x.im.isinf())


def truth(x: Operand) -> torch.Tensor:
    """Which elements are not zero."""
    if isinstance(x, Pair):
        return torch.logical_or(x.re != 0, x.im != 0)
    assert isinstance(x, torch.Tensor)
    return x.to(torch.bool)


def logical(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *operands: function(*map(truth, operands))


rule(aten.logical_not.default)(logical(torch.logical_not))
rule(aten.logical_and.default)(logical(torch.logical_and))
rule(aten.logical_or.default)(logical(torch.logical_or))
rule(aten.logical_xor.default)(logical(torch.logical_xor))


# -- casts and creation -----------------------------------------------------------------------------------------------


@rule(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def to_copy(x: Operand, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    """A complex number as a real one is its real part, as a bool whether it is not zero."""
    if not isinstance(x, Pair):
        assert isinstance(x, torch.Tensor)
        return pair(x.to(device=device, dtype=real_dtype(dtype)), 0.0)
    if dtype is None or dtype in REAL_OF:
        return Pair(x.value.to(device=device, dtype=real_dtype(dtype), copy=True))
    return (truth(x) if dtype is torch.bool else x.re).to(device=device, dtype=dtype)


def filled(make: Callable[..., torch.Tensor], value: Number) -> Pair:
    """A pair of two constant parts; `make` gives a real tensor full of a number."""
    re, im = complex(value).real, complex(value).imag
    return Pair(torch.stack([make(re), make(im)], -1))


@rule(aten.full.default)
def full(size: Any, value: Number, *, dtype: Any = None, device: Any = None, **_: Any) -> Pair:
    real = real_dtype(dtype or torch.complex64)
    return filled(lambda part: torch.full(size, part, dtype=real, device=device), value)


@rule(aten.scalar_tensor.default)
def scalar_tensor(value: Number, *, dtype: Any = None, device: Any = None, **_: Any) -> Pair:
    return full((), value, dtype=dtype, device=device)


@rule(aten.full_like.default)
def full_like(x: Operand, value: Number, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if isinstance(x, Pair) and dtype is not None and dtype not in REAL_OF:
        return torch.full_like(x.re, complex(value).real, dtype=dtype, device=device)
    like = x.re if isinstance(x, Pair) else x
    return filled(lambda part: torch.full_like(like, part, dtype=real_dtype(dtype), device=device), value)  # type: ignore[arg-type]


@rule(aten.empty.memory_format, aten.empty_permuted.default, aten.empty_strided.default)
def empty(size: Any, *_order: Any, dtype: Any = None, device: Any = None, **_: Any) -> Pair:
    return Pair(torch.empty([*size, 2], dtype=real_dtype(dtype), device=device))
