"""Builders that lack the memory for a range of sizes: a narrower one is tried; what it leaves out stays in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled
from trt_dynamo import engine_making, report
from trt_dynamo.build import build
from trt_dynamo.errors import BuildError

NO_MEMORY = "OutOfMemory (Requested size was 68832630152 bytes.)"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Has builds fail whose largest batch is above `most`; tells the largest batch of each."""

    def limited(most: int, words: str = NO_MEMORY) -> list[int]:
        asked: list[int] = []

        def small(network: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
            asked.append(max((span.max for span in network.network.ranges.values()), default=most + 1))
            if asked[-1] > most:
                raise BuildError(f"TensorRT could not build it: {words}")
            return build(network, profile, *args, **keywords)

        monkeypatch.setattr(engine_making, "build", small)
        return asked

    return limited


@pytest.mark.parametrize(("most", "tried"), [(64, [64]), (40, [64, 16]), (10, [64, 16, 4])])
def test_a_narrower_range_is_tried(most: int, tried: list[int], builds: Callable[..., list[int]]) -> None:
    asked, model = builds(most), nn.Linear(4, 4).eval()
    fast = compiled(model, dynamic=True, rebuild="sync")
    with torch.no_grad():
        for size in (3, 2, 4):
            x = torch.randn(size, 4)
            assert_same(fast(x), model(x))
        assert asked == tried and report()["engine_calls"] == 3
        for _ in range(2):  # what there is no memory for stays in eager, and is tried once at most
            x = torch.randn(100, 4)
            assert_same(fast(x), model(x))
    assert len(asked) <= len(tried) + 1
    assert report()["engine_calls"] == (5 if most == 64 and asked[-1] <= most else 3)


def test_not_below_the_sizes_that_come(builds: Callable[..., list[int]]) -> None:
    asked, model = builds(10), nn.Linear(4, 4).eval()
    x = torch.randn(30, 4)
    with torch.no_grad():
        assert_same(compiled(model, dynamic=True, strict=False)(x), model(x))
    assert asked[0] == 64 and asked[-1] == 30 and report()["engine_calls"] == 0


@pytest.mark.parametrize(("dynamic", "words"), [(True, "an internal error"), (False, NO_MEMORY)])
def test_other_failures_are_final(dynamic: bool, words: str, builds: Callable[..., list[int]]) -> None:
    asked, model = builds(0, words), nn.Linear(4, 4).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same(compiled(model, dynamic=dynamic, strict=False)(x), model(x))
    assert len(asked) == 1 and report()["eager_calls"] == 1
