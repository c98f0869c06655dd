"""Elementwise converters against eager: every dtype, NaN, infinities, signed zeros, numbers beside tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trt_dynamo.testing import check, refused

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)

EDGES = torch.tensor(
    [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, -3.5, 1e-6, -1e-6, 7.25, -7.0, 3e4]
)


def sample(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)
    low = 0 if dtype is torch.uint8 else -100
    return torch.randint(low, 100, shape, generator=generator, dtype=dtype)


def pairs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Each edge beside each edge."""
    left, right = zip(*itertools.product(EDGES.tolist(), repeat=2), strict=True)
    return torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)


both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


# -- one operand -------------------------------------------------------------------------------------------------------

ANY_NUMBER: dict[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "square": torch.square,
    "positive": torch.positive,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "signbit": torch.signbit,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "trunc": torch.trunc,
    "round": torch.round,
    "angle": torch.angle,
    "logical_not": torch.logical_not,
}

FLOAT_RESULT: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in (
        "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan sinh cosh tanh asin acos atan asinh "
        "acosh atanh erf erfc sigmoid sinc deg2rad rad2deg"
    ).split()
}


@both
@pytest.mark.parametrize("name", ANY_NUMBER)
def test_numbers(name: str, dynamic: bool) -> None:
    function = ANY_NUMBER[name]
    check(function, EDGES, dynamic=dynamic)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        check(function, sample(dtype, 3, 4), dynamic=dynamic)
    check(function, sample(torch.float16, 2, 3), dynamic=dynamic)


@both
@pytest.mark.parametrize("name", FLOAT_RESULT)
def test_functions_of_floats(name: str, dynamic: bool) -> None:
    function = FLOAT_RESULT[name]
    check(function, EDGES[EDGES.abs().nan_to_num(0) < 100], dynamic=dynamic)
    check(function, torch.tensor([math.nan, math.inf, -math.inf]), dynamic=dynamic)
    check(function, torch.rand(3, 4) * 0.9 + 0.05, dynamic=dynamic)
    for dtype in (torch.float16, torch.bfloat16):
        check(function, torch.linspace(0.05, 0.95, 12).to(dtype), dynamic=dynamic, rtol=1e-2, atol=1e-3)
    if name not in ("atanh", "asin", "acos"):
        check(function, torch.tensor([1, 2, 3]), dynamic=dynamic)


def test_what_is_lost_near_zero_is_not() -> None:
    small = torch.tensor([1e-9, -1e-9, 3e-8, 1e-6, -1e-5, 1e-3, -0.3])
    check(lambda x: (torch.log1p(x), torch.expm1(x)), small, rtol=1e-6, atol=0)


def test_logarithms_are_exact_at_whole_powers() -> None:
    twos = torch.tensor([2.0**i for i in range(-20, 30)])
    check(lambda x: torch.floor(torch.log2(x)), twos, rtol=0, atol=0)
    check(
        lambda x: torch.floor(torch.log10(x)), torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7]), rtol=0, atol=0
    )


@pytest.mark.parametrize("decimals", [0, 1, 3, -1, -2])
def test_round_to_decimals(decimals: int) -> None:
    check(
        lambda x: torch.round(x, decimals=decimals), torch.tensor([1.25, -1.35, 123.456, 150.0, 250.0, -0.05, math.nan])
    )


@pytest.mark.parametrize("name", ["isposinf", "isneginf", "nan_to_num", "frac", "logit"])
def test_derived(name: str) -> None:
    function = getattr(torch, name)
    check(function, torch.tensor([math.nan, math.inf, -math.inf, 0.3, 0.9]) if name != "frac" else EDGES[3:])


# -- two operands ------------------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "copysign": torch.copysign,
    "heaviside": torch.heaviside,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
    "logaddexp2": torch.logaddexp2,
    "xlogy": torch.xlogy,
}
OF_EQUAL_TYPES = ("heaviside",)
FLOATS_ONLY = ("hypot", "logaddexp", "logaddexp2")


@both
@pytest.mark.parametrize("name", BINARY)
def test_edges_beside_edges(name: str, dynamic: bool) -> None:
    if name == "copysign":  # the sign of a NaN is nobody's business
        left, right = (x[~pairs()[1].isnan()] for x in pairs())
        check(torch.copysign, left, right, dynamic=dynamic)
    else:
        check(BINARY[name], *pairs(), dynamic=dynamic)


@pytest.mark.parametrize("name", sorted(set(BINARY) - set(FLOATS_ONLY)))
def test_types_are_promoted(name: str) -> None:
    function = BINARY[name]
    kinds = [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]
    for left, right in [(a, a) for a in kinds] if name in OF_EQUAL_TYPES else itertools.product(kinds, kinds):
        if name == "sub" and torch.bool in (left, right):
            continue
        check(
            function,
            sample(left, 2, 1, 3),
            sample(right, 4, 1, seed=1).abs() + 1 if right is not torch.bool else sample(right, 4, 1),
            rtol=2e-3 if torch.float16 in (left, right) else None,
            atol=2e-3 if torch.float16 in (left, right) else None,
            build_engines=left is right,
        )


SCALARS: dict[str, Callable[[torch.Tensor], Any]] = {
    "x + 2": lambda x: x + 2,
    "x + 1.5": lambda x: x + 1.5,
    "1 - x": lambda x: 1 - x,
    "2.5 - x": lambda x: 2.5 - x,
    "x * 3": lambda x: x * 3,
    "x * 0.1": lambda x: x * 0.1,
    "x / 4": lambda x: x / 4,
    "7 / x": lambda x: 7 / (x + 101),
    "x > 1": lambda x: x > 1,
    "x <= 0.5": lambda x: x <= 0.5,
    "2 >= x": lambda x: x <= 2,
    "x == 1": lambda x: x == 1,
    "x != 1": lambda x: x != 1,
    "add alpha": lambda x: torch.add(x, x, alpha=2),
    "sub alpha": lambda x: torch.sub(x, x, alpha=3),
    "rsub": lambda x: torch.rsub(x, 5, alpha=2),
    "where": lambda x: torch.where(x > 1, x, 0),
    "where numbers": lambda x: torch.where(x > 1, 1.5, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 3),
    "0-d": lambda x: x + torch.tensor(2.5),
    "bool + ": lambda x: (x > 1) + x,
}


@both
@pytest.mark.parametrize("name", SCALARS)
def test_numbers_beside_tensors(name: str, dynamic: bool) -> None:
    for dtype in (torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8):
        check(SCALARS[name], sample(dtype, 2, 3), dynamic=dynamic, build_engines=dtype is torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_that_the_half_types_cannot_hold(dtype: torch.dtype) -> None:
    """Masks are made this way: 0 times a number that is infinite in float16 would be NaN."""
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype)
    check(lambda m: (1.0 - m) * -1e9, keep)
    check(lambda x: (x * 1e-7) * 1e7, keep, rtol=1e-2, atol=1e-2)
    check(lambda x: (x + 1e-8, x / 1e-8, x / 1e6), keep)


def test_small_integers_wrap() -> None:
    high = torch.tensor([200, 255, 1, 0, 128], dtype=torch.uint8)
    check(lambda x: (x + 100, x - 1, x * 3, -x, x + x, ~x), high)
    signed = torch.tensor([-128, 127, 100, -1], dtype=torch.int8)
    check(lambda x: (x + 100, -x, x * 3, x.abs(), ~x, x.to(torch.uint8)), signed)


def test_large_integers_stay_exact() -> None:
    large = torch.tensor([2**53 + 1, -(2**53) - 1, 2**62, 2**31 + 7])
    check(lambda x: (x + 1, x - 3, x * 2, x == 2**53 + 1, x > 2**53, x // 3, x % 1000, torch.maximum(x, x - 1)), large)


# -- powers ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 5, 16, 17, -1, -2, 0.5, -0.5, 1.5, 2.0, -3.0])
def test_powers_of_floats(exponent: float, dynamic: bool) -> None:
    check(
        lambda x: x**exponent, torch.tensor([-2.0, -1.5, -0.0, 0.0, 0.5, 1.0, 3.0, math.nan, math.inf]), dynamic=dynamic
    )
    check(lambda x: x**exponent, torch.linspace(0.5, 1.5, 6).half(), dynamic=dynamic)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_powers_of_integers(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 2, 3, 5], dtype=dtype)
    check(lambda x: (x**0, x**1, x**2, x**3, x**0.5, 2**x, 2.0**x, x**x), x)


def test_powers_of_tensors() -> None:
    check(
        torch.pow, torch.tensor([2.0, -2.0, 0.0, 9.0, -8.0, 1.0]), torch.tensor([3.0, 3.0, 0.0, 0.5, 1 / 3, math.nan])
    )
    check(torch.pow, sample(torch.float32, 3, 1).abs(), sample(torch.float32, 4), dynamic=True)
    check(lambda x: x ** x.shape[0], sample(torch.float32, 3, 2), dynamic=True)


# -- clamps ------------------------------------------------------------------------------------------------------------

CLAMPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "both": lambda x: x.clamp(-1, 2),
    "low": lambda x: x.clamp(min=0),
    "high": lambda x: x.clamp(max=1),
    "floats": lambda x: x.clamp(-0.5, 0.5),
    "crossed": lambda x: x.clamp(3, -3),
    "infinite": lambda x: x.clamp(-math.inf, math.inf),
    "nan": lambda x: x.clamp(min=math.nan),
    "clip": lambda x: torch.clip(x, 0, 1),
    "size": lambda x: x.clamp(max=x.shape[0] - 1),
}


if not torch.zeros(100).clamp(min=math.nan).isnan().all():
    del CLAMPS["nan"]  # torch 2.11's vectorized kernel ignores such a bound, its scalar one does not


@both
@pytest.mark.parametrize("name", CLAMPS)
def test_clamps(name: str, dynamic: bool) -> None:
    check(CLAMPS[name], EDGES, dynamic=dynamic)
    check(CLAMPS[name], sample(torch.float16, 2, 3), dynamic=dynamic)
    if name not in ("nan", "infinite"):
        check(CLAMPS[name], sample(torch.int64, 2, 3), dynamic=dynamic)


def test_clamps_by_tensors() -> None:
    low, high = torch.tensor([-1.0, math.nan, 0.0, 2.0]), torch.tensor([1.0, 1.0, math.nan, -2.0])
    check(torch.clamp, torch.tensor([[-3.0], [math.nan], [0.5]]), low, high)
    check(lambda x, y: x.clamp(min=y), sample(torch.int32, 3), sample(torch.int64, 2, 3))


# -- division ----------------------------------------------------------------------------------------------------------

DIVISIONS: dict[str, Callable[..., Any]] = {
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "none": lambda a, b: torch.div(a, b, rounding_mode=None),
    "floor_divide": torch.floor_divide,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
}


@both
@pytest.mark.parametrize("name", DIVISIONS)
def test_divisions_of_floats(name: str, dynamic: bool) -> None:
    check(DIVISIONS[name], *pairs(), dynamic=dynamic)
    check(DIVISIONS[name], sample(torch.float32, 200, seed=3) * 50, sample(torch.float32, 200, seed=4), dynamic=dynamic)


@pytest.mark.parametrize("name", ["remainder", "fmod", "floor_divide"])
def test_rests_are_exact(name: str) -> None:
    """The quotient's own rounding must not show: 1.0 // 0.1 is 9, and its rest 0.1 less a little."""
    a = torch.tensor([1.0, -1.0, 0.3, 0.7, 1e6, 123456.78, 5.9999995, 3e6, 1e7])
    b = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 2.0, 0.7, 3.3])
    check(DIVISIONS[name], a, b, rtol=0, atol=0)
    check(lambda x: (x % 0.1, x // 0.1), a[:5], rtol=0, atol=0)


@both
@pytest.mark.parametrize("name", DIVISIONS)
def test_divisions_of_integers(name: str, dynamic: bool) -> None:
    for dtype in INTEGERS:
        divisor = torch.tensor([1, 2, 3, 7, 5, 100], dtype=dtype)
        divisor = torch.cat([divisor, -divisor]) if dtype is not torch.uint8 else divisor.repeat(2)
        check(DIVISIONS[name], sample(dtype, 12), divisor, dynamic=dynamic)
    check(lambda x: (x // 3, x % 3, x // -3, x % -3), torch.tensor([7, -7, 6, -6, 0]), dynamic=dynamic)


# -- bits --------------------------------------------------------------------------------------------------------------

BITS: dict[str, Callable[..., Any]] = {
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}
MASKS = (0, 1, 2, 7, 0b101101, 127, -1, -2, -8, -128, 63)


@pytest.mark.parametrize("name", BITS)
def test_bits(name: str) -> None:
    function = BITS[name]
    check(function, sample(torch.bool, 8), sample(torch.bool, 8, seed=1))
    for dtype in INTEGERS:
        check(function, sample(dtype, 5, 1), sample(dtype, 6, seed=1))
        for mask in MASKS:
            if mask >= 0 or dtype is not torch.uint8:
                check(lambda x, mask=mask: function(x, mask), sample(dtype, 20), build_engines=mask == 7)
    wide = torch.tensor([2**62 + 5, -(2**62) - 7, -1, 2**63 - 1, -(2**63), 12345678901])
    check(
        lambda x: (function(x, 2**62 - 1), function(x, 2**40 + 3), function(x, -(2**50)), function(x, x.flip(0))), wide
    )
    check(lambda x: (function(x, 0x7FFFFFFF), function(x, 0x0F0F0F0F)), wide.to(torch.int32))


@both
def test_bits_of_bools_and_masks(dynamic: bool) -> None:
    check(lambda a, b: (a & b, a | b, a ^ b, ~a), sample(torch.bool, 3, 4), sample(torch.bool, 4), dynamic=dynamic)
    check(lambda x: (x & 0xFF, x | 1, x ^ -1, ~x), sample(torch.int64, 3, 4), dynamic=dynamic)


def test_bits_of_many_elements_are_refused() -> None:
    with refused("bitwise logic of integer tensors"):
        check(torch.bitwise_and, torch.zeros(10**6, dtype=torch.int64), torch.zeros(10**6, dtype=torch.int64))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_shifts(dtype: torch.dtype) -> None:
    x, places = sample(dtype, 9), torch.tensor([0, 1, 2, 3, 5, 7, 8, 31, 63], dtype=dtype)
    check(lambda a, b: (a << b, a >> b), x, places)
    check(lambda a: (a << 2, a >> 2, a >> 7, 1 << (a % 5)), x)


def test_shifts_of_large_numbers() -> None:
    x = torch.tensor([-1, -(2**63), 2**63 - 1, -(2**40) - 1, 2**62])
    check(lambda x: (x >> 63, x >> 62, x >> 1, x << 1, x << 63, x >> 40), x)


# -- shapes ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "shapes", [((), ()), ((1,), ()), ((0,), (1,)), ((3, 0), (1, 1)), ((2, 1, 3), (4, 1)), ((1, 1), (5, 1, 1, 2))]
)
def test_broadcasts(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    a, b = (sample(torch.float32, *shape) for shape in shapes)
    check(
        lambda a, b: (a + b, a > b, torch.maximum(a, b), torch.where(a > b, a, b), a % 0.7, torch.atan2(a, b)),
        a,
        b,
        dynamic=dynamic,
    )


def test_strided_operands() -> None:
    x = sample(torch.float32, 4, 6)
    check(lambda x: (x.t() + 1, x[:, ::2] * x[:, 1::2], x.t().clamp(0)), x)
    check(lambda a, b: a + b, x.t(), sample(torch.float32, 6, 4))
