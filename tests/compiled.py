"""What the tests of the backend share: a compiled function beside its eager twin, run by the reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trt_dynamo.reports import report


def compiled(model: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile(model, backend="tensorrt")` where everything that can go into an engine does."""
    options = {"runtime": "reference", "min_segment_nodes": 1, "rebuild": "sync", **options}
    return torch.compile(model, backend="tensorrt", dynamic=dynamic, options=options)


def engine_calls() -> int:
    return int(report()["engine_calls"])


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
