"""What comes before an op of eager's at the beginning of a graph does not cut the graph in two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import explain

W = torch.nn.Linear(8, 8).eval()


def body(x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = W(W(x).relu()).relu()
    return y


def angles(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotary angles, which are computed in float64 from some places that are put together."""
    turns = torch.cat([places, places[:2]])[:4, None].double() * torch.arange(8, dtype=torch.float64)
    return body(body(x) * turns.cos().float())


def read_twice(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What eager's op reads is read in the engine too."""
    moved = places[:4, None] + 1
    return body(body(x) * moved.double().cos().float()) + moved


def in_the_middle(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Eager's op needs the work of an engine."""
    y = body(x)
    return body(y * y.double().cos().float()) + places[:4, None]


@pytest.mark.parametrize(("function", "engines"), [(angles, 1), (read_twice, 1), (in_the_middle, 2)])
def test_engines(function: Callable[..., torch.Tensor], engines: int) -> None:
    args = torch.randn(4, 8), torch.arange(5.0)
    told = explain(function, *args)
    assert len(told.segments) == engines, str(told)
    fast = compiled(function, min_segment_nodes=3)
    with torch.no_grad():
        assert_same(fast(*args), function(*args))
    assert engine_calls() == engines
