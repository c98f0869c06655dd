"""What a half type would do to a tensor's values. In: tensors. Out: a `Magnitude`, and in words why they do not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

# Recorded values stay this far below the largest that a type can hold, for inputs that were not recorded.
HEADROOM = 4

# The relative error of a tensor, as a whole, that rounding may make: sixteen times that of ordinary values.
LOSS = 2.0**-8

# How the reason ends where all values of a weight are too small.
INEXACT = "inexactly"

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The largest finite absolute value, the least that is not zero, and the relative error of rounding to a half type,
    over all elements (L2): it grows where most of them are too small for the type."""

    largest: float = 0.0
    least: float = math.inf
    loss: float = 0.0

    def __or__(self, other: Magnitude) -> Magnitude:
        return Magnitude(max(self.largest, other.largest), min(self.least, other.least), max(self.loss, other.loss))

    def misfit(self, low: torch.dtype) -> str:
        """Why the values should stay in float32; nothing where they need not."""
        if self.largest > torch.finfo(low).max / HEADROOM:
            return f"its values reach {self.largest:.3g}, {NAMES[low]} ends at {torch.finfo(low).max:.3g}"
        if self.loss > LOSS:
            small = f"its values are as small as {self.least:.3g}"
            return f"rounding to {NAMES[low]} would change it by {self.loss:.1%}: {small}"
        return ""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What recorded calls of a segment say: the nodes whose values do not fit, by name, and why; and the same as JSON,
    for the cache to keep beside the engine.
    """

    misfits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None


def measured(value: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """The three numbers of a `Magnitude` as a float64 tensor on the value's device; no wait for the device."""
    if value.numel() == 0:
        return torch.tensor([0.0, math.inf, 0.0], dtype=torch.float64, device=value.device)
    wide = value.detach().float()
    wide = torch.where(wide.isfinite(), wide, 0.0)
    size, limit = wide.abs(), torch.finfo(low).max
    error = torch.linalg.vector_norm(wide - wide.clamp(-limit, limit).to(low).float(), dtype=torch.float64)
    whole = torch.linalg.vector_norm(wide, dtype=torch.float64)
    loss = torch.where(whole > 0, error / whole, 0.0)
    return torch.stack([size.max().double(), torch.where(size > 0, size, math.inf).min().double(), loss])


def weight_misfit(value: torch.Tensor, low: torch.dtype) -> str:
    """Why a weight or constant cannot be held in a half type; nothing where it can. Infinities, which masks have, stay
    what they are.
    """
    if value.dtype is not torch.float32 or value.numel() == 0:
        return ""
    least, largest = (float(end) for end in torch.aminmax(value.detach()))
    if not (math.isfinite(least) and math.isfinite(largest)):
        finite = value.detach()[value.isfinite()]
        least, largest = (float(end) for end in torch.aminmax(finite)) if finite.numel() else (0.0, 0.0)
    size = max(abs(least), abs(largest))
    limits = torch.finfo(low)
    if size > limits.max:
        return f"its values reach {size:.3g}, {NAMES[low]} ends at {limits.max:.3g}"
    if 0 < size < limits.tiny:
        return f"its values are {size:.3g} at most, {NAMES[low]} holds less than {limits.tiny:.3g} {INEXACT}"
    return ""
