"""Views that eager makes of what an engine computed: the memory under them is as the graph says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiled import assert_same, compiled, engine_calls

STRIDED: dict[str, Callable[[Tensor], Any]] = {
    "a row": lambda x: (x * 3)[1].as_strided((2,), (1,), 0),
    "a diagonal": lambda x: (x * 3).diagonal().as_strided((3,), (1,)),
    "a diagonal of what is turned": lambda x: (x * 3).t().diagonal()[None].expand(3, -1).as_strided((2,), (1,)),
    "the end": lambda x: (x * 3).view(-1)[3:].as_strided((2, 2), (1, 2), 1) + 1,
    "a row of an argument": lambda x: ((y := x[1]).exp() + y.as_strided((5,), (2,), 0), y * 2),
    "a part that others read": lambda x: ((y := (x * 3)[::2, 1]).exp(), y.as_strided((2,), (3,)).sin(), y + 1),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_strides_over_a_part(name: str, dynamic: bool) -> None:
    f = STRIDED[name]
    fast = compiled(f, dynamic=dynamic)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(4, 5)
            assert_same(fast(x), f(x))
    assert engine_calls() >= 2


def last_of_rows(x: Tensor) -> Tensor:
    y = x[:, -1]
    y[-1].add_(2)
    return y


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    x[1:] *= 2
    return x.t(), x.sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("f", [last_of_rows, turned])
def test_views_of_an_argument_with_gaps_that_is_written(f: Callable[[Tensor], Any], dynamic: bool) -> None:
    """AOTAutograd takes the strides of such a view from the graph's result."""
    fast = compiled(lambda x: (f(x), x.exp()), dynamic=dynamic)
    with torch.no_grad():
        for rows in (5, 6):
            x = torch.randn(rows, 7)
            ours, its = x.clone()[:, :4], x.clone()[:, :4]
            found, expected = fast(ours), (f(its), its.exp())
            assert_same((found, ours), (expected, its))
            first, other = (y[0] if isinstance(y, tuple) else y for y in (found[0], expected[0]))
            assert first.stride() == other.stride()
            first.fill_(7)
            other.fill_(7)
            assert_same(ours, its)
