"""Values at the edges, as properties: what TensorRT networks make of NaN, infinities, halves, overflow and mixed types.

Each family is a strategy that draws a call; eager says what the call means.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tests.edges import (
    DTYPES,
    FLOATS,
    INF,
    INTEGERS,
    NAN,
    PLAIN,
    Call,
    assert_agrees,
    broadcast_with,
    edge_values,
    mild_values,
    one_of,
    shapes,
    tensors,
)
from trt_dynamo.testing import check

Function = Callable[..., Any]

# -- one operand -------------------------------------------------------------------------------------------------------

ONE: dict[str, Function] = {
    name: getattr(torch, name)
    for name in (
        "abs neg sign sgn signbit isnan isinf isfinite isposinf isneginf logical_not bitwise_not square positive ceil "
        "floor trunc round frac relu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal atan asinh "
        "erf erfc nan_to_num angle sinc logit"
    ).split()
} | {
    "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "softplus": F.softplus, "logsigmoid": F.logsigmoid, "gelu": F.gelu, "silu": F.silu,
    "elu": F.elu, "selu": F.selu, "celu": F.celu, "mish": F.mish, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink, "softshrink": F.softshrink, "threshold": lambda x: F.threshold(x, 0.5, 9.0),
    "round to 2": lambda x: torch.round(x, decimals=2), "round to -1": lambda x: torch.round(x, decimals=-1),
    "not": lambda x: ~x, "to bool": lambda x: x.bool(), "to half and back": lambda x: x.half().float(),
    "nan_to_num 1": lambda x: torch.nan_to_num(x, 1.0, 2.0, -3.0), "leaky -2": lambda x: F.leaky_relu(x, -2.0),
    "elu 2": lambda x: F.elu(x, 2.0), "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "is zero": lambda x: x == 0, "itself": lambda x: x == x, "not itself": lambda x: x != x,
}  # fmt: skip


@st.composite
def unary(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(ONE))
    return Call(name, function, (draw(tensors(draw(shapes(0, 2)))),))


# -- two operands ------------------------------------------------------------------------------------------------------

TWO: dict[str, Function] = {
    name: getattr(torch, name)
    for name in (
        "add sub mul div maximum minimum fmax fmin eq ne lt le gt ge logical_and logical_or logical_xor atan2 hypot "
        "copysign heaviside xlogy logaddexp nextafter"
    ).split()
    if name != "nextafter"
} | {
    "rsub": torch.rsub, "add 3": lambda a, b: torch.add(a, b, alpha=3), "sub 2": lambda a, b: torch.sub(a, b, alpha=2),
    "where": lambda a, b: torch.where(a > b, a, b), "masked": lambda a, b: torch.where(b != b, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25), "closer": lambda a, b: torch.where(a == b, 1, b),
}  # fmt: skip

# Zero divides nothing here: integers by it are an error in eager, and -1 divides the least integer into none.
DIVISION: dict[str, Function] = {
    "floor_divide": torch.floor_divide, "remainder": torch.remainder, "fmod": torch.fmod, "//": operator.floordiv,
    "%": operator.mod, "/": operator.truediv, "trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
}  # fmt: skip

BITS: dict[str, Function] = {
    "&": operator.and_, "|": operator.or_, "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift,
}  # fmt: skip

NUMBERS = (0, 1, -1, 2, 3, -5, 127, 255, 0.0, 0.5, -2.5, 1e-3, 3.0, True, False)


@st.composite
def operands(draw: st.DrawFn, dtypes: Any = DTYPES, values: Any = edge_values, numbers: Any = NUMBERS) -> list[Any]:
    """Two tensors that broadcast, or one and a Python number or a 0-D tensor, in either order."""
    shape = draw(shapes(0, 3))
    first = draw(tensors(shape, dtypes, values))
    kind = draw(st.sampled_from(["tensor", "same", "0-D", "number"]))
    if kind == "number":
        second = draw(st.sampled_from(list(numbers)))
    elif kind == "same":
        second = draw(tensors(draw(broadcast_with(shape)), [first.dtype], values))
    else:
        second = draw(tensors(draw(broadcast_with(shape)) if kind == "tensor" else [], dtypes, values))
    return [first, second] if draw(st.booleans()) else [second, first]


def applied(name: str, function: Function, given: list[Any]) -> Call:
    """A number among the operands is part of the function, as it is in a user's code."""
    kept = tuple(a for a in given if isinstance(a, torch.Tensor))

    def call(*tensors: torch.Tensor) -> Any:
        left = iter(tensors)
        return function(*[next(left) if isinstance(a, torch.Tensor) else a for a in given])

    beside = "" if len(kept) == len(given) else f" {[a if not isinstance(a, torch.Tensor) else '.' for a in given]}"
    return Call(name + beside, call, kept)


@st.composite
def binary(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(TWO))
    return applied(name, function, draw(operands()))


def divisors(dtype: torch.dtype) -> tuple[Any, ...]:
    if dtype.is_floating_point:
        return (*PLAIN, -0.0, INF, -INF, NAN, 1e4, 3e-3)
    return (1, 2, 3, 5, 7, *((200, 255) if dtype is torch.uint8 else (-2, -3, -7, 100, -128)))


@st.composite
def division(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(DIVISION))
    numbers = (1, 2, 3, -5, 127, 0.5, -2.5, 1e-3, 3.0, True)
    return applied(name, function, draw(operands((*FLOATS, *INTEGERS), divisors, numbers)))


@st.composite
def bitwise(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(BITS))
    dtypes = (*INTEGERS, *([torch.bool] if name in "&|^" else []))
    return applied(name, function, draw(operands(dtypes, edge_values, (0, 1, 3, 7, -2, 8, 31))))


@st.composite
def powers(draw: st.DrawFn) -> Call:
    base = draw(tensors(draw(shapes(0, 2)), (*FLOATS, *INTEGERS), mild_values))
    exponent = draw(st.sampled_from([0, 1, 2, 3, 7, 0.5, -0.5, -1, -2, 0.0, 2.0, 2.5, 17, True]))
    if draw(st.booleans()):
        return Call(f"** {exponent}", lambda x: x**exponent, (base,))
    if draw(st.booleans()):
        return Call(f"{exponent} **", lambda x: exponent**x, (base,))
    other = draw(tensors(draw(broadcast_with(base.shape)), (*FLOATS, *INTEGERS), mild_values))
    return Call("pow", torch.pow, (base, other))


@st.composite
def bounds(draw: st.DrawFn) -> Call:
    """Clamps between numbers or tensors, NaN among them, one of the two missing at times."""
    shape = draw(shapes(0, 3))
    x = draw(tensors(shape))
    numbers = [None, 0, 1, -1, 2, 0.5, -2.5, INF, -INF, NAN]
    if draw(st.booleans()):
        least, most = draw(st.sampled_from(numbers)), draw(st.sampled_from(numbers))
        return Call(f"clamp({least}, {most})", lambda x: torch.clamp(x, least, most), (x,))
    low, high = (draw(tensors(draw(broadcast_with(shape)))) for _ in range(2))
    name, function = draw(
        one_of(
            {
                "both": lambda x, a, b: torch.clamp(x, a, b),
                "min": lambda x, a, b: torch.clamp(x, min=a),
                "max": lambda x, a, b: x.clamp_max(b),
            }
        )
    )
    return Call(f"clamp {name}", function, (x, low, high))


# -- along dims --------------------------------------------------------------------------------------------------------

ALONG: dict[str, Function] = {
    name: functools.partial(lambda f, x, dim, keep: f(x, dim, keepdim=keep), getattr(torch, name))
    for name in "sum mean prod amax amin all any argmax argmin logsumexp var std nansum nanmean var_mean".split()
} | {
    "max": lambda x, dim, keep: torch.max(x, dim, keepdim=keep), "min": lambda x, dim, keep: torch.min(x, dim, keep),
    "softmax": lambda x, dim, keep: x.softmax(dim), "log_softmax": lambda x, dim, keep: x.log_softmax(dim),
    "softmin": lambda x, dim, keep: F.softmin(x, dim), "cumsum": lambda x, dim, keep: x.cumsum(dim),
    "cumprod": lambda x, dim, keep: x.cumprod(dim), "cummax": lambda x, dim, keep: x.cummax(dim),
    "cummin": lambda x, dim, keep: x.cummin(dim), "logcumsumexp": lambda x, dim, keep: x.logcumsumexp(dim),
    "sort": lambda x, dim, keep: x.sort(dim).values, "sort down": lambda x, dim, keep: x.sort(dim, True).values,
    "stable": lambda x, dim, keep: x.sort(dim=dim, stable=True), "norm": lambda x, dim, keep: x.norm(2, dim, keep),
    "norm inf": lambda x, dim, keep: torch.linalg.vector_norm(x, INF, dim, keep),
    "norm 0": lambda x, dim, keep: torch.linalg.vector_norm(x, 0, dim, keep),
    "norm 3": lambda x, dim, keep: torch.linalg.vector_norm(x, 3, dim, keep),
    "median": lambda x, dim, keep: torch.median(x, dim, keep).values,
    "aminmax": lambda x, dim, keep: torch.aminmax(x, dim=dim, keepdim=keep),
    "count_nonzero": lambda x, dim, keep: torch.count_nonzero(x, dim), "diff": lambda x, dim, keep: x.diff(dim=dim),
    "topk": lambda x, dim, keep: x.topk(min(2, x.shape[dim]) if x.ndim else 1, dim).values,
    "least": lambda x, dim, keep: x.topk(x.shape[dim] if x.ndim else 1, dim, largest=False).values,
    "normalize": lambda x, dim, keep: F.normalize(x, dim=dim),
    "mean in float": lambda x, dim, keep: x.mean(dim, dtype=torch.float32),
    "sum in int": lambda x, dim, keep: x.sum(dim, keep, dtype=torch.int32),
}  # fmt: skip

WHOLE: dict[str, Function] = {
    name: getattr(torch, name) for name in "sum mean prod amax amin max min all any argmax argmin std median".split()
}  # fmt: skip


def summable(dtype: torch.dtype) -> tuple[Any, ...]:
    """What a sum does not depend on the order of."""
    return (*PLAIN, NAN, INF, -INF, -0.0) if dtype.is_floating_point else edge_values(dtype)


@st.composite
def along(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(ALONG))
    shape = draw(shapes(0, 3))
    dim, keep = draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1)), draw(st.booleans())
    # torch's running mean makes NaN of an infinity, or does not, by where it stands.
    x = draw(tensors(shape, DTYPES, mild_values if "var" in name or "std" in name else summable))
    return Call(f"{name}({dim}, {keep})", lambda x: function(x, dim, keep), (x,))


@st.composite
def total(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(WHOLE))
    return Call(name, function, (draw(tensors(draw(shapes(0, 3)), DTYPES, summable)),))


# -- types -------------------------------------------------------------------------------------------------------------

MIXED: dict[str, Function] = {
    "cat": lambda a, b: torch.cat([a.reshape(-1), b.reshape(-1)]),
    "stack": lambda a, b: torch.stack([a, b.expand(a.shape)]), "where": lambda a, b: torch.where(a > 0, a, b),
    "where number": lambda a, b: torch.where(b > 0, a, 2), "where half": lambda a, b: torch.where(b > 0, 0.5, a),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 3), "result": lambda a, b: (a + 0.5) * b,
    "sum": lambda a, b: a + b.sum(), "type_as": lambda a, b: a.type_as(b) + 1,
    "addcmul": lambda a, b: torch.addcmul(a, a, a, value=2), "wrap": lambda a, b: (a + 100) * 3 - 7,
    "mean": lambda a, b: a.float().mean() * b, "isin": lambda a, b: torch.isin(a, b),
    "compare": lambda a, b: (a < b) + (a >= 0.5), "bool math": lambda a, b: (a > 0) + (b > 0) + 1,
    "bool times": lambda a, b: (a > 0) * b - 0.5, "neg": lambda a, b: -a + b,
    "clamp": lambda a, b: a.clamp(-1, 1.5) + b, "div": lambda a, b: (a / 2).to(b.dtype) * b,
    "ones": lambda a, b: torch.ones_like(a) + b, "fill": lambda a, b: torch.full_like(a, 2) * b,
    "max number": lambda a, b: torch.maximum(a, torch.tensor(1)) + b,
}  # fmt: skip


@st.composite
def mixed(draw: st.DrawFn) -> Call:
    name, function = draw(one_of(MIXED))
    shape = draw(shapes(0, 2))
    return Call(
        name, function, tuple(draw(tensors(s, DTYPES, mild_values)) for s in (shape, draw(broadcast_with(shape))))
    )


@st.composite
def casts(draw: st.DrawFn) -> Call:
    """Of what fits: a float that an integer cannot hold is undefined."""
    x, target = draw(tensors(draw(shapes(0, 2)))), draw(st.sampled_from(DTYPES))
    if x.is_floating_point() and target in INTEGERS:
        x = draw(tensors(list(x.shape), [x.dtype], lambda dtype: (0.0, -0.0, 0.9, 1.5, 2.5, 7.0, 100.7)))
    if target in FLOATS and x.dtype in INTEGERS:
        x = x % 100
    return Call(f"to {target} and back", lambda x: (x.to(target), x.to(target).to(x.dtype)), (x,))


# -- chains ------------------------------------------------------------------------------------------------------------

STEPS: dict[str, Function] = {
    "abs": lambda x, y: x.abs(), "neg": lambda x, y: 1 - x, "half": lambda x, y: x * 0.5, "add": lambda x, y: x + y,
    "sub": lambda x, y: y - x, "mul": lambda x, y: x * y, "max": lambda x, y: torch.maximum(x, y),
    "gt": lambda x, y: x > y, "where": lambda x, y: torch.where(x > 0, x, y), "relu": lambda x, y: x.relu(),
    "sigmoid": lambda x, y: x.sigmoid(), "softmax": lambda x, y: x.float().softmax(-1),
    "sum": lambda x, y: x.sum(-1, keepdim=True), "amax": lambda x, y: x.amax(0, keepdim=True),
    "mean": lambda x, y: x.float().mean(0), "float": lambda x, y: x.float(), "int": lambda x, y: x.clamp(-9, 9).int(),
    "clamp": lambda x, y: x.clamp(0, 1), "mod": lambda x, y: x % 3, "floor": lambda x, y: x // 2,
    "any": lambda x, y: x.any(-1, keepdim=True), "argmax": lambda x, y: x.argmax(-1, keepdim=True),
    "cumsum": lambda x, y: x.cumsum(-1), "square": lambda x, y: x.square(), "flip": lambda x, y: x.flip(0),
    "transpose": lambda x, y: x.transpose(0, -1).contiguous().transpose(0, -1),
    "cat": lambda x, y: torch.cat([x, x], -1)[..., :1], "fill": lambda x, y: x.masked_fill(y > 1, 0),
    "size": lambda x, y: x / x.shape[-1], "not": lambda x, y: ~(x > 0), "sort": lambda x, y: x.sort(-1).values,
    "diff": lambda x, y: x - x.float().mean(-1, keepdim=True),
}  # fmt: skip


@st.composite
def chain(draw: st.DrawFn) -> Call:
    """Three to six steps, each on two of the values so far; the last two values are results."""
    shape = draw(shapes(1, 3, (1, 2, 3)))
    args = tuple(draw(tensors(s, DTYPES, mild_values)) for s in (shape, draw(broadcast_with(shape))))
    steps = [
        (*draw(one_of(STEPS)), draw(st.integers(-3, -1)), draw(st.integers(-3, -1)))
        for _ in range(draw(st.integers(3, 6)))
    ]

    def run(*given: torch.Tensor) -> Any:
        values = list(given)
        for _, step, x, y in steps:
            values.append(step(values[max(x, -len(values))], values[max(y, -len(values))]))
        return [value.clone() for value in values[-2:]]

    return Call(" ".join(f"{name}({x},{y})" for name, _, x, y in steps), run, args)


FAMILIES: dict[str, Callable[[], st.SearchStrategy[Call]]] = {
    f.__name__: f for f in (unary, binary, division, bitwise, powers, bounds, along, total, mixed, casts, chain)
}

UNSUPPORTED = (
    "TensorRT has floats only",
    "bitwise logic of integer tensors of any size",
    "TensorRT has no int16",  # what int8 and uint8 make together
    "the order of up to",  # as many elements as a symbolic dim may have
    "must have type Float",  # softmax of integers, which eager takes where there are none
)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values(family: str, dynamic: bool) -> None:
    @hypothesis.given(FAMILIES[family](), st.booleans())
    def agree(call: Call, build: bool) -> None:
        assert_agrees(call, dynamic=dynamic, build=build and call.args[0].numel() % 4 == 1, unsupported=UNSUPPORTED)

    agree()


# -- what was found so -------------------------------------------------------------------------------------------------

HOLES = torch.tensor([[1.0, NAN, 2.0, NAN], [3.0, 1.0, 2.0, 0.0], [NAN, 1.0, 1.0, 1.0]])
PLACES = torch.tensor([[0, 1, 1, 1], [2, 0, 3, 3], [0, 0, 0, 1]])
SMALL = torch.tensor([127, -100], dtype=torch.int8)

FOUND: dict[str, Call] = {
    "add scales after promotion": Call("add", lambda a, b: torch.add(a, b, alpha=3), (torch.tensor([5, 6]), SMALL)),
    "sub scales after promotion": Call("sub", lambda a, b: torch.sub(a, b, alpha=3), (torch.tensor([5, 6]), SMALL)),
    "rsub scales after promotion": Call("rsub", lambda a, b: torch.rsub(b, a, alpha=3), (torch.tensor([5, 6]), SMALL)),
    "poles of lgamma": Call("lgamma", torch.lgamma, (torch.tensor([-0.0, -3.0, -3e38, -INF, INF, NAN]),)),
    "a number that int8 wraps": Call("add", lambda x: (255 + x, x < 300, x * -200), (SMALL,)),
    "padding beyond float32": Call("pad", lambda x: F.pad(x, [1, 1], value=2**31 + 5), (torch.tensor([1, 2]),)),
    "stable with NaN": Call("sort", lambda x: x.sort(stable=True), (torch.tensor([NAN, 1, -2, NAN, INF, 1]),)),
    "stable down with NaN": Call(
        "sort", lambda x: torch.sort(x, descending=True, stable=True), (torch.tensor([[0.0, NAN, -0.0, NAN, 3]]),)
    ),
    "median at NaN": Call("median", lambda x: x.median(1), (HOLES,)),
    "scattered largest": Call("amax", lambda x, i: x.scatter_reduce(1, i, x * 2, "amax"), (HOLES, PLACES)),
    "scattered least": Call(
        "amin", lambda x, i: x.scatter_reduce(1, i, x * 2, "amin", include_self=False), (HOLES, PLACES)
    ),
    "largest of all windows": Call("pool", lambda x: F.adaptive_max_pool1d(x[None], 1), (HOLES,)),
    "largest of spread windows": Call("pool", lambda x: F.max_pool2d(x[None], 2, 1, 0, 2), (HOLES,)),
    "median of nothing": Call("median", torch.median, (torch.zeros(2, 0),)),
    "median of no integers": Call("median", torch.median, (torch.zeros(0, dtype=torch.int64),)),
    "xlogy of a number": Call("xlogy", lambda x: torch.xlogy(255, x), (torch.tensor([0.0, 2.0]),)),
    "infinities at indices": Call(
        "index_put",
        lambda x, i, v: torch.index_put(x, [i], v, accumulate=True),
        (torch.ones(6), torch.tensor([1, 3, 3, 5, 5]), torch.tensor([NAN, INF, 1.0, INF, -INF])),
    ),
    "infinite rows in bags": Call(
        "embedding_bag",
        lambda i, w, o: F.embedding_bag(i, w, o, mode="sum"),
        (torch.tensor([0, 1, 2, 2]), torch.tensor([[1.0, INF], [2.0, 3.0], [NAN, 1.0]]), torch.tensor([0, 2])),
    ),
    # RTX 1.7 built these for ever: functions of many layers beside a reduction of one element.
    "remainders of a sum of one": Call(
        "fmod", lambda x: torch.fmod(x, torch.fmod(x.sum(0, True), x)), (torch.ones(1),)
    ),
    "remainders beside a softmax of one": Call(
        "fmod", lambda x: torch.fmod(torch.fmod(x, 3), 2) * x.softmax(-1), (torch.tensor([[2.5], [NAN], [INF]]),)
    ),
    "remainders of a running sum of one": Call(
        "fmod", lambda x: torch.fmod(x, torch.fmod(x.cumsum(0).flip(0), x)), (torch.ones(1),)
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, dynamic: bool) -> None:
    call = FOUND[name]
    check(call.function, *call.args, dynamic=dynamic)
