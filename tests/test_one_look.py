"""One look at the weights of all engines of a call: what it spares, and that no change of a weight gets past it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import report
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.one_look import CALM, OneLook, pure
from trt_dynamo.weights import Reader

SEGMENTS = 3
X = torch.linspace(-1, 1, 40).view(5, 8)


class Chain(nn.Module):
    """Segments with an operation in eager between each two."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.erf) -> None:
        super().__init__()
        self.between = between
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(SEGMENTS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.between(layer(x))
        result: Tensor = self.layers[-1](x)
        return result


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[OneLook]:
    """All that are made in the test."""
    made: list[OneLook] = []
    original = OneLook.__init__

    def init(self: OneLook, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(OneLook, "__init__", init)
    return made


def calm(fast: Callable[..., Any], look: OneLook) -> None:
    """Calls until the next will look once."""
    for _ in range(look.patience + 2):
        fast(X)
    assert look.look is not None


def chain(seed: int = 1) -> Chain:
    torch.manual_seed(seed)
    return Chain().eval()


def together(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return compiled(model, eager_ops="aten.erf", **options)


def settled(looks: list[OneLook], **options: Any) -> tuple[Chain, Callable[..., Any], OneLook]:
    """A model, its compiled form, and the one look that its next call will take."""
    model = chain()
    fast = together(model, **options)
    with torch.no_grad():
        fast(X)
        (look,) = looks
        calm(fast, look)
    return model, fast, look


@pytest.mark.parametrize(
    "options", [{}, {"weights_check": "observed"}, {"weights": "frozen"}, {"weights": "inputs"}], ids=str
)
def test_the_answers_are_the_same(options: dict[str, Any], looks: list[OneLook]) -> None:
    model, fast, look = settled(looks, **options)
    with torch.no_grad():
        before = report()["engine_calls"]
        for _ in range(3):
            assert_same(fast(X), model(X))
        assert report()["engine_calls"] == before + 3 * SEGMENTS and look.look is not None


def test_all_weights_are_read_at_once(looks: list[OneLook], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = Reader.read

    def counted(self: Reader, tensors: Sequence[Tensor]) -> bytes:
        reads.append(len(tensors))
        return read(self, tensors)

    monkeypatch.setattr(Reader, "read", counted)
    model = chain()
    fast = together(model, weights_check="always")
    with torch.no_grad():
        fast(X)
        calm(fast, looks[0])
        reads.clear()
        fast(X)
    assert reads == [2 * SEGMENTS]


def by_optimizer(model: Chain) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model(X).square().sum().backward()
    optimizer.step()
    model.zero_grad()


CHANGES: dict[str, Callable[[Chain], object]] = {
    "the first, in place": lambda m: m.layers[0].get_parameter("weight").mul_(1.5),
    "the last, in place": lambda m: m.layers[-1].get_parameter("bias").add_(1),
    "new memory": lambda m: setattr(m.layers[1].get_parameter("weight"), "data", torch.randn(8, 8)),
    "an optimizer's step": by_optimizer,
    "load_state_dict": lambda m: m.load_state_dict(chain(9).state_dict()),
}
UNSEEN: dict[str, Callable[[Chain], object]] = {
    "through data": lambda m: m.layers[1].get_parameter("weight").data.mul_(2),
    "by NumPy": lambda m: m.layers[2].get_parameter("bias").detach().numpy().fill(0.5),
}


@pytest.mark.parametrize(
    ("check", "change"),
    [*((c, n) for c in ("always", "observed") for n in CHANGES), *(("always", n) for n in UNSEEN)],
)
def test_no_change_gets_past_it(check: str, change: str, looks: list[OneLook]) -> None:
    model = chain()
    fast = together(model, weights_check=check)
    with torch.no_grad():
        fast(X)
        (look,) = looks
        for _ in range(2):
            calm(fast, look)
            {**CHANGES, **UNSEEN}[change](model)
            for _ in range(3):
                assert_same(fast(X), model(X))


def test_two_models_take_turns(looks: list[OneLook]) -> None:
    models = [chain(1), chain(2)]

    def call(model: Chain, x: Tensor) -> Tensor:
        result: Tensor = model(x)
        return result

    fast = compiled(call, eager_ops="aten.erf")
    with torch.no_grad():
        for turn in range(12 * CALM):
            model = models[turn % 2 if turn > 4 * CALM else 0]
            assert_same(fast(model, X), model(X))
        assert any(look.patience > CALM for look in looks)


def test_another_engine_is_not_taken_for_the_one_before(looks: list[OneLook]) -> None:
    model, fast, look = settled(looks)
    with torch.no_grad():
        assert look.look is not None
        use = look.look.uses[1]
        assert use.slot.engine is not None
        use.slot.put(use.slot.engine)  # as a rebuild does
        assert_same(fast(X), model(X))
        assert look.look is None


def test_errors_are_those_of_eager_and_pass(looks: list[OneLook]) -> None:
    table = torch.randn(4, 8)

    def between(x: Tensor) -> Tensor:
        return x + nn.functional.embedding((x.sum() > 1e6).long() * 7, table)

    torch.manual_seed(1)
    model = Chain(between).eval()
    fast = compiled(model, eager_ops="aten.embedding")
    with torch.no_grad():
        fast(X)
        calm(fast, looks[-1])
        assert_same(fast(X), model(X))
        with pytest.raises(IndexError):
            model(X + 1e9)
        with pytest.raises(IndexError):
            fast(X + 1e9)
        assert_same(fast(X), model(X))


def test_graphs_that_cannot_run_twice(looks: list[OneLook]) -> None:
    model = Chain(lambda x: x + torch.rand_like(x)).eval()
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(CALM + 2):
            torch.manual_seed(4)
            actual = fast(X)
            torch.manual_seed(4)
            assert_same(actual, model(X))
    assert not looks


def test_what_is_pure() -> None:
    aten = torch.ops.aten
    assert all(map(pure, (aten.erf.default, aten.mm.default, torch.sym_max)))
    assert not any(
        map(pure, (aten.erf_.default, aten.copy_.default, aten.rand_like.default, print, aten.dropout.default))
    )


def test_threads_have_a_call_of_their_own(looks: list[OneLook]) -> None:
    model = chain()
    fast = together(model)
    inputs = [X * i for i in range(1, 5)]
    expected = [model(x).detach() for x in inputs]
    with torch.no_grad():
        fast(X)
        calm(fast, looks[0])

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                assert torch.allclose(fast(inputs[i]), expected[i], atol=1e-5)

    in_threads(4, work)


def test_it_keeps_no_engine_alive(looks: list[OneLook]) -> None:
    model, fast, look = settled(looks)
    with torch.no_grad():
        assert look.look is not None
        engines = [weakref.ref(use.slot.engine) for use in look.look.uses]
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.data = torch.zeros_like(parameter)
        gc.collect()
        assert not any(each() for each in engines)
        assert_same(fast(X), model(X))


def test_a_child_starts_without(looks: list[OneLook]) -> None:
    _, _, look = settled(looks)
    look.leave_to_parent()
    assert look.look is None


def test_one_segment_needs_none(looks: list[OneLook]) -> None:
    with torch.no_grad():
        compiled(nn.Linear(8, 8).eval())(X)
    assert not looks and PRESENT.larger is None
