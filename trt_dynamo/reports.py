"""What this process did: counters of graphs, builds, cache hits and calls, and each engine with the reason for it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from trt_dynamo.processes import renewed_in_children
from trt_dynamo.tracing import trace, trace_data

log = logging.getLogger(__name__)

COUNTERS = (
    "graphs",
    "guard_failures",
    "engines_built",
    "cache_hits",
    "cache_misses",
    "engine_calls",
    "eager_calls",
    "refits",
    "rebuilds",
    "cuda_graphs",
    "replays",
    "inductor_parts",
    "inductor_graphs",
    "inductor_refusals",
    "verified",
    "breaches",
)
TIMERS = ("build_seconds", "load_seconds")
BUILDS_KEPT = 1000


@dataclasses.dataclass
class Build:
    """An engine that was built, or loaded from the cache (`hit`), or could not be (`error`).

    `reason` is why it was needed: `new graph`, `a size outside the profile`, `the weights changed`, ...; `detail` says
    more, such as which size. `ranges` are the sizes it takes, (smallest, best, largest) by symbol; `profiles` counts
    its optimization profiles; `background` says whether calls went on meanwhile.
    """

    segment: str
    reason: str
    detail: str = ""
    ranges: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    profiles: int = 1
    background: bool = False
    seconds: float = 0.0
    hit: bool = False
    error: str | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in self.ranges.items())
        outcome = f"failed ({self.error})" if self.error else "loaded from the cache" if self.hit else "built"
        reason = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return f"{self.segment}: {outcome} in {self.seconds:.1f} s; {reason}" + (f"; sizes {sizes}" if sizes else "")


class Ticker:
    """Counts without a lock, in a tenth of the time: `tick` is one step in C."""

    def __init__(self) -> None:
        self.tick = itertools.count().__next__
        self.reads = 0

    def reset(self) -> None:
        self.tick, self.reads = itertools.count().__next__, 0

    def read(self) -> int:
        """How often it ticked. To read it is to move it on, so one thread at a time does."""
        self.reads += 1
        return self.tick() + 1 - self.reads


LOCK = threading.Lock()
CALLS = Ticker()  # calls of segments that an engine answered: `engine_calls`
counts: collections.Counter[str] = collections.Counter()
reasons: dict[str, collections.Counter[str]] = {}
seconds: dict[str, float] = dict.fromkeys(TIMERS, 0.0)
builds: collections.deque[Build] = collections.deque(maxlen=BUILDS_KEPT)


@renewed_in_children
def renew_lock() -> None:
    global LOCK
    LOCK = threading.Lock()


def count(counter: str, reason: str | None = None) -> int:
    """Adds one to a counter, and to the reason under it. Returns the counter."""
    with LOCK:
        counts[counter] += 1
        total = counts[counter]
        if reason is None:
            return total
        seen = reasons.setdefault(counter, collections.Counter())
        seen[reason] += 1
        new = seen[reason] == 1
    if new or counter == "eager_graphs":  # each graph has a page of its own in a trace
        trace(log, f"why.{counter}", lambda: reason)
    return total


def spend(timer: str, amount: float) -> None:
    """Adds seconds to a timer."""
    with LOCK:
        seconds[timer] += amount


@contextlib.contextmanager
def noted(build: Build) -> Iterator[Build]:
    """Notes, and logs, what came of the build inside the block."""
    started = time.perf_counter()
    try:
        yield build
    except BaseException as error:
        build.error = f"{type(error).__name__}: {error}"
        raise
    finally:
        build.seconds = time.perf_counter() - started
        with LOCK:
            builds.append(build)
        log.info("%s", build)
        trace_data(build.segment, lambda: dataclasses.asdict(build))


def report() -> dict[str, Any]:
    """The counters of this process since its start or the last `reset_report`.

    `graphs` (given to TensorRT), `guard_failures` (graphs that Dynamo made because those of the same code did not fit a
    call, TensorRT's or not), `engines_built`, `cache_hits`, `cache_misses`, `engine_calls` and `eager_calls` (calls of
    segments), `refits`, `rebuilds`, `inductor_parts` and `inductor_graphs` (compiled by Inductor in eager's place),
    `inductor_refusals` (what Inductor could not compile or run), `verified` (calls of engines that `verify` compared
    with eager) and `breaches` (those that differed), each an int; `build_seconds` (conversion, build and storing of
    plans) and `load_seconds` (of plans from the cache), each a float; `guard_failure_reasons` (the guard that failed,
    in Dynamo's words), `eager_reasons`, `rebuild_reasons`, `inductor_refusal_reasons`, `breach_reasons` and
    `eager_graphs` (those that TensorRT has no part in) say why:
    reason to count. `builds` lists the last thousand engines in the order in which they came, each as a dict of
    `segment`, `reason`, `detail`, `ranges`, `profiles`, `background`, `seconds`, `hit`, `error` (see `Build`).
    """
    with LOCK:
        result: dict[str, Any] = {name: counts[name] for name in COUNTERS}
        result["engine_calls"] = CALLS.read()
        result.update(seconds)
        result["guard_failure_reasons"] = dict(reasons.get("guard_failures", {}))
        result["eager_reasons"] = dict(reasons.get("eager_calls", {}))
        result["rebuild_reasons"] = dict(reasons.get("rebuilds", {}))
        result["inductor_refusal_reasons"] = dict(reasons.get("inductor_refusals", {}))
        result["breach_reasons"] = dict(reasons.get("breaches", {}))
        result["eager_graphs"] = dict(reasons.get("eager_graphs", {}))
        result["builds"] = [dataclasses.asdict(build) for build in builds]
        return result


def builds_so_far() -> tuple[Build, ...]:
    """The engines that `report()["builds"]` lists."""
    with LOCK:
        return tuple(builds)


def reset_report() -> None:
    """Sets every counter back to zero."""
    with LOCK:
        CALLS.reset()
        counts.clear()
        reasons.clear()
        builds.clear()
        seconds.update(dict.fromkeys(TIMERS, 0.0))
