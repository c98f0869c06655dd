"""Whole models through the whole backend: engines, nodes left to eager, and the difference from eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.models import MODELS
from tests.compiled import compiled
from trt_dynamo import explain
from trt_dynamo.reports import report

SMALL: dict[str, dict[str, int]] = {
    "resnet18": {},
    "mobilenet": {},
    "bert": {"layers": 2, "hidden": 128, "length": 12},
    "gpt2": {"layers": 2, "hidden": 128, "length": 12},
    "vit": {"layers": 2, "hidden": 128},
}


def tensors_of(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


def relative_error(actual: Any, expected: Any) -> float:
    errors = [
        float((a - e).abs().max() / e.abs().max().clamp_min(1e-6))
        for a, e in zip(tensors_of(actual), tensors_of(expected), strict=True)
    ]
    return max(errors)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_at_most_two_engines_and_equals_eager(name: str, dynamic: bool) -> None:
    model, args = MODELS[name](**SMALL[name])
    told = explain(model, *args, options={"min_segment_nodes": 1}, dynamic=dynamic or None)
    assert not told.eager, str(told)
    assert len(told.segments) <= 2, str(told)
    fast = compiled(model, dynamic=dynamic or None)
    with torch.no_grad():
        assert relative_error(fast(*args), model(*args)) < 1e-4
    assert report()["eager_calls"] == 0 and report()["engine_calls"] > 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_one_dynamic_engine_serves_many_sizes(name: str) -> None:
    model, args = MODELS[name](**SMALL[name])
    fast = compiled(model)
    for arg in args:
        torch._dynamo.mark_dynamic(arg, 0, min=2, max=8)
        torch._dynamo.mark_dynamic(arg, 1, min=2, max=40)
    with torch.no_grad():
        assert relative_error(fast(*args), model(*args)) < 1e-4
        for batch, length in ((3, 40), (8, 5), (2, 2)):
            sized = [torch.ones(batch, length, dtype=arg.dtype).cumsum(1) % 90 for arg in args]
            if len(sized) > 1:
                sized[1] = (torch.arange(length)[None] <= torch.arange(batch)[:, None]).long()
            assert relative_error(fast(*sized), model(*sized)) < 1e-4
    assert report()["graphs"] == 1 and report()["eager_calls"] == 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_one_dynamic_engine_serves_many_batches(name: str) -> None:
    model, (images,) = MODELS[name](**SMALL[name])
    fast = compiled(model)
    with torch.no_grad():
        for batch in (8, 5, 3, 2, 7):
            sized = torch.randn(batch, *images.shape[1:])
            assert relative_error(fast(sized), model(sized)) < 1e-4
    assert report()["graphs"] <= 3 and report()["eager_calls"] == 0
