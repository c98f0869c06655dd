"""Several GPUs in one process: each engine on its own, and the current device stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import report

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

WAYS: list[dict[str, Any]] = [{}, {"weights": "inputs"}, {"cuda_graphs": "auto"}, {"cuda_graphs": "whole"}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.erf(self.first(x)).relu())
        return result


def nets() -> list[Net]:
    torch.manual_seed(0)
    return [Net().eval().to(f"cuda:{index}") for index in range(2)]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("current", [0, 1])
def test_each_model_runs_on_its_own_gpu_whatever_is_current(options: dict[str, Any], current: int) -> None:
    models = nets()
    fast = [compiled(model, eager_ops="aten.erf", **options) for model in models]
    with torch.no_grad(), torch.cuda.device(current):
        for turn in range(12):
            for index, (run, model) in enumerate(zip(fast, models, strict=True)):
                x = torch.randn(4 + turn % 2, 16, device=f"cuda:{index}")
                y = run(x)
                assert y.device.index == index and torch.cuda.current_device() == current
                assert_same(y, model(x))
    assert report()["eager_calls"] == 0


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_weights_that_change_on_either_gpu(options: dict[str, Any]) -> None:
    models = nets()
    fast = [compiled(model, eager_ops="aten.erf", **options) for model in models]
    with torch.no_grad():
        for turn in range(16):
            for index, (run, model) in enumerate(zip(fast, models, strict=True)):
                if turn % 5 == 4:
                    model.first.weight.data.mul_(1.2 + index)
                x = torch.randn(4, 16, device=f"cuda:{index}")
                assert_same(run(x), model(x))


def test_one_class_on_two_gpus_through_one_compiled_function() -> None:
    def f(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model(x) * 2
        return result

    fast = compiled(f)
    with torch.no_grad():
        for _ in range(4):
            for index, model in enumerate(nets()):
                x = torch.randn(4, 16, device=f"cuda:{index}")
                assert_same(fast(model, x), f(model, x))


def test_a_model_that_moves() -> None:
    model = nets()[0]
    fast = compiled(model)
    with torch.no_grad():
        for index in (0, 1, 0):
            model.to(f"cuda:{index}")
            x = torch.randn(4, 16, device=f"cuda:{index}")
            assert_same(fast(x), model(x))


def test_a_model_over_two_gpus() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32).to("cuda:0"), nn.Linear(32, 8).to("cuda:1")

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x).relu().to("cuda:1"))
            return result

    model = Split().eval()
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 16, device="cuda:0")
            y = fast(x)
            assert y.device.index == 1
            assert_same(y, model(x))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_thread_for_each_gpu(options: dict[str, Any]) -> None:
    models = nets()
    fast = [compiled(copy.deepcopy(model), eager_ops="aten.erf", **options) for model in models]
    with torch.no_grad():
        for index in range(2):
            fast[index](torch.randn(4, 16, device=f"cuda:{index}"))

    def work(seed: int) -> None:
        index = seed % 2
        torch.cuda.set_device(index)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(index)):
            for _ in range(30):
                x = torch.randn(4, 16, device=f"cuda:{index}")
                assert_same(fast[index](x), models[index](x))

    in_threads(4, work)
