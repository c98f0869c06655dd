"""Memory of a build and of an engine: what is copied is let go, at once, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import compiled
from trt_dynamo import engine_making
from trt_dynamo.errors import EngineError
from trt_dynamo.reports import report

WIDTH = 317  # no other tensor of the tests is of this size
BYTES = WIDTH * WIDTH * 4


class TwoSegments(nn.Module):
    """One weight in two segments, since the op between them stays in eager."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(torch.erfinv(torch.tanh(self.linear(x)) * 0.5))
        return out


def copies() -> int:
    """How many tensors of the size of a weight have memory of their own."""
    found = (t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))
    alive = [t for t in found if t.device.type == "cpu" and t.layout is torch.strided]
    return len({t.untyped_storage().data_ptr() for t in alive if t.untyped_storage().nbytes() == BYTES})


def large_bytes() -> int:
    """Bytes objects at least as large as a weight: plans."""
    return sum(type(o) is bytes and len(o) >= BYTES for o in reachable())


def reachable() -> Iterator[Any]:
    for each in gc.get_objects():
        yield each
        if type(each) is dict:
            yield from each.values()
        elif type(each) in (list, tuple):
            yield from each


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Loaded:
    """In the place of an engine that TensorRT has loaded: it keeps no weights on the host, and does not run."""

    built_for: Any = None
    hit = False
    refittable = False

    def __call__(self, args: Any) -> Any:
        raise EngineError("not here")


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_build_leaves_nothing_on_the_host(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real builder; only the loading of its plan, which needs a GPU, is replaced."""
    plans: list[int] = []

    def load(plan: bytes, manifest: Any, device: torch.device, contexts: int) -> Any:
        plans.append(len(plan))
        return Loaded()

    monkeypatch.setattr(engine_making, "load_plan", load)
    monkeypatch.setattr("trt_dynamo.backend.why_eager", lambda *_: None)
    model = TwoSegments()
    x = torch.randn(3, WIDTH)
    before = copies()
    with torch.no_grad():
        compiled(model, runtime="auto", strict=False, eager_ops="aten.erfinv", cache=cache)(x)
    assert len(plans) == 2 and min(plans) > BYTES / 2
    assert report()["engines_built"] == 2
    assert copies() == before
    assert large_bytes() == 0


@pytest.mark.usefixtures("no_collector")
def test_the_stand_ins_of_a_model_share_one_copy() -> None:
    model = TwoSegments()
    before, known = copies(), set(engine_making.COPIES)
    fast = compiled(model, eager_ops="aten.erfinv", dynamic=True)
    with torch.no_grad():
        fast(torch.randn(3, WIDTH))
    assert report()["engines_built"] == 2
    # The networks' copy, which they share, and the evaluator's, which reads a network anew.
    assert copies() <= before + 3
    assert len(set(engine_making.COPIES) - known) == 1
    assert large_bytes() == 0
    weight = weakref.ref(model.linear.weight.untyped_storage())
    del fast, model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None and copies() <= before - 1
