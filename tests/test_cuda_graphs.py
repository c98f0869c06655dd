"""Calls as CUDA graphs, on a GPU with the stand-in's engine: the answers are eager's whatever comes between replays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import report
from trt_dynamo.runtime import cuda_graphs

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

both = pytest.mark.parametrize("mode", ["auto", "whole"])


class Net(nn.Module):
    """Two segments, and an operation in eager between them that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.rand(32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.erf(self.first(x).relu() * self.scale)
        result: Tensor = self.second(y).softmax(-1)
        return result


def net() -> Net:
    torch.manual_seed(0)
    return Net().cuda().eval()


def fast_of(model: Callable[..., Any], mode: str, **options: Any) -> Callable[..., Any]:
    return compiled(model, cuda_graphs=mode, eager_ops="aten.erf", **options)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@both
@pytest.mark.parametrize("options", [{}, {"weights": "frozen"}, {"weights": "inputs"}, {"weights_check": "observed"}])
def test_replays_answer_as_eager_does(mode: str, options: dict[str, Any]) -> None:
    model = net()
    fast = fast_of(model, mode, **options)
    kept = []
    for _ in range(12):
        x = torch.randn(4, 16, device="cuda")
        kept.append((fast(x), model(x)))
    for ours, eager in kept:  # no replay wrote over a result that somebody still has
        assert_same(ours, eager)
    found = report()
    assert found["eager_calls"] == 0 and found["engine_calls"] == 24
    assert found["cuda_graphs"] >= 1 and found["replays"] >= (9 if mode == "whole" else 12)


@both
def test_sizes_outside_the_profile_end_no_graphs(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode, rebuild="never", weights="frozen", dynamic=True)
    for rows in (4, *[1 << 17] * 8, *[4] * 8):
        x = torch.randn(rows, 16, device="cuda")
        assert_same(fast(x), model(x))
    found = report()
    assert found["eager_calls"] == 16 and found["cuda_graphs"] >= 1 and found["replays"] > 0


@both
def test_inputs_that_move_are_copied(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode, weights="frozen")
    buffers = [torch.randn(5, 16, device="cuda") for _ in range(3)]
    buffers.append(torch.randn(16, 5, device="cuda").t())
    buffers.append(torch.randn(81, device="cuda")[1:].view(5, 16))
    for turn in range(40):
        x = buffers[turn % len(buffers)]
        x.add_(0.1)
        assert_same(fast(x), model(x))
    assert report()["replays"] > 0


@both
def test_an_input_that_stays_is_not_copied(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    fast = fast_of(model, mode)
    x = torch.randn(4, 16, device="cuda")
    with caplog.at_level("INFO", "trt_dynamo.runtime.cuda_graphs"):
        for _ in range(10):
            x.normal_()
            assert_same(fast(x), model(x))
    lines = [record.getMessage() for record in caplog.records if "captured" in record.getMessage()]
    assert any(" 0 of " in line for line in lines), lines


@both
def test_more_shapes_than_graphs(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode, cuda_graphs_kept=3)
    for turn in range(60):
        x = torch.randn(2 + turn % 5, 16, device="cuda")
        assert_same(fast(x), model(x))


CHANGES: dict[str, Callable[[Net], object]] = {
    "in place": lambda m: m.first.weight.mul_(1.5),
    "through data": lambda m: m.second.weight.data.add_(0.5),
    "between engines": lambda m: m.scale.data.mul_(-1),
    "new memory": lambda m: setattr(m.first.weight, "data", torch.randn_like(m.first.weight)),
    "new parameter": lambda m: setattr(m, "scale", nn.Parameter(torch.rand(32, device="cuda"))),
    "loaded": lambda m: m.load_state_dict(Net().cuda().state_dict()),
}


@both
@pytest.mark.parametrize("weights", ["auto", "inputs"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_replays(mode: str, weights: str, change: str) -> None:
    model = net()
    fast = fast_of(model, mode, weights=weights)
    x = torch.randn(4, 16, device="cuda")
    for turn in range(30):
        if turn % 10 == 9:
            CHANGES[change](model)
        x.normal_()
        assert_same(fast(x), model(x))
    assert report()["replays"] > 6


@both
def test_training_between_evaluations(mode: str) -> None:
    model = net()
    twin = copy.deepcopy(model)
    fast = fast_of(model, mode)
    runs: tuple[Callable[..., Any], ...] = (fast, twin)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(4):
        x = torch.randn(8, 16, device="cuda")
        with torch.enable_grad():
            for run, optimizer in zip(runs, optimizers, strict=True):
                optimizer.zero_grad()
                run(x).square().sum().backward()
                optimizer.step()
        for _ in range(8):
            x = torch.randn(4, 16, device="cuda")
            assert_same(fast(x), twin(x))
    assert report()["replays"] > 0


@both
def test_streams_and_threads(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode)
    fast(torch.randn(4, 16, device="cuda"))
    torch.cuda.synchronize()

    def work(seed: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if seed % 4 else torch.cuda.default_stream()):
            for turn in range(40):
                x = torch.randn(3 + turn % 2, 16, device="cuda")
                assert_same(fast(x), model(x))

    in_threads(8, work)
    assert report()["replays"] > 0


def test_a_whole_call_with_an_operation_that_must_wait_for_the_gpu_is_not_captured() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.nonzero(x.exp() > 1)
        return found, x * 2 + 1

    fast = compiled(f, cuda_graphs="whole")
    for _ in range(10):
        x = torch.randn(4, 5, device="cuda")
        for ours, eager in zip(fast(x), f(x), strict=True):
            assert_same(ours, eager)
    assert report()["engine_calls"] > 0


def test_random_numbers_are_eagers() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.dropout(x * 2 + 1, 0.5, True).exp()

    fast = compiled(f, cuda_graphs="whole")
    x = torch.randn(64, 64, device="cuda")
    fast(x)
    torch.manual_seed(3)
    expected = [f(x) for _ in range(8)]
    torch.manual_seed(3)
    for each in expected:
        assert_same(fast(x), each)


@both
def test_inputs_that_are_mutated_and_results_that_alias(mode: str) -> None:
    def f(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state.add_(1)
        y = (x * state).exp()
        return y, y[0], x.view(-1)

    fast = compiled(f, cuda_graphs=mode)
    ours, eager = (torch.zeros(4, device="cuda") for _ in range(2))
    for _ in range(10):
        x = torch.randn(3, 4, device="cuda")
        for a, b in zip(fast(x, ours), f(x, eager), strict=True):
            assert_same(a, b)
        assert_same(ours, eager)


@both
def test_inference_mode(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode)
    with torch.inference_mode():
        for _ in range(10):
            x = torch.randn(4, 16, device="cuda")
            assert_same(fast(x), model(x))
    assert report()["replays"] > 0


@both
def test_a_replay_makes_the_host_wait_for_nothing(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode, weights="frozen")
    x = torch.randn(4, 16, device="cuda")
    for _ in range(10):
        fast(x)
    torch.cuda.synchronize()
    before = report()["replays"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            fast(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report()["replays"] >= before + 10


@both
def test_memory_does_not_grow(mode: str) -> None:
    model = net()
    fast = fast_of(model, mode, cuda_graphs_kept=2)
    sizes = [2, 3, 5, 8, 13]

    def call(turn: int) -> None:
        fast(torch.randn(sizes[turn % len(sizes)], 16, device="cuda"))

    for turn in range(300):
        call(turn)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for turn in range(600):
        call(turn)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] <= before[0] + 2**16 and after[1] <= before[1] + 2**22


def test_a_user_captures_what_is_replayed_otherwise() -> None:
    model = net()
    fast = fast_of(model, "whole", weights="frozen")
    x = torch.randn(4, 16, device="cuda")
    for _ in range(6):
        fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_same(y, model(x))


def test_a_capture_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(cuda_graphs, "check_results", refuse)
    model = net()
    fast = fast_of(model, "auto")
    for _ in range(8):
        x = torch.randn(4, 16, device="cuda")
        assert_same(fast(x), model(x))
    assert report()["replays"] == 0 and report()["eager_calls"] == 0


def test_a_whole_call_keeps_the_layout_of_inputs_that_move() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.erf(x)
            z = y.relu() + 1
            return self.conv(z).relu(), z

    model = Image().cuda().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast = fast_of(model, "whole", weights="frozen")
    for turn in range(12):
        x = torch.randn(2 + turn % 2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        for ours, eager in zip(fast(x), model(x), strict=True):
            assert ours.stride() == eager.stride()
            assert_same(ours, eager)
