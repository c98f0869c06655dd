"""What this process did: counters of graphs, builds, cache hits and calls, as a plain dict."""

from __future__ import annotations

import collections
import threading
from typing import Any

COUNTERS = (
    "graphs",
    "engines_built",
    "cache_hits",
    "cache_misses",
    "engine_calls",
    "eager_calls",
    "refits",
    "rebuilds",
)
TIMERS = ("build_seconds", "load_seconds")

LOCK = threading.Lock()
counts: collections.Counter[str] = collections.Counter()
reasons: dict[str, collections.Counter[str]] = {}
seconds: dict[str, float] = dict.fromkeys(TIMERS, 0.0)


def count(counter: str, reason: str | None = None) -> None:
    """Adds one to a counter, and to the reason under it."""
    with LOCK:
        counts[counter] += 1
        if reason is not None:
            reasons.setdefault(counter, collections.Counter())[reason] += 1


def spend(timer: str, amount: float) -> None:
    """Adds seconds to a timer."""
    with LOCK:
        seconds[timer] += amount


def report() -> dict[str, Any]:
    """The counters of this process since its start or the last `reset_report`.

    `graphs` (given to TensorRT), `engines_built`, `cache_hits`, `cache_misses`, `engine_calls` and `eager_calls`
    (calls of segments), `refits`, `rebuilds`, each an int; `build_seconds` (conversion, build and storing of plans)
    and `load_seconds` (of plans from the cache), each a float; `eager_reasons`, `rebuild_reasons` and `eager_graphs`
    say why: reason to count.
    """
    with LOCK:
        result: dict[str, Any] = {name: counts[name] for name in COUNTERS}
        result.update(seconds)
        result["eager_reasons"] = dict(reasons.get("eager_calls", {}))
        result["rebuild_reasons"] = dict(reasons.get("rebuilds", {}))
        result["eager_graphs"] = dict(reasons.get("eager_graphs", {}))
        return result


def reset_report() -> None:
    """Sets every counter back to zero."""
    with LOCK:
        counts.clear()
        reasons.clear()
        seconds.update(dict.fromkeys(TIMERS, 0.0))
