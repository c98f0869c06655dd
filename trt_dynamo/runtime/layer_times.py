"""How long each layer of each engine takes, as TensorRT's own profiler reports it.

Comes in: the execution contexts that are made while times are collected, and the names of the segments that run. Goes
out: for each segment its layers, in the order in which they ran, with the milliseconds of each run.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from trt_dynamo.trt import trt


class LayerTimes:
    """What was reported: `layers[segment][layer]` lists the milliseconds of each run of that layer."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, list[float]]] = {}
        self.counting = True
        self.lock = threading.Lock()

    def note(self, segment: str, layer: str, milliseconds: float) -> None:
        """One run of one layer. A segment may have engines that run the same layer: their runs come together."""
        if self.counting:
            with self.lock:
                self.layers.setdefault(segment, {}).setdefault(layer, []).append(milliseconds)

    def forget(self) -> None:
        """Drops what was noted so far: the first runs are not like the others."""
        with self.lock:
            self.layers.clear()


class Running(threading.local):
    """The segment whose engine this thread is starting: TensorRT reports in the thread that starts it."""

    name = ""


RUNNING = Running()
collecting: LayerTimes | None = None


@contextlib.contextmanager
def layer_times() -> Iterator[LayerTimes]:
    """Collects the times of the engines whose first call lies inside the block. Each call then waits for the GPU."""
    global collecting
    before, collecting = collecting, LayerTimes()
    try:
        yield collecting
    finally:
        collecting = before


def watch(context: Any) -> None:
    """Has a new execution context report its layers' times, if they are collected."""
    if collecting is not None:
        context.profiler = reporter()


@functools.cache
def reporter() -> Any:
    """The process's one `IProfiler`: contexts outlive a collection, so it looks each time for the present one."""

    class Reporter(trt.IProfiler):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: Any) -> None:
            if collecting is not None:
                collecting.note(RUNNING.name, layer_name, float(ms))

    return Reporter()
