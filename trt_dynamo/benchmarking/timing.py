"""Times functions in turns. In: functions by name, and how long. Out: the seconds of their calls, and their spread.

What changes while one looks on (clocks that warm up, another process) hits all alike: each round calls every function,
and the next round begins with another one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[], object]
Clock = Callable[[], float]

ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds: the median of `count` samples, and the quartiles below and above it."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


@dataclasses.dataclass
class Samples:
    """Seconds a call: of calls that were each waited for, and of rows of calls that were waited for at their end."""

    alone: list[float] = dataclasses.field(default_factory=list)
    in_a_row: list[float] = dataclasses.field(default_factory=list)


def order(names: Sequence[str], number: int) -> list[str]:
    """Who comes when in this round: each begins in turn, and every second time round they come backwards."""
    if not names:
        return []
    start = number % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number // len(names) % 2 else turned


def warm(call: Call, wait: Call, *, calls: int = 5, seconds: float = 1.0, clock: Clock = time.perf_counter) -> float:
    """Calls until all that is made once is made: `calls` times, or fewer if that takes longer than `seconds`. Gives the
    seconds of the fastest call.
    """
    began, best = clock(), float("inf")
    for _ in range(calls):
        best = min(best, timed(call, wait, clock))
        if clock() - began > seconds:
            break
    return best


def timed(call: Call, wait: Call, clock: Clock = time.perf_counter) -> float:
    """The seconds of one call, with the wait for the device."""
    started = clock()
    call()
    wait()
    return clock() - started


def calls_a_round(estimate: float, *, calls: int | None, seconds: float) -> int:
    """How many calls of a kind a round has: `calls` in all rounds, or what fits into `seconds`; one at least."""
    if calls is not None:
        return max(1, calls // ROUNDS)
    return max(1, int(seconds / (2 * ROUNDS) / max(estimate, 1e-9)))


def in_turns(
    functions: Mapping[str, Call],
    counts: Mapping[str, int],
    wait: Call,
    failed: Callable[[str, Exception], object],
    *,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> dict[str, Samples]:
    """Times each function `counts[name]` times a round, alone and in a row. One that raises is told to `failed`, and is
    called no more; its samples are dropped.
    """
    samples = {name: Samples() for name in functions}
    for number in range(rounds):
        for name in order(list(samples), number):
            try:
                sample(functions[name], counts[name], wait, samples[name], clock)
            except Exception as error:  # noqa: BLE001  its cell says so; the others go on
                failed(name, error)
                del samples[name]
    return samples


def sample(call: Call, count: int, wait: Call, samples: Samples, clock: Clock) -> None:
    """A round of one function."""
    call()  # what the one before left in caches is gone
    wait()
    samples.alone += [timed(call, wait, clock) for _ in range(count)]

    def row() -> None:
        for _ in range(count):
            call()

    samples.in_a_row.append(timed(row, wait, clock) / count)
