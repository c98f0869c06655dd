"""A size computed from symbols that is 1 at every call: squeezed, broadcast and expanded as a 1 is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from tests.compiled import assert_same, compiled
from trt_dynamo.reports import report

Tensors = tuple[torch.Tensor, ...]


def pooled(x: torch.Tensor) -> torch.Tensor:
    """The mean of every four: the last size is `s // 4`, an expression that torch knows to be 1."""
    return F.avg_pool1d(x, 4)


def squeezed(x: torch.Tensor) -> Tensors:
    y = pooled(x)
    return y.squeeze() + 1, y.squeeze(-1) * 2, y.squeeze((1, 2)) - 1, F.layer_norm(y.squeeze(2), (3,))


def broadcast(x: torch.Tensor) -> Tensors:
    y = pooled(x)
    return y + x, x / (y + 9), torch.where(x > 0, y, x), y + torch.arange(5.0), y.transpose(1, 2) @ x


def expanded(x: torch.Tensor) -> Tensors:
    y = pooled(x)
    return y.expand(-1, -1, 7) * 2, y.expand_as(x) + 1, x.clone().copy_(y) * 2, y.expand_as(pooled(x + 1)) - 1


@pytest.mark.parametrize("model", [squeezed, broadcast, expanded])
def test_one_engine_takes_all_sizes(model: Callable[[torch.Tensor], Tensors]) -> None:
    fast = compiled(model, dynamic=True, strict=True)
    with torch.no_grad():
        for batch, length in ((2, 4), (3, 6), (5, 7)):
            x = torch.randn(batch, 3, length)
            assert_same(fast(x), model(x))
    assert (report()["graphs"], report()["engine_calls"], report()["eager_calls"]) == (1, 3, 0)
