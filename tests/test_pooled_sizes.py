"""Pooling layers over images of all sizes: one graph, whatever the remainder of the size by the stride."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiled import assert_same, compiled
from trt_dynamo.reports import report

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max, padded": lambda x: F.max_pool2d(x, 3, 3, 1),
    "max, dilated": lambda x: F.max_pool2d(x, 2, 5, 0, 2),
    "mean": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "mean along": lambda x: F.avg_pool1d(x[0], 2),
    "max along": lambda x: F.max_pool1d(x[0], 2),
    "max along, padded": lambda x: F.max_pool1d(x[:, 0], 3, 2, 1, 1, True),
    "max along one": lambda x: F.max_pool1d(x[0, 0], 3, dilation=2),
}


@pytest.mark.parametrize("name", POOLS)
def test_one_graph_for_all_remainders(name: str) -> None:
    """Whether a size can be divided by the stride is nothing that Dynamo asks, 2.11 neither."""
    pool = POOLS[name]
    fast = compiled(lambda x: pool(x) + 1, dynamic=True)
    with torch.no_grad():
        for height, width in ((20, 30), (21, 31), (22, 29), (23, 34), (24, 33)):
            x = torch.randn(2, 3, height, width)
            assert_same(fast(x), pool(x) + 1)
    assert report()["graphs"] == 1 and report()["eager_calls"] == 0


def test_others_get_torchs_own_max_pool1d() -> None:
    """Eager, fixed sizes and other backends: the result and what Dynamo asks of the length are torch's."""
    x = torch.randn(2, 3, 9)
    graphs = []

    def counting(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    fast = torch.compile(lambda x: F.max_pool1d(x, 2), backend=counting, dynamic=True)
    for length in (9, 12):
        x = torch.randn(2, 3, length)
        assert_same(fast(x), F.max_pool1d(x, 2))
    assert len(graphs) == 2  # torch's: none of ours was asked
    with torch.no_grad():
        assert_same(compiled(lambda x: F.max_pool1d(x, 2) + 1, dynamic=False)(x), F.max_pool1d(x, 2) + 1)
