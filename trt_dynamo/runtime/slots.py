"""The places of a segment's engines, one for each set of weights.

Comes in: the tensors of a call. Goes out: whether the engine in a slot has exactly these weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trt_dynamo.runtime.engine import Engine
from trt_dynamo.weights import Snapshot, WeightSet

RESTLESS = 4


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of one engine. `weights` are those baked into it, None where it takes them as inputs, or has none."""

    weights: WeightSet | None
    engine: Engine | None = None
    stale: bool = False  # the engine has other weights: it must be refitted before it is used
    calm: int = 0  # calls since the weights last changed
    building: bool = False
    served: int = 0  # calls that the engine answered since it was refitted
    wasted: int = 0  # refits in a row after which it answered no second call

    @property
    def ready(self) -> bool:
        return self.engine is not None and not self.stale

    @property
    def restless(self) -> bool:
        """Whether the weights change at each call, as in reinforcement learning: a refit is dearer than one eager call,
        and is put off to the second call with the same weights.
        """
        return self.wasted >= RESTLESS and self.calm == 0

    def note_change(self) -> None:
        self.wasted = self.wasted + 1 if self.served < 2 else 0
        self.calm = self.served = 0

    def begin(self) -> Snapshot | None:
        """To be called before the engine is started, and handed to `holds` afterwards."""
        return None if self.weights is None else self.weights.begin()

    def holds(self, begun: Snapshot | None, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the answer that began so is one for these weights."""
        return begun is None or (self.weights is not None and self.weights.holds(begun, tensors))
