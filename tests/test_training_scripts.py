"""Random training scripts: steps, evaluations, changes of weights of every kind, copies, switches of mode. Each answer,
each gradient and each state equals that of the same script in eager.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import compiled
from tests.test_weight_changes import CHANGES
from trt_dynamo.reports import report

# These keep or make something of their own that two models cannot share step by step.
OWN_NUMBERS = {"in_another_thread", "swap_data_with_another"}


class Net(nn.Module):
    """Has what the changes of `test_weight_changes` reach for, and what trains, drops out and counts."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x)) + self.shift
        return self.head(self.norm(y)) + y  # type: ignore[no-any-return]


class Script:
    """One run of a script; two of the same seed, one compiled, must agree at every step."""

    def __init__(self, seed: int, compile: Callable[[Any], Any]) -> None:
        torch.manual_seed(seed)
        self.compile = compile
        self.model, self.average = Net(), Net()
        self.run, self.run_average = compile(self.model), compile(self.average)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.kept = copy.deepcopy(self.model.state_dict())

    def evaluate(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.model.eval(), self.average.eval()
        with torch.no_grad():
            return [self.run(x), self.run_average(x)]

    def evaluate_in_inference_mode(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.average.eval()
        with torch.inference_mode():
            return [self.run_average(x).clone()]

    def evaluate_with_gradients_on(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.model.eval()
        x = x.clone().requires_grad_()
        y = self.run(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return [y.detach(), gradient]

    def forward_in_train_mode(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.model.train()
        self.model.head[2].eval()  # the order of random numbers is eager's own
        with torch.no_grad():
            return [self.run(x), *self.model.buffers()]

    def step(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.run(x).square().mean()
        loss.backward()
        self.optimizer.step()
        return [loss.detach(), *[p.detach().clone() for p in self.model.parameters()]]

    def another_optimizer(self, x: torch.Tensor) -> list[torch.Tensor]:
        fused = len(x) % 2 == 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        return []

    def move_the_average(self, x: torch.Tensor) -> list[torch.Tensor]:
        for mine, its in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mine.data.mul_(0.7).add_(its.data, alpha=0.3)
        return []

    def swap_with_the_average(self, x: torch.Tensor) -> list[torch.Tensor]:
        for mine, its in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mine.data, its.data = its.data, mine.data
        return []

    def save_and_load(self, x: torch.Tensor) -> list[torch.Tensor]:
        now = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.kept)
        self.kept = now
        return []

    def copy_the_model(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.average = copy.deepcopy(self.model)
        self.run_average = self.compile(self.average)
        return []

    def merge_and_unmerge(self, x: torch.Tensor) -> list[torch.Tensor]:
        delta = torch.outer(x[0], x[-1]) * 0.1
        self.model.linear.weight.data += delta
        merged = self.evaluate(x)
        self.model.linear.weight.data -= delta
        return merged

    def freeze_or_thaw(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.model.linear.requires_grad_(not self.model.linear.weight.requires_grad)
        return []

    def change(self, x: torch.Tensor) -> list[torch.Tensor]:
        changes = [change for change in CHANGES if change.__name__ not in OWN_NUMBERS]
        changes[int(x.abs().sum() * 1000) % len(changes)](self.model)
        return []


ACTIONS = [
    Script.evaluate, Script.evaluate, Script.evaluate, Script.evaluate_in_inference_mode,
    Script.evaluate_with_gradients_on, Script.forward_in_train_mode, Script.step, Script.step, Script.another_optimizer,
    Script.move_the_average, Script.swap_with_the_average, Script.save_and_load, Script.copy_the_model,
    Script.merge_and_unmerge, Script.freeze_or_thaw, Script.change, Script.change,
]  # fmt: skip


def assert_equal(found: Any, wanted: Any, what: str) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize(
    "options", [{}, {"weights": "inputs"}, {"rebuild": "background", "max_weight_sets": 1}], ids=str
)
def test_a_random_script(seed: int, options: dict[str, Any]) -> None:
    eager = Script(seed, lambda model: model)
    ours = Script(seed, lambda model: compiled(model, **options))
    choice = random.Random(seed)
    for place in range(40):
        action = choice.choice(ACTIONS)
        torch.manual_seed(1000 * seed + place)
        x = torch.randn(choice.choice([4, 5, 8]), 6)
        torch.manual_seed(place)
        wanted = action(eager, x)
        torch.manual_seed(place)
        found = action(ours, x)
        what = f"{action.__name__} at {place}"
        assert_equal(found, wanted, what)
        assert_equal(ours.model.state_dict().values(), eager.model.state_dict().values(), what)
    assert report()["engine_calls"] > 0
