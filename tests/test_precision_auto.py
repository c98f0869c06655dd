"""precision=auto: what recorded values keep in float32, and where that is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trt_dynamo
from tests.compiled import compiled
from tests.precision_cases import cosine
from trt_dynamo import Settings
from trt_dynamo.cache import open_store
from trt_dynamo.precision.magnitudes import Magnitude, measured
from trt_dynamo.precision.recording import RECORDED
from trt_dynamo.reports import report


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    RECORDED.clear()
    yield
    RECORDED.clear()


def test_a_magnitude_tells_what_does_not_fit() -> None:
    half = torch.float16

    def misfit(values: Tensor) -> str:
        return Magnitude(*measured(values, half).tolist()).misfit(half)

    torch.manual_seed(0)
    assert misfit(torch.randn(1000)) == misfit(torch.zeros(3)) == misfit(torch.empty(0)) == ""
    assert misfit(torch.tensor([1.0, torch.inf, torch.nan, 16000])) == ""
    assert "reach 1.7e+04" in misfit(torch.tensor([1.0, -17000]))
    assert "would change it" in misfit(torch.randn(1000) * 1e-6)
    assert misfit(torch.cat([torch.randn(1000), torch.randn(1000) * 1e-9])) == ""
    both = Magnitude(1, 0.5, 0.1) | Magnitude(2, 0.7, 0.05)
    assert both == Magnitude(2, 0.5, 0.1)


class Logits(nn.Module):
    """Logits of about 1e6 from inputs of about 1, for a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.grow = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        big = self.grow(self.body(x).relu() * 300) * 9000
        result: Tensor = self.head(big).mul(1e-6).tanh() + self.body(x)[:, :4]
        return result


def overflowing() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return Logits().eval(), torch.randn(8, 16)


def test_an_overflow_is_seen_and_kept_out() -> None:
    model, x = overflowing()
    with torch.no_grad():
        naive = compiled(model, precision="fp16", cache="off")(x)
        assert not cosine(naive, model(x)) > 0.999
        torch._dynamo.reset()
        fast = compiled(model, precision="auto", calibration_calls=3, strict=True, cache="off")
        for _ in range(5):
            assert cosine(fast(x), model(x)) > 0.999
    assert report()["eager_reasons"] == {"precision=auto records the values": 3}
    assert report()["engine_calls"] >= 2


def test_calibrate_tells_what_stays_and_spares_the_first_calls() -> None:
    model, x = overflowing()
    found = trt_dynamo.calibrate(model, [x, (x * 0.5,), {"x": x[:3]}], options={"min_segment_nodes": 1})
    assert found.batches == 3 and any("its values reach" in kept.reason for kept in found.kept)
    assert "float16 ends at 6.55e+04" in str(found)
    told = trt_dynamo.explain(model, x, options={"precision": "auto", "min_segment_nodes": 1})
    (precision,) = told.precision
    assert precision.recorded and {k.reason for k in precision.chosen.kept} <= {k.reason for k in found.kept}
    fast = compiled(model, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        assert cosine(fast(x), model(x)) > 0.999
    assert report()["eager_calls"] == 0
    with pytest.raises(ValueError, match="no batch"):
        trt_dynamo.calibrate(model, [])


def test_small_values_are_kept_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), torch.randn(4, 8) * 1e-7
    found = trt_dynamo.calibrate(model, [x], options={"min_segment_nodes": 1})
    assert any("rounding to float16" in kept.reason for kept in found.kept)
    fast = compiled(model, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        assert cosine(fast(x), model(x)) > 0.9999


def test_the_choice_lies_beside_the_engine_and_two_choices_never_share_one(tmp_path: Path) -> None:
    model, x = overflowing()
    options: dict[str, Any] = {"precision": "auto", "strict": True, "cache_dir": tmp_path}
    with torch.no_grad():
        fast = compiled(model, calibration_calls=1, **options)
        fast(x), fast(x)
        assert report()["engines_built"] == 1
        RECORDED.clear()  # as in another process
        torch._dynamo.reset()
        again = compiled(model, **options)
        assert cosine(again(x), model(x)) > 0.999
        assert report()["cache_hits"] == 1 and report()["eager_calls"] == 1
        (entry,) = open_store(Settings(cache_dir=tmp_path)).entries()
        assert entry.manifest["precision"]["misfits"]
        RECORDED.clear()
        torch._dynamo.reset()
        trt_dynamo.calibrate(model, [x * 1e-3], options={"min_segment_nodes": 1})  # another choice
        other = compiled(model, **options)
        other(x * 1e-3)
        assert report()["engines_built"] == 2


def test_what_was_recorded_serves_other_sizes() -> None:
    model, x = overflowing()
    trt_dynamo.calibrate(model, [x], options={"min_segment_nodes": 1})
    fast = compiled(model, dynamic=True, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        for size in (8, 5, 3):
            assert cosine(fast(x[:size]), model(x[:size])) > 0.999
    assert report()["eager_calls"] == 0


class Rotated(nn.Module):
    """Complex numbers between two products, and a buffer of them."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.randn(6, 4)))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.layer(x).unflatten(-1, (4, 2)).contiguous()) * self.turns
        result: Tensor = self.layer(torch.view_as_real(pairs).flatten(-2))
        return result


@pytest.mark.parametrize("precision", ["fp16", "auto"])
def test_complex_numbers_stay_and_one_engine_serves_many_sizes(precision: str) -> None:
    model = Rotated().eval()
    fast = compiled(model, dynamic=True, precision=precision, calibration_calls=1, strict=True, cache="off")
    with torch.no_grad():
        fast(torch.randn(4, 6, 8))
        for size in (2, 5, 3):
            x = torch.randn(size, 6, 8)
            assert cosine(fast(x), model(x)) > 0.9999
    assert report()["engines_built"] == 1
