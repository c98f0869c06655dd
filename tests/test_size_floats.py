"""Python floats that were made of symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils._sympy import functions

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.aten_converters.rounded_sizes import whole
from trt_dynamo.testing import check, refused

CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quotient": lambda x: x * (x.shape[1] / 2),
    "inverse": lambda x: x + 1 / x.shape[0],
    "root": lambda x: x / x.shape[1] ** 0.5,
    "of several": lambda x: x - (x.shape[0] * 1.5 + x.shape[1] / x.shape[0]) ** 2,
    "times one": lambda x: torch.add(x, x, alpha=x.shape[0] / 4),
    "exponent": lambda x: x.abs() ** (x.shape[0] / 3),
    "bound": lambda x: x.clamp(max=x.shape[0] / 10),
    "integers": lambda x: x.int() * (x.shape[1] / 4),
    "condition": lambda x: torch.where(x > 0, x, x.shape[0] / 4),
}


@pytest.mark.parametrize("name", CASES)
def test_floats_of_sizes(name: str) -> None:
    check(CASES[name], torch.randn(4, 6), dynamic=True, also=[[torch.randn(7, 5)], [torch.randn(2, 11)]])


def test_a_half_type_stays_one() -> None:
    check(CASES["quotient"], torch.randn(4, 6).half(), dynamic=True, rtol=2e-3, atol=2e-3)


def test_label_smoothing() -> None:
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y, label_smoothing=0.1)

    check(loss, torch.randn(4, 6), torch.tensor([0, 3, 5, 1]), dynamic=True, rtol=1e-4, atol=1e-5)


def test_in_one_engine() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT / math.sqrt(x.shape[1])).softmax(-1) * (1 / x.shape[0])

    fast = compiled(f, dynamic=True)
    for shape in ((3, 5), (4, 9), (17, 2)):
        x = torch.randn(shape)
        assert_same(fast(x), f(x))
    assert engine_calls() == 3


def test_where_a_number_must_be_known() -> None:
    with refused("a float that was made of a symbolic size"):
        check(lambda x: F.elu(x, x.shape[0] / 2), torch.randn(4, 6), dynamic=True)


def test_of_sizes_of_another_tensor() -> None:
    """The host tells the engine a size that none of its own tensors has."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.exp() * (x.shape[0] / 3) + 1

    fast, y = compiled(f, dynamic=True), torch.randn(5, 7)
    for rows in (4, 8, 9):
        x = torch.randn(rows, 6)
        assert_same(fast(x, y), f(x, y))
    assert engine_calls() == 3


def test_a_size_of_another_tensor_that_shapes_nothing() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.exp() * x.shape[0] + 1

    fast, y = compiled(f, dynamic=True), torch.randn(5, 7)
    for rows in (4, 8, 9):
        x = torch.randn(rows, 6)
        assert_same(fast(x, y), f(x, y))
    assert engine_calls() == 3


def test_between_two_engines() -> None:
    """A float that both of them and eager read."""

    def f(x: torch.Tensor) -> torch.Tensor:
        scale = x.shape[0] / 3
        ordered = torch.linalg.cholesky_ex((x.mT @ x + torch.eye(3)) * scale)[0]
        result: torch.Tensor = (ordered.exp() * scale).sum() * scale + torch.linalg.det(torch.eye(2) * scale)
        return result

    fast = compiled(f, dynamic=True)
    for rows in (4, 8, 9):
        x = torch.randn(rows, 3)
        assert_same(fast(x), f(x))
    assert engine_calls() >= 6


# sizes that went through floats
ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "downwards": lambda x: torch.arange(x.shape[0], -x.shape[0], -1.0) + x.sum(),
    "a third": lambda x: torch.arange(0, x.shape[0] / 3, 1.0) + x.sum(),
    "from a half": lambda x: torch.arange(0.5, x.shape[0], 1.5) + x.sum(),
    "larger by a half": lambda x: F.interpolate(x[None], scale_factor=1.5, mode="nearest"),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_sizes_that_went_through_floats(name: str) -> None:
    check(ROUNDED[name], torch.randn(5, 6), dynamic=True, also=[[torch.randn(9, 5)], [torch.randn(12, 11)]])


S = sympy.Symbol("s", integer=True, positive=True)
FLOAT = functions.ToFloat(S)


@pytest.mark.parametrize(
    ("rounded", "expected"),
    [
        (functions.CeilToInt(functions.FloatTrueDiv(2 * FLOAT, sympy.Float(3.0))), -((-2 * S) // 3)),
        (functions.FloorToInt(FLOAT * 0.75 + 0.5), (3 * S + 2) // 4),
        (functions.FloorToInt(functions.FloatTrueDiv(functions.IntTrueDiv(S, 7), sympy.Float(2.0))), S // 14),
        (functions.FloorToInt(FLOAT * 0.1), None),  # 0.1 is no tenth: what a size times it rounds to is float64's
        (functions.FloorToInt(functions.FloatTrueDiv(functions.IntTrueDiv(S, 7), sympy.Float(3.0))), None),
        (functions.FloorToInt(functions.FloatTrueDiv(FLOAT, sympy.Float(7.0)) * 7.0), None),  # rounded twice
    ],
)
def test_only_what_is_rounded_once_becomes_whole_numbers(rounded: sympy.Expr, expected: sympy.Expr | None) -> None:
    found = whole(rounded)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert all(int(found.subs(S, n)) == int(rounded.subs(S, n)) == int(expected.subs(S, n)) for n in range(1, 400))
