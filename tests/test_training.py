"""Graphs that a backward pass may follow: nothing of ours in them, and a hint where they look like an evaluation."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.reports import report


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


def hints(caplog: pytest.LogCaptureFixture) -> int:
    return sum("torch.no_grad()" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("training", ["eager", "inductor"])
def test_a_training_loop_with_evaluations(training: str) -> None:
    """Losses, weights, and running statistics are eager's after every step; evaluations in between use engines."""
    eager = network()
    eager(torch.randn(2, 3, 8, 8))
    model = copy.deepcopy(eager)
    fast: Any = compiled(model, training=training, rebuild_after=0)
    pair: tuple[Any, Any] = (eager, fast)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, model)]
    for _ in range(3):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
        losses = []
        for module, optimizer in zip(pair, optimizers, strict=True):
            module.train()
            loss = nn.functional.cross_entropy(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_same(*losses)
        eager.eval()
        fast.eval()
        with torch.no_grad():
            assert_same(fast(x), eager(x))
        for mine, its in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
            assert_same(mine, its)
    assert engine_calls() >= 3
    assert report()["eager_graphs"] == {"a backward pass may follow": 1}


def test_evaluation_with_gradients_on_is_answered_in_eager_with_one_hint(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
    fast = compiled(model)
    for n in (2, 3):
        x = torch.randn(n, 3)
        result = fast(x)
        assert_same(result, model(x))
        assert result.requires_grad
    assert hints(caplog) == 1
    with torch.no_grad():
        assert_same(fast(x), model(x))
    assert engine_calls() == 1


@pytest.mark.parametrize("flag", ["train", "eval", "no_grad"])
def test_the_hint_comes_for_evaluations_only(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(flag == "train")
    with caplog.at_level(logging.WARNING), torch.set_grad_enabled(flag != "no_grad"):
        compiled(model)(torch.randn(4, 3))
    assert hints(caplog) == (flag == "eval")


def test_no_hint_without_a_sign(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing in this graph says whether the model trains."""
    compiled(nn.Linear(3, 3))(torch.randn(4, 3))
    assert hints(caplog) == 0


def test_frozen_weights_need_no_gradients() -> None:
    model = network()
    model(torch.randn(2, 3, 8, 8))
    model.eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert_same(compiled(model)(x), model(x))
    assert engine_calls() == 1
