"""Several profiles in an engine: which narrow ranges get one, and that each call takes the narrowest that it fits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo.hot_ranges import EVERY, SeenSizes
from trt_dynamo.profiles import Range
from trt_dynamo.reference.context import ReferenceContext
from trt_dynamo.reports import report
from trt_dynamo.runtime.engine import Engine

LENGTHS = Range(2, 30, 300)


BATCHES = Range(2, 8, 64)


def seen_after(
    calls: list[tuple[int, int]], wanted: int, batch: Range = BATCHES
) -> list[tuple[int | None, int | None]]:
    """The sizes held fast, of batch and length, after these calls, each of which is counted."""
    env = ShapeEnv()
    symbols = [env.create_unbacked_symint() for _ in range(2)]
    b, t = (symbol.node.expr for symbol in symbols)
    # A list of sizes with a shape is all that is read.
    seen = SeenSizes([Shaped((*symbols, 4))], wanted)
    for call in calls:
        for _ in range(EVERY):
            seen.note([Shaped((*call, 4))])
    ranges = {b: batch, t: LENGTHS}
    found = []
    for narrow in seen.hot(ranges):
        assert all(narrow[s].min >= ranges[s].min and narrow[s].max <= ranges[s].max for s in (b, t))
        held = [narrow[s].min if narrow[s].min == narrow[s].max else None for s in (b, t)]
        found.append((held[0], held[1]))
    return found


class Shaped(torch.Tensor):
    """A tensor by its type, with a shape that may have symbols."""

    @staticmethod
    def __new__(cls, shape: Any) -> Shaped:
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    def __init__(self, shape: Any) -> None:
        self.sizes = shape

    @property
    def shape(self) -> Any:  # type: ignore[override]
        return self.sizes


MANY = [(random.Random(i).randint(2, 60), random.Random(-i - 1).randint(2, 300)) for i in range(100)]

CASES: dict[str, tuple[list[tuple[int, int]], int, list[tuple[int | None, int | None]]]] = {
    "none wanted": ([(8, 30)], 0, []),
    "no call yet: the first call's": ([], 2, [(8, 30)]),
    "one size": ([(8, 20)] * 5, 2, [(8, 20)]),
    "two sizes": ([(8, 20)] * 5 + [(4, 40)] * 9, 2, [(4, 40), (8, 20)]),
    "no more than wanted": ([(8, 20)] * 5 + [(4, 40)] * 9, 1, [(4, 40)]),
    "one dim in common": ([(8, n) for n in range(2, 40)], 3, [(8, None)]),
    "nothing in common": (MANY, 3, []),
    "a size outside of the range": ([(900, 20)] * 5, 2, []),
}


@pytest.mark.parametrize("name", CASES)
def test_which_sizes_are_hot(name: str) -> None:
    calls, wanted, expected = CASES[name]
    assert seen_after(calls, wanted) == expected


def test_a_batch_of_one_comes_first() -> None:
    assert seen_after([(8, 20)] * 5, 2, Range(0, 8, 64)) == [(1, None), (8, 20)]
    assert seen_after([], 1, Range(1, 8, 64)) == [(1, None)]


def test_of_sixteen_calls_one_is_counted_and_rare_sizes_are_forgotten() -> None:
    s = ShapeEnv().create_unbacked_symint()
    seen = SeenSizes([Shaped((s,))], 1)
    for n in range(40 * EVERY):
        seen.note([Shaped((n // EVERY,))])
    assert seen.counts.total() == 40
    for n in range(2000 * EVERY):
        seen.note([Shaped((n if n % 2 else 7,))] if n % EVERY == 0 else [])
    assert len(seen.counts) < 300


def test_nothing_is_counted_without_sizes_that_vary() -> None:
    assert SeenSizes([torch.empty(3, 4)], 5).wanted == 0
    assert SeenSizes([3, sympy.Symbol("s")], 5).wanted == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, n: int = 3) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        return torch.cat([y, y.flip(0)]).reshape(x.shape[0], -1) + x.shape[1] * n


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The profile of each run of an engine."""
    profiles: list[int] = []
    run = ReferenceContext.execute_async_v3

    def execute_async_v3(self: ReferenceContext, stream_handle: int) -> bool:
        profiles.append(self.active_optimization_profile)
        return run(self, stream_handle)

    monkeypatch.setattr(ReferenceContext, "execute_async_v3", execute_async_v3)
    return profiles


def test_a_call_takes_the_narrowest_profile(used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_dynamo.hot_ranges.EVERY", 1)
    net = Net()
    fast = compiled(net, dynamic=True, profiles=3)
    with torch.no_grad():
        for batch, length in [(5, 9), (5, 8), (5, 9), (5, 9), (7, 20), (7, 20), (300, 9), (5, 9), (7, 20), (7, 21)]:
            x = torch.randn(batch, length, 6)
            assert_same(fast(x), net(x))
    assert [build["profiles"] for build in report()["builds"]] == [2, 3]
    assert used[:6] == [1, 0, 1, 1, 0, 0]
    assert used[6] == 0 and used[7] in (1, 2) and used[8] in (1, 2) and used[9] == 0
    assert report()["eager_calls"] == 0


@pytest.mark.parametrize("profiles", [1, 2, 4])
def test_streams_through_several_profiles(profiles: int, used: list[int]) -> None:
    net = Net()
    fast = compiled(net, dynamic=True, profiles=profiles)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with torch.no_grad():
            for _ in range(30):
                x = torch.randn(draw.choice([4, draw.randint(2, 300)]), draw.choice([6, draw.randint(2, 90)]), 6)
                n = draw.randint(2, 9)
                assert_same(fast(x, n), net(x, n))

    in_threads(4, work)
    assert (max(used) > 0) == (profiles > 1)
    assert report()["eager_calls"] == 0


def test_contexts_stay_with_a_stream_and_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_dynamo.hot_ranges.EVERY", 1)
    engines: list[Engine] = []
    start = Engine.__init__

    def remember(self: Engine, *args: Any, **keywords: Any) -> None:
        start(self, *args, **keywords)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", remember)
    net = Net()
    fast = compiled(net, dynamic=True, profiles=2)
    with torch.no_grad():
        for size in (5, 6, 5, 7, 5, 8):
            x = torch.randn(size, 4, 6)
            assert_same(fast(x), net(x))
    (engine,) = engines
    idle = engine.contexts.idle
    assert {use: len(calls) for use, calls in idle.items()} == {(0, 0): 1, (0, 1): 1}
    assert all(call.context.active_optimization_profile == use[1] for use, calls in idle.items() for call in calls)


def test_the_cache_tells_profiles_apart() -> None:
    net = Net()
    x = torch.randn(5, 4, 6)
    for profiles, hits in [(1, 0), (2, 0), (2, 1), (1, 2)]:
        torch._dynamo.reset()
        with torch.no_grad():
            assert_same(compiled(net, dynamic=True, profiles=profiles)(x), net(x))
        assert report()["cache_hits"] == hits
    assert [build["hit"] for build in report()["builds"]] == [False, False, True, True]
