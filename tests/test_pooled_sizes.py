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
