"""What depends on weights alone is computed where it is read: no segment gives another a transposed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled
from trt_dynamo import report
from trt_dynamo.runtime import SegmentRunner


class Chain(nn.Module):
    """Engines with an operation in eager between each two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.erf(layer(x).relu())
        return x


class Tied(nn.Module):
    """One weight, transposed and cut, for several engines, and for eager too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        turned = self.weight.t()
        first, second = self.bias.split(6)
        x = torch.erf(x @ turned + first)
        x = torch.erf(x @ turned[:, :6] + second)
        result: Tensor = torch.erf(turned) + (x @ turned + first * second)
        return result


class Mask(nn.Module):
    """A mask made of nothing, read by two engines."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(6, 6).tril().bool()
        scores = torch.erf(x.masked_fill(~mask, -1.0) * 2)
        return (scores + 1).masked_fill(~mask, 0.0).exp()


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The shapes of what each segment gives, in order of the segments' making."""
    found: list[list[tuple[int, ...]]] = []
    start = SegmentRunner.__init__

    def note(self: SegmentRunner, name: str, module: Any, *args: Any, **keywords: Any) -> None:
        start(self, name, module, *args, **keywords)
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        found.append([tuple(node.meta["val"].shape) for node in output.args[0]])

    monkeypatch.setattr(SegmentRunner, "__init__", note)
    return found


@pytest.mark.parametrize("weights", ["auto", "inputs"])
@pytest.mark.parametrize(("make", "given"), [(Chain, 1), (Tied, 1), (Mask, 1)])
def test_a_segment_gives_what_it_computed_and_no_view_of_a_weight(
    make: Callable[[], nn.Module], given: int, weights: str, results: list[list[tuple[int, ...]]]
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    fast = compiled(model, eager_ops="aten.erf", weights=weights)
    x = torch.randn(6, 6)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_same(fast(x), model(x))
    assert report()["eager_calls"] == 0
    extra = [each for each in results[1:] if len(each) > given]
    assert len(results) >= 2 and not extra, results
