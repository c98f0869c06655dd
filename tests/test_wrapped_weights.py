"""Weights under parametrizations, adapters, averages, hooks and other hands: no answer is stale or another model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.compiled import assert_same, compiled, engine_calls
from tests.test_wrappers import Net, agree


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class LowRank(nn.Module):
    """A linear layer with an adapter that can be merged into its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return torch.tanh(y if self.merged else y + x @ self.down.T @ self.up.T)

    def merge(self, sign: int) -> None:
        self.linear.weight.data += sign * self.up.data @ self.down.data
        self.merged = sign > 0


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "symmetric"])
def test_parametrizations(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
    if kind == "symmetric":
        parametrize.register_parametrization(model[0], "weight", Symmetric())
    else:
        getattr(parametrizations, kind)(model[0])
    model.eval()
    plain = copy.deepcopy(model)
    fast = compiled(model, strict=False)
    for _ in range(3):
        agree(fast, plain)
        with parametrize.cached(), torch.no_grad():
            x = torch.randn(4, 6)
            assert_same(fast(x), plain(x))
        with torch.no_grad():
            for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
                mine.add_(0.1)
                its.add_(0.1)


def test_an_adapter_is_merged_and_taken_out_again() -> None:
    model = LowRank().eval()
    plain = copy.deepcopy(model)
    fast = compiled(model)
    agree(fast, plain)
    for sign in (1, -1, 1, -1):
        for each in (model, plain):
            each.merge(sign)
        agree(fast, plain, times=3)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages_of_weights(average: str) -> None:
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if average == "ema" else None)
    fast, fast_average = compiled(model, rebuild_after=0), compiled(averaged, rebuild_after=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05)
    batches = [torch.randn(8, 6) for _ in range(3)]
    for _ in range(3):
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
        update_bn(batches, averaged)
        model.eval()
        averaged.eval()
        agree(fast, model)
        agree(fast_average, averaged)
    assert engine_calls() > 0


def test_functional_calls_with_other_weights() -> None:
    model = Net().eval()
    fast: Any = compiled(model)
    others = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(4)]
    with torch.no_grad():
        for _ in range(2):
            for weights in others:
                x = torch.randn(4, 6)
                expected = torch.func.functional_call(model, weights, (x,))
                inside = compiled(lambda w, a: torch.func.functional_call(model, w, (a,)))
                assert_same(inside(weights, x), expected)
                renamed = {f"_orig_mod.{name}": value for name, value in weights.items()}
                assert_same(torch.func.functional_call(fast, renamed, (x,)), expected)
    agree(fast, model)


def test_an_ensemble_by_vmap() -> None:
    models = [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval() for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(models)

    def ensemble(x: Tensor) -> Tensor:
        one: Callable[..., Any] = lambda w, b: torch.func.functional_call(models[0], (w, b), (x,))  # noqa: E731
        out: Tensor = torch.func.vmap(one)(weights, buffers)
        return out

    fast = compiled(ensemble, strict=False)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(4, 6)
            assert_same(fast(x), torch.stack([model(x) for model in models]))
            for value in weights.values():
                value.data.mul_(0.5)
            for model in models:
                for parameter in model.parameters():
                    parameter.data.mul_(0.5)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_between_calls(kind: torch.dtype) -> None:
    model = Net().eval()
    plain = copy.deepcopy(model)
    fast = compiled(model)
    tolerance = 1e-5 if kind is torch.float64 else 3e-2
    for dtype in (torch.float32, kind, torch.float32, kind):
        model.to(dtype)
        plain.to(dtype)
        with torch.no_grad():
            x = torch.randn(4, 6, dtype=dtype)
            torch.testing.assert_close(fast(x), plain(x), rtol=tolerance, atol=tolerance)


def test_gradients_are_switched_off_and_on() -> None:
    model = Net().eval()
    fast = compiled(model)
    x = torch.randn(4, 6)
    for wanted in (False, True, False, True):
        model.requires_grad_(wanted)
        out = fast(x)
        assert out.requires_grad is wanted
        assert_same(out, model(x))
    before = engine_calls()
    model.body.requires_grad_(False)
    fast(x).sum().backward()
    assert model.head.weight.grad is not None and engine_calls() == before > 0


def test_swapped_tensors() -> None:
    model = Net().eval()
    fast = compiled(model)
    agree(fast, model)
    old = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(Net().state_dict())
        agree(fast, model, times=3)
        model.to(torch.float64).to(torch.float32)
        agree(fast, model, times=3)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(old)


def test_hooks() -> None:
    """Those that are there at the first call: Dynamo does not look for hooks that come later."""
    seen: list[str] = []
    model = Net().eval()
    model.head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.body.register_forward_hook(lambda _, __, out: out + 1)
    hooked: Any = model
    hooked.register_state_dict_post_hook(lambda *_: seen.append("state"))
    fast: Any = compiled(model, strict=False)
    agree(fast, model)
    fast(torch.randn(4, 6)).sum().backward()
    fast.state_dict()
    assert seen == ["state"] * len(seen) != []
