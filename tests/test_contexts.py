"""The pool of execution contexts: bounded, one thread each, taken over between streams and profiles."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import report
from trt_dynamo.reference.context import ReferenceContext
from trt_dynamo.runtime.contexts import Contexts
from trt_dynamo.runtime.engine import Engine

THREADS = 16


class FakeCall:
    """A context's use, without a context."""

    def __init__(self, stream: int, profile: int) -> None:
        self.stream, self.profile = stream, profile


class FakeEngine:
    """Makes fake contexts, and notes which were turned to another use."""

    def __init__(self, fails: bool = False) -> None:
        self.made: list[FakeCall] = []
        self.turned: list[tuple[int, int]] = []
        self.fails = fails

    def make_call(self, stream: int, profile: int) -> Any:
        if self.fails:
            raise RuntimeError("no memory")
        self.made.append(FakeCall(stream, profile))
        return self.made[-1]

    def turn(self, call: Any, stream: int, profile: int) -> None:
        self.turned.append((stream, profile))
        call.stream, call.profile = stream, profile


def pool(most: int = 2, **keywords: Any) -> tuple[Contexts, Any]:
    return Contexts(most), FakeEngine(**keywords)


def test_one_context_serves_calls_in_turn() -> None:
    contexts, engine = pool()
    for _ in range(5):
        call = contexts.take(engine, 0, 0)
        contexts.give_back(call)
    assert len(engine.made) == 1 and not engine.turned


def test_a_context_of_another_stream_or_profile_is_taken_over_only_where_there_may_be_no_more() -> None:
    contexts, engine = pool(most=2)
    for use in [(1, 0), (2, 0)]:
        contexts.give_back(contexts.take(engine, *use))
    assert len(engine.made) == 2 and not engine.turned
    call = contexts.take(engine, 3, 0)
    assert (call.stream, call.profile) == (3, 0) and engine.turned == [(3, 0)] and len(engine.made) == 2
    contexts.give_back(call)
    contexts.give_back(contexts.take(engine, 3, 1))
    assert engine.turned[-1] == (3, 1) and len(engine.made) == 2


def test_calls_wait_for_a_context_where_all_are_in_use() -> None:
    contexts, engine = pool(most=1)
    first = contexts.take(engine, 0, 0)
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(contexts.take(engine, 0, 0)))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive() and not got
    contexts.give_back(first)
    waiting.join(5)
    assert got == [first]


def test_a_context_that_cannot_be_made_takes_no_place() -> None:
    contexts, engine = pool(most=1, fails=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory"):
            contexts.take(engine, 0, 0)
    engine.fails = False
    assert contexts.take(engine, 0, 0) is engine.made[0]


def test_a_withdrawn_context_is_lent_to_nobody_until_it_is_readmitted() -> None:
    contexts, engine = pool(most=1)
    contexts.give_back(contexts.take(engine, 0, 0))
    call = contexts.withdraw(5, 0)
    assert call is engine.made[0] and contexts.withdraw(5, 0) is None
    other = contexts.take(engine, 0, 0)
    assert other is not call
    contexts.readmit(call)
    assert contexts.take(engine, 0, 0) is call


@pytest.mark.parametrize("most", [1, 3, THREADS])
def test_threads_never_share_a_context(most: int) -> None:
    contexts, engine = pool(most=most)
    used: list[int] = []
    errors: list[str] = []

    def work(seed: int) -> None:
        for turn in range(300):
            call = contexts.take(engine, (seed + turn) % 3, turn % 2)
            if id(call) in used:
                errors.append("shared")
            used.append(id(call))
            if turn % 50 == 0:
                time.sleep(0.0005)
            used.remove(id(call))
            contexts.give_back(call)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert len(engine.made) <= most


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


@pytest.mark.parametrize("bound", [1, 4])
def test_sixteen_threads_get_right_answers_from_a_bounded_pool(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most_at_once, lock = [0], [0], threading.Lock()
    execute = ReferenceContext.execute_async_v3

    def slow(self: ReferenceContext, stream: int) -> bool:
        with lock:
            at_once[0] += 1
            most_at_once[0] = max(most_at_once[0], at_once[0])
        time.sleep(0.002)
        done = execute(self, stream)
        with lock:
            at_once[0] -= 1
        return done

    monkeypatch.setattr(ReferenceContext, "execute_async_v3", slow)
    net = Net().eval()
    fast = compiled(net, dynamic=True, max_contexts=bound)
    inputs = [torch.randn(2 + seed % 5, 8) for seed in range(THREADS)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        fast(inputs[0])

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                assert_same(fast(inputs[seed]), expected[seed])

    in_threads(THREADS, work)
    assert report()["eager_calls"] == 0
    assert most_at_once[0] == bound


def test_an_engine_goes_with_its_last_user_and_waits_for_no_garbage_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines: list[weakref.ref[Engine]] = []
    start = Engine.__init__

    def remember(self: Engine, *args: Any, **keywords: Any) -> None:
        start(self, *args, **keywords)
        engines.append(weakref.ref(self))

    monkeypatch.setattr(Engine, "__init__", remember)
    net = Net().eval()
    fast = compiled(net, rebuild="sync")
    x = torch.randn(3, 8)
    with torch.no_grad():
        fast(x)
        gc.collect()
        gc.disable()
        try:
            net.first.weight.data = torch.randn(16, 8)  # other memory: the engine has no use any more
            assert_same(fast(x), net(x))
            assert_same(fast(x), net(x))
            assert engines[0]() is None
        finally:
            gc.enable()


def test_sizes_and_shapes_are_told_a_context_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Sequence[int]] = []
    original = ReferenceContext.set_input_shape

    def tell(self: ReferenceContext, name: str, shape: Sequence[int]) -> bool:
        told.append(tuple(shape))
        return original(self, name, shape)

    monkeypatch.setattr(ReferenceContext, "set_input_shape", tell)
    net = Net().eval()
    fast = compiled(net, dynamic=True)
    with torch.no_grad():
        for size in (3, 3, 3, 5, 5, 3):
            x = torch.randn(size, 8)
            assert_same(fast(x), net(x))
    assert [shape[0] for shape in told] == [3, 5, 3]
