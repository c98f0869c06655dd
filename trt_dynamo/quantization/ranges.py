"""How far the values of a tensor reach: the largest magnitude that a code must stand for, by three methods.

Comes in: tensors, batch by batch. Goes out: a limit, one number or one per channel; what lies beyond is cut off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 2048
LEVELS = 128  # magnitudes of int8


def magnitudes(x: Tensor) -> Tensor:
    """In float32.

    Raises:
        ValueError: one is infinite or NaN.
    """
    sizes = x.detach().float().abs()
    if not bool(sizes.isfinite().all()):
        raise ValueError("a value is infinite or NaN: such a model cannot be calibrated")
    return sizes


class Largest:
    """The largest magnitude so far, of all or of each index of an axis."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.value: Tensor | None = None

    def see(self, x: Tensor) -> None:
        sizes = magnitudes(x)
        if self.axis is None:
            seen = sizes.amax() if sizes.numel() else sizes.new_zeros(())
        else:
            seen = sizes.transpose(0, self.axis).flatten(1).amax(1)
        self.value = seen if self.value is None else torch.maximum(self.value, seen)

    def limit(self) -> Tensor | None:
        return self.value


class LargestPerChannel(Largest):
    """The largest magnitude so far, with that of each channel of the last dim, for who moves it between channels."""

    def see(self, x: Tensor) -> None:
        self.axis = x.ndim - 1
        super().see(x)

    def limit(self) -> Tensor | None:
        return None if self.value is None else self.value.amax()


class Histogram:
    """How often each magnitude was seen, in bins that grow with the largest, by doubling."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.reach = 0.0

    def see(self, x: Tensor) -> None:
        sizes = magnitudes(x).flatten()
        largest = float(sizes.amax()) if sizes.numel() else 0.0
        if self.counts is None:
            if largest == 0:
                return
            self.counts, self.reach = torch.zeros(BINS, dtype=torch.float64, device=x.device), largest
        while largest > self.reach:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts, self.reach = torch.cat([pairs, torch.zeros_like(pairs)]), self.reach * 2
        self.counts += torch.histc(sizes, BINS, 0, self.reach)

    def edge(self, count: int) -> Tensor:
        """The magnitude at which so many bins end."""
        assert self.counts is not None
        return torch.tensor(self.reach * count / BINS, device=self.counts.device)


class Percentile(Histogram):
    """The magnitude below which a share of all values lies, in percent."""

    def __init__(self, percent: float) -> None:
        super().__init__()
        self.percent = percent

    def limit(self) -> Tensor | None:
        if self.counts is None:
            return None
        share = self.counts.cumsum(0) / self.counts.sum()
        return self.edge(min(int((share < self.percent / 100).sum()) + 1, BINS))


class Entropy(Histogram):
    """The magnitude at which the distribution of int8 codes tells least wrong about that of the values.

    As in TensorRT's entropy calibrator: of all limits the one with the least Kullback-Leibler divergence, from the
    values, cut off there, to the same in 128 levels. The bin at 0 does not count: 0 has a code of its own.
    """

    def limit(self) -> Tensor | None:
        if self.counts is None:
            return None
        counts = self.counts.cpu().clone()
        counts[0] = counts[1]
        ends = range(LEVELS, BINS + 1, 8)
        losses = [divergence(counts, end) for end in ends]
        return self.edge(ends[losses.index(min(losses))])


def divergence(counts: Tensor, end: int) -> float:
    """What is lost when the values of the first bins are told in `LEVELS` levels, and the others are cut off."""
    kept = counts[:end]
    actual = kept.clone()
    actual[-1] += counts[end:].sum()
    level = torch.arange(end) * LEVELS // end
    there = (kept > 0).double()
    totals = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, kept)
    places = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, level, there)
    told = (totals / places.clamp(min=1))[level] * there
    if float(told.sum()) == 0 or float(actual.sum()) == 0:
        return math.inf
    p, q = actual / actual.sum(), told / told.sum()
    lost = p > 0
    return float((p[lost] * (p[lost] / q[lost].clamp(min=1e-12)).log()).sum())
