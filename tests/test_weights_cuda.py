"""Weights that change on a GPU, with the stand-in engine: what only the content tells, streams, CUDA graphs. Run by
hand: make test-cuda.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.compiled import assert_same, compiled, in_threads
from tests.test_weight_changes import CHANGES, Block, optimizers, write_through_numpy
from trt_dynamo.reports import report

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ON_CUDA = [change for change in CHANGES if change is not write_through_numpy]
# torch has no fused Adagrad for CUDA.
STEPS = [step for step in optimizers() if not step.__name__.startswith("Adagrad") or "fused" not in step.__name__]


@pytest.fixture(autouse=True)
def default_device() -> Any:
    """What the changes make, they make on the GPU."""
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("change", [*ON_CUDA, *STEPS], ids=lambda change: change.__name__)
def test_a_change_is_seen_before_the_next_answer(change: Callable[[Any], None]) -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = fast(x)
    for turn in range(2):
        change(model)
        with torch.no_grad():
            wanted = model(x)
            assert turn or not torch.equal(before, wanted)
            for _ in range(2):
                assert_same(fast(x), wanted)
    assert report()["engine_calls"] >= 4


def test_a_write_that_is_still_to_come_on_the_stream() -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                for _ in range(3):
                    torch.cuda._sleep(50_000_000)
                    model.linear.weight.data.mul_(1.5)
                    assert_same(fast(x), model(x))
            torch.cuda.default_stream().wait_stream(stream)


def test_a_replayed_graph_of_the_user_writes_the_weights() -> None:
    model = Block()
    fast = compiled(model)
    x, factor = torch.randn(3, 6), torch.tensor(1.5)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model.linear.weight.data.mul_(factor)
    with torch.no_grad():
        for _ in range(4):
            assert_same(fast(x), model(x))
            graph.replay()
    assert report()["refits"] == 3


def test_an_optimizer_in_a_graph() -> None:
    model = Block()
    fast = compiled(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), capturable=True)
    x = torch.randn(3, 6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        with torch.no_grad():
            assert_same(fast(x), model(x))
        graph.replay()
    with torch.no_grad():
        assert_same(fast(x), model(x))


def test_a_captured_call_follows_the_weights() -> None:
    """A replay asks nobody whether a weight changed."""
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            fast(x), model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = fast(x)
    for _ in range(3):
        graph.replay()
        with torch.no_grad():
            assert_same(y, model(x))
            model.linear.weight.data.mul_(1.5)
            assert_same(fast(x), model(x))


def test_threads_with_streams_of_their_own_share_the_weights() -> None:
    models = [Block(), Block()]
    fast = [compiled(model) for model in models]
    x = torch.randn(3, 6)

    def work(index: int) -> None:
        model, run = models[index], fast[index]
        with torch.device("cuda"), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                assert torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5)
                model.linear.weight.data.mul_(1.01)

    torch.cuda.synchronize()
    in_threads(2, work)


def test_the_look_at_the_weights_is_no_synchronization_of_the_device() -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype, says torch
            torch.cuda.set_sync_debug_mode("error")
        try:
            answer = fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(answer, model(x))
