"""Tables of cases for converters: a function, its arguments, and the same with larger ones where it is dynamic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from trt_dynamo.testing import check


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """`fixed`: torch's guards or the function itself allow no other sizes. `dynamic` is False where a symbolic dim is
    refused. `kept`: the dims that stay as they are."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    fixed: bool = False
    kept: tuple[int, ...] = ()
    dynamic: bool = True
    rtol: float | None = None
    atol: float | None = None


def case(function: Callable[..., Any], *args: Any, **more: Any) -> Case:
    return Case(function, args, **more)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(high: int, *shape: int, low: int = 0, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def larger(case: Case) -> list[Any]:
    """The arguments with 2 more in each dim but those of 1 or 0: equal dims stay equal, indices stay in range."""
    return [grow(a, case.kept) if isinstance(a, torch.Tensor) else a for a in case.args]


def grow(x: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    for axis, size in enumerate(x.shape):
        if size > 1 and axis not in kept:
            x = x.index_select(axis, torch.arange(size + 2) % size)
    return x


def run(case: Case, dynamic: bool) -> None:
    also = [larger(case)] if dynamic and not case.fixed else []
    check(case.function, *case.args, dynamic=dynamic, rtol=case.rtol, atol=case.atol, also=also)


def table(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """Parametrizes a test `(case, dynamic)` over a table, each case static and dynamic."""
    every = [
        pytest.param(case, dynamic, id=f"{name}-{'dynamic' if dynamic else 'static'}")
        for name, case in cases.items()
        for dynamic in ((False, True) if case.dynamic else (False,))
    ]
    return pytest.mark.parametrize(("case", "dynamic"), every)
