"""Parameters that get another shape or other strides in place, seen by Dynamo's guards or by ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled
from trt_dynamo import report
from trt_dynamo.runtime import layouts
from trt_dynamo.runtime.layouts import OTHER_LAYOUT, SameLayouts, with_same_layouts

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed where it lies": lambda w: w.t(),
    "a part of where it lies": lambda w: w[:2],
    "larger": lambda w: torch.randn(6, 4),
    "other strides": lambda w: torch.randn(4, 4).t(),
}


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()).eval()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", [{}, {"weights_check": "observed"}, {"weights": "inputs"}], ids=str)
def test_data_of_another_layout(options: dict[str, Any], change: Callable[[Tensor], Tensor]) -> None:
    eager = model()
    fast, weight = compiled(eager, **options), eager[0].get_parameter("weight")
    before = weight.data
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same(fast(x), eager(x))
        for data in (change(before), before, change(before)):
            weight.data = data
            for _ in range(3):
                assert_same(fast(x), eager(x))
    assert report()["engine_calls"] >= 4


def traced(*args: Tensor) -> torch.fx.GraphModule:
    return torch.fx.experimental.proxy_tensor.make_fx(lambda w, x: torch.mm(x, w.t()), tracing_mode="fake")(*args)


def test_the_check_itself() -> None:
    """On each torch: those that need it are not all at hand where this runs."""
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    served: list[str] = []

    def run(args: list[Tensor]) -> tuple[Tensor, ...]:
        served.append("engine")
        return (args[1] @ args[0].t(),)

    check = SameLayouts(run, traced(w, x))
    for weight, by_engine in ((w, True), (w.t(), False), (torch.randn(6, 4), False), (w + 1, True)):
        served.clear()
        (result,) = check([weight, x]) if by_engine else (check([weight, x]),)
        assert_same(result, x @ weight.t())
        assert bool(served) == by_engine
    assert report()["eager_reasons"][OTHER_LAYOUT] == 2
    with torch.inference_mode():  # another state of the thread, but the same layouts
        served.clear()
        check([w, x])
        assert served


def test_where_guards_see_it_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, run = traced(torch.randn(4, 4), torch.randn(3, 4)), lambda args: args
    monkeypatch.setattr(layouts, "GUARDED", True)
    assert with_same_layouts(run, graph) is run
    monkeypatch.setattr(layouts, "GUARDED", False)
    assert isinstance(with_same_layouts(run, graph), SameLayouts)
