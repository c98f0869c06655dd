"""How long the same batches take in eager, through Inductor and through the engines, on a machine that can run them.

In: a model and batches. Out: rows of a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo.demo.embedding import Batch, Encode
from trt_dynamo.errors import in_a_line

PASSES = 5


def speeds(model: torch.nn.Module, batches: Sequence[Batch], options: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A row for each way to run the model: its name, seconds for one pass, and times as fast as eager."""
    ways: dict[str, Encode] = {
        "eager": model,
        "Inductor": torch.compile(model, dynamic=True),
        "TensorRT": torch.compile(model, backend="tensorrt", options=options),
    }
    return rows(ways, batches)


def rows(ways: Mapping[str, Encode], batches: Sequence[Batch]) -> list[tuple[str, str, str]]:
    """The table for any ways to run the batches; the first is what the others are compared with."""
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, encode in ways.items():
        try:
            times[name] = seconds(lambda encode=encode: run(encode, batches))  # type: ignore[misc]
        except RuntimeError as error:  # Inductor without a compiler, for example
            failures[name] = in_a_line(error, 100)
    first = times.get(next(iter(ways)))
    return [
        (name, f"{times[name]:.4f}", f"{first / times[name]:.2f}" if first else "")
        if name in times
        else (name, "failed", failures[name])
        for name in ways
    ]


def run(encode: Encode, batches: Sequence[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            encode(batch.ids, batch.mask)


def seconds(work: Callable[[], None]) -> float:
    """The least wall time of `work` in PASSES goes, after one that does not count; waits for the GPU."""

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    work()
    times = []
    for _ in range(PASSES):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
