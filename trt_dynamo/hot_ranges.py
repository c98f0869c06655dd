"""Which narrow ranges of sizes deserve a profile of their own in an engine: those of most calls. Pure.

Comes in: the arguments of some of the calls. Goes out: ranges that lie within the whole range, each with at least one
size held fast.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch

from trt_dynamo.profiles import Range, Ranges, dim_of

# Of this many calls one is counted.
EVERY = 16
# So many different combinations of sizes are remembered; then the rare ones are forgotten.
REMEMBERED = 256
# A profile is worth its memory and its time to build if it serves at least this share of the calls.
SHARE = 1 / 8
# With more symbols than this in a graph, only single ones and all together are looked at.
COMBINED = 4


class SeenSizes:
    """Counts how often which sizes come to a graph whose inputs have these fake values. `wanted`: how many narrow
    ranges there shall be; 0 counts nothing.
    """

    def __init__(self, values: Iterable[Any], wanted: int) -> None:
        self.places: dict[sympy.Symbol, tuple[int, int]] = {}
        for position, value in enumerate(values):
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                dim = dim_of(size)
                if isinstance(dim, sympy.Symbol):
                    self.places.setdefault(dim, (position, axis))
        self.wanted = wanted if self.places else 0
        self.calls = 0
        self.counts: collections.Counter[tuple[int, ...]] = collections.Counter()

    def note(self, args: Sequence[Any]) -> None:
        """Counts one call of many. Threads may lose a count to each other, which does no harm."""
        self.calls += 1
        if (self.calls - 1) % EVERY:
            return
        self.counts[tuple(args[position].shape[axis] for position, axis in self.places.values())] += 1
        if len(self.counts) > REMEMBERED:
            self.counts = collections.Counter(dict(self.counts.most_common(REMEMBERED // 2)))

    def hot(self, ranges: Ranges) -> tuple[dict[sympy.Symbol, Range], ...]:
        """The narrow ranges, at most `wanted`: one request at a time where the first dim can be 1; then what most calls
        share; before any call, the sizes of the first.
        """
        found: list[dict[sympy.Symbol, int]] = []
        if not self.wanted:
            return ()
        batch = next(iter(self.places))
        if batch in ranges and 1 in ranges[batch]:
            found.append({batch: 1})
        counts = self.counts.copy()
        if not counts:
            found.append({symbol: ranges[symbol].opt for symbol in self.places if symbol in ranges})
        total = counts.total()
        while counts and len(found) < self.wanted:
            best = max(self.candidates(counts), key=lambda each: each[0])
            if best[2] < SHARE * total:
                break
            found.append(best[1])
            counts = collections.Counter({s: n for s, n in counts.items() if not self.fits(s, best[1])})
        narrow = [{**ranges, **{s: held(ranges[s], size) for s, size in fixed.items()}} for fixed in found
                  if all(s in ranges and size in ranges[s] for s, size in fixed.items())]  # fmt: skip
        distinct = [each for index, each in enumerate(narrow) if each not in narrow[:index] and each != dict(ranges)]
        return tuple(distinct[: self.wanted])

    def candidates(self, counts: Mapping[tuple[int, ...], int]) -> Iterable[tuple[int, dict[sympy.Symbol, int], int]]:
        """What could be held fast: how much is won by it, which symbols at which sizes, in how many calls."""
        symbols = list(self.places)
        numbers = range(1, len(symbols) + 1) if len(symbols) <= COMBINED else (1, len(symbols))
        for number in numbers:
            for chosen in itertools.combinations(range(len(symbols)), number):
                shares: collections.Counter[tuple[int, ...]] = collections.Counter()
                for sizes, count in counts.items():
                    shares[tuple(sizes[i] for i in chosen)] += count
                values, calls = shares.most_common(1)[0]
                yield calls * number, {symbols[i]: v for i, v in zip(chosen, values, strict=True)}, calls

    def fits(self, sizes: tuple[int, ...], fixed: Mapping[sympy.Symbol, int]) -> bool:
        return all(fixed.get(symbol, size) == size for symbol, size in zip(self.places, sizes, strict=True))


def held(span: Range, size: int) -> Range:
    return Range(size, size, size, span.step)
