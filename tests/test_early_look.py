"""Weights that change while they are looked at early, and what becomes of that thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled
from trt_dynamo import backend, early_look, engine_making, report, reset_report
from trt_dynamo.cache import digest
from trt_dynamo.early_look import EarlyLook
from trt_dynamo.fingerprints import fingerprint

Write = Callable[[nn.Linear], object]

X = torch.randn(3, 8)
WRITES: dict[str, Write] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: layer.weight.data.mul_(2),
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(2),
    "one element": lambda layer: layer.weight.data[5, 2].add_(1),
    "other memory": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
}


@pytest.fixture(autouse=True, params=[0, 64], ids=["all in the thread", "the small later"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EarlyLook]]:
    """The early looks of a test, which small models have here too; their threads end with the compilation."""
    made: list[EarlyLook] = []

    class Kept(EarlyLook):
        def __init__(self, weights: Any) -> None:
            super().__init__(weights)
            made.append(self)

    monkeypatch.setattr(early_look, "BYTES_PER_THREAD", 0)
    monkeypatch.setattr(early_look, "LARGE", request.param)
    monkeypatch.setattr(early_look, "processors", lambda: 2)
    monkeypatch.setattr(early_look, "EarlyLook", Kept)
    yield made
    assert not any(look.thread is not None and look.thread.is_alive() for look in made)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8).eval()


def between(monkeypatch: pytest.MonkeyPatch, when: str, write: Callable[[], object]) -> None:
    """Writes once: before the first fingerprint, between it and the SHA-256, when the thread is done, or after that, at
    the first look into the cache.
    """
    todo = [write]

    def first(function: Callable[..., Any], *, wait: bool = False) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            if todo:
                if wait:
                    for thread in threading.enumerate():
                        if thread.name == "trt_dynamo-side":
                            thread.join()
                with torch.no_grad():
                    todo.pop()()
            return function(*args, **keywords)

        return run

    place = {
        "before": (early_look, "fingerprint", False),
        "between": (early_look, "digest", False),
        "traced": (backend, "partition", True),
        "keyed": (engine_making, "get_or_build", False),
    }[when]
    module, name, wait = place
    monkeypatch.setattr(module, name, first(getattr(module, name), wait=wait))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("when", ["before", "between", "traced", "keyed"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_write_meanwhile_is_seen(
    write: str, when: str, warm: bool, monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]
) -> None:
    with torch.no_grad():
        if warm:
            compiled(layer())(X)
            torch._dynamo.reset()
            looks.clear()
        model = layer()
        with monkeypatch.context() as patch:
            between(patch, when, lambda: WRITES[write](model))
            fast = compiled(model)
            for _ in range(3):
                assert_same(fast(X), model(X))
        assert len(looks) == 1
        # Whatever was stored is what its key says.
        for other in (layer(), model):
            torch._dynamo.reset()
            assert_same(compiled(other)(X), other(X))


def test_a_warm_start_looks_once(monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]) -> None:
    with torch.no_grad():
        compiled(layer())(X)
        torch._dynamo.reset()
        reset_report()
        monkeypatch.setattr("trt_dynamo.identity.digests", None)
        model = layer()
        assert_same(compiled(model)(X), model(X))
    assert report()["cache_hits"] == 1 and report()["engine_calls"] == 1
    assert [len(look.found) for look in looks] == [2, 2]


def test_what_is_seen_is_given_once_to_a_set() -> None:
    weights = [torch.randn(4, 4), torch.randn(3)]
    look = EarlyLook(weights)
    assert look.digests(weights) is None
    steps, _, versions, content = look.seen(weights) or (None,) * 4
    assert (versions, content) == ([0, 0], fingerprint(weights)) and steps is not None
    assert look.digests(weights) == [digest(weight) for weight in weights]
    assert look.seen(weights[:1]) is not None
    assert look.seen([*weights, torch.randn(2)]) is None
    assert look.seen(weights) is None and look.digests(weights) is None


def test_who_needs_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has not come to anything yet."""
    monkeypatch.setattr(early_look, "started", lambda look: threading.Thread(target=str))
    monkeypatch.setattr(threading.Thread, "join", lambda self: None)
    weights = [torch.randn(4, 4), torch.randn(early_look.LARGE), torch.randn(2 * early_look.LARGE)]
    look = EarlyLook(weights)
    found = look.seen(weights)
    assert found is not None and found[3] == fingerprint(weights)
    assert look.digests(weights) == [digest(weight) for weight in weights] and not look.large


@pytest.mark.parametrize("data", [lambda old: old.clone(), lambda old: old.t(), lambda old: old.view(torch.int32)])
def test_a_weight_that_lies_otherwise_is_looked_at_again(data: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.randn(4, 4)
    look = EarlyLook([weight])
    assert look.seen([weight]) is not None and look.digests([weight]) is not None
    weight.data = data(weight.data)
    assert look.digests([weight]) is None
    look = EarlyLook([weight])
    weight.data = data(weight.data).clone()
    assert look.seen([weight]) is None


@pytest.mark.parametrize("name", ["fingerprint", "digest"])
def test_an_error_of_the_thread_is_one_of_the_compilation(
    name: str, monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]
) -> None:
    def fail(_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(early_look, name, fail)
    model = layer()
    with torch.no_grad():
        assert_same(compiled(model, strict=False)(X), model(X))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no room"):
            compiled(model)(X)
    assert len(looks) == 2


def test_a_compilation_that_fails_waits_for_its_thread(monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]) -> None:
    def fail(*_: object) -> None:
        raise ValueError("tracing failed")

    monkeypatch.setattr(backend, "lower", fail)
    with torch.no_grad():
        compiled(layer(), strict=False)(X)
    assert len(looks) == 1


@pytest.mark.parametrize("options", [{"weights": "inputs"}, {"runtime": "eager"}])
def test_no_look_where_no_engine_holds_weights(options: dict[str, Any], looks: list[EarlyLook]) -> None:
    with torch.no_grad():
        compiled(layer(), **options)(X)
    assert not looks


@pytest.mark.parametrize(("bytes_per_thread", "processors"), [(2**21, 2), (0, 1)])
def test_no_thread_where_it_is_not_worth_one(
    bytes_per_thread: int, processors: int, monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]
) -> None:
    monkeypatch.setattr(early_look, "BYTES_PER_THREAD", bytes_per_thread)
    monkeypatch.setattr(early_look, "processors", lambda: processors)
    with torch.no_grad():
        assert_same(compiled(model := layer())(X), model(X))
    assert not looks


def test_without_a_thread_weights_are_read_later(monkeypatch: pytest.MonkeyPatch, looks: list[EarlyLook]) -> None:
    monkeypatch.setattr(early_look, "started", lambda _: None)
    with torch.no_grad():
        assert_same(compiled(model := layer())(X), model(X))
    assert report()["engine_calls"] == 1 and len(looks) == 1


def test_several_segments_share_a_look(looks: list[EarlyLook], tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x)) * 2
            return torch.relu(self.second(torch.sort(self.first(x)).values)) * 3

    model = Net().eval()
    with torch.no_grad():
        fast = compiled(model, eager_ops=["aten.sort.default"])
        assert_same(fast(X), model(X))
        model.first.weight.data.mul_(2)
        assert_same(fast(X), model(X))
    assert len(looks) == 1 and len(looks[0].found) == 4
