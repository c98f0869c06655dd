"""The setting `float64`: what it moves into engines, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import explain
from trt_dynamo.settings import Settings
from trt_dynamo.testing import check

NARROW = Settings(min_segment_nodes=0, strict=True, float64="float32")
SIZES = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])

# Functions of a float32 tensor: how many nodes stay in eager.
STRAY: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
    "softmax": (lambda x: x.double().softmax(-1).float(), 0),
    "power": (lambda x: torch.float_power(x, 2).float(), 0),
    "logspace": (lambda x: x * torch.logspace(0, 1, 4, dtype=torch.float64).float(), 0),
    "mean": (lambda x: x.mean(-1, dtype=torch.float64).float(), 0),
    "mask": (lambda x: x.double().masked_fill(x > -9, torch.finfo(torch.float64).min).softmax(-1).float(), 0),
    "constant": (lambda x: (x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).float(), 0),
    "integers": (lambda x: (x > 0).long().double().div(3).long(), 0),
    "indices": (lambda x: (x.double().argmax(-1), x.double().sort(-1).indices), 0),
    "transform": (lambda x: torch.fft.rfft(x.double()).abs().float(), 0),
    "result": (lambda x: x.double() * 2, 1),
    "views of a result": (lambda x: [y := x.double() * 2, y.view(-1)], 2),
    "bits": (lambda x: x.double().view(torch.int64), 2),
}


@SIZES
@pytest.mark.parametrize("name", STRAY)
def test_stray_float64_goes_into_the_engine(name: str, dynamic: bool) -> None:
    function, eager = STRAY[name]
    x = torch.tensor([[0.5, 1.0, 2.0, 0.25], [4.0, 0.0, 1.5, 3.0]])
    checked = check(function, x, dynamic=dynamic, whole=False, settings=NARROW, rtol=1e-5, atol=1e-6)
    assert sum(not v.ok for v in checked.partitioned.verdicts) == eager
    assert checked.networks or name == "bits"


@SIZES
def test_a_double_model_keeps_its_dtypes(dynamic: bool) -> None:
    first = torch.nn.Linear(8, 16)
    model = torch.nn.Sequential(first, torch.nn.GELU(), torch.nn.LayerNorm(16)).double().eval()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        fast = compiled(model, dynamic=dynamic, float64="float32")
        for scale in (1, 2):
            assert_same(fast(x), model(x))
            assert engine_calls() == scale
            first.weight.mul_(2)
        assert fast(x).dtype is torch.float64


def test_by_default_it_stays_in_eager() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.double().exp().sum()

    assert not explain(f, torch.randn(3), options={"min_segment_nodes": 0}).segments
    assert explain(f, torch.randn(3), options={"min_segment_nodes": 0, "float64": "float32"}).segments
    with torch.no_grad():
        x = torch.randn(1000)
        assert torch.equal(compiled(f)(x), f(x))


@pytest.mark.parametrize("float64", ["eager", "float32"])
def test_pythons_floats_still_go_in(float64: str) -> None:
    def f(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale + scale**2

    with torch.no_grad():
        fast = compiled(f, dynamic=True, float64=float64)
        for scale in (0.5, 1.5, 1e-3):
            x = torch.randn(3)
            assert_same(fast(x, scale), f(x, scale))


def test_a_scalar_tensor_goes_in_as_float32() -> None:
    x, scale = torch.randn(3), torch.tensor(2.5, dtype=torch.float64)
    check(lambda x, s: (x * s + s * s).sin(), x, scale, settings=NARROW)


def test_random_numbers_are_eagers() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.rand(3, dtype=torch.float64) * 2 + x.exp()

    x = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(1)
        got = compiled(f, float64="float32")(x)
        torch.manual_seed(1)
        assert_same(got, f(x))
    assert engine_calls() == 1


def test_writes_and_views_of_arguments_are_kept() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x.mul_(2)
        return x[0], x.exp() + 1

    x = torch.randn(2, 3, dtype=torch.float64)
    other = x.clone()
    with torch.no_grad():
        got, want = compiled(f, float64="float32")(x), f(other)
    assert_same(got, want)
    assert_same(x, other)
    assert got[0].data_ptr() == x.data_ptr() and engine_calls() == 1


def test_complex128_becomes_pairs_of_float32() -> None:
    x = torch.randn(3, dtype=torch.complex128)
    with torch.no_grad():
        assert_same(compiled(lambda x: x * x + 1j, float64="float32")(x), x * x + 1j)
    assert engine_calls() == 1
