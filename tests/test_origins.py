"""For an engine that the cache lacks although its graph was seen: what it was made with then, and now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import compiled
from trt_dynamo import origins
from trt_dynamo.reports import report


def last_build(model: nn.Module, **options: Any) -> dict[str, Any]:
    """What `report` says of the engine that a first call needs."""
    torch._dynamo.reset()
    fast = compiled(model, **options)
    with torch.no_grad():
        fast(torch.ones(2, 4))
    return report()["builds"][-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("process", ["the same", "another"])
def test_why_a_graph_that_was_seen_needs_another_engine(process: str) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def build(**options: Any) -> dict[str, Any]:
        if process == "another":
            origins.MADE.clear()
        return last_build(model, **options)

    assert build()["reason"] == "new graph"
    assert build()["hit"]
    found = build(optimization_level=1)
    assert not found["hit"] and found["reason"] != "new graph"
    assert found["detail"] == "setting optimization_level 1, was None"
    assert build(optimization_level=1)["hit"]
    with torch.no_grad():
        model[0].bias.zero_()
    found = build()
    assert not found["hit"] and found["detail"] == "other weights"
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    assert build()["reason"] == "new graph"


def test_without_a_cache_only_this_process_is_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert last_build(model, cache="off")["reason"] == "new graph"
    assert last_build(model, cache="off", optimization_level=1)["detail"] == "setting optimization_level 1, was None"
    origins.MADE.clear()
    assert last_build(model, cache="off", optimization_level=2)["reason"] == "new graph"
