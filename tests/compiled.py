"""What the tests of the backend share: a compiled function beside its eager twin, run by the reference evaluator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from trt_dynamo.reports import report


def compiled(model: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile(model, backend="tensorrt")` where everything that can go into an engine does."""
    options = {"runtime": "reference", "min_segment_nodes": 1, "rebuild": "sync", **options}
    return torch.compile(model, backend="tensorrt", dynamic=dynamic, options=options)


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Runs `work` in so many threads at once, each with its number, and raises the first error of theirs."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def engine_calls() -> int:
    return int(report()["engine_calls"])


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
