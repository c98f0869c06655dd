"""The places of a segment's engines, one for each set of weights.

Comes in: the tensors of a call. Goes out: whether the engine in a slot has exactly these weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trt_dynamo.runtime.engine import Engine
from trt_dynamo.settings import Settings
from trt_dynamo.weights import Snapshot, WeightSet

# After so many refits in a row that served one call each, the next is put off.
RESTLESS = 4

# With `weights=auto`, weights of more bytes than this are not copied into an engine, nor read at each call to see
# whether they changed: the engine takes them as inputs.
BAKED_AT_MOST = 2**30


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of one engine. `weights` are those baked into it, None where it takes them as inputs, or has none.

    `fitted` is the engine and what was seen of the weights that it has, in one piece: a call that is about to use the
    engine must not take a newer look at the weights for the engine's own. `stale` is an engine that has other weights:
    it must be refitted before it is used. At most one of the two is there.
    """

    weights: WeightSet | None
    fitted: tuple[Engine, Snapshot | None] | None = None
    stale: Engine | None = None
    turn: object = None  # another one before `fitted` changes, and after
    calm: int = 0  # calls since the weights last changed
    building: bool = False
    served: int = 0  # calls that the engine answered since it was refitted
    wasted: int = 0  # refits in a row after which it answered no second call
    refused: str | None = None  # why it gets no engine any more

    @property
    def engine(self) -> Engine | None:
        return self.fitted[0] if self.fitted is not None else self.stale

    @property
    def restless(self) -> bool:
        """Whether the weights change at each call, as in reinforcement learning: a refit is dearer than one eager call,
        and is put off to the second call with the same weights.
        """
        return self.wasted >= RESTLESS and self.calm == 0

    def put(self, engine: Engine, *, stale: bool = False) -> None:
        """Puts in an engine that has the weights of the set's last snapshot, or others."""
        if self.refused is not None:
            return
        self.turn = object()
        if stale and self.weights is not None:
            self.fitted, self.stale = None, engine
        else:
            self.fitted, self.stale = (engine, self.weights.snapshot if self.weights is not None else None), None
        self.turn = object()

    def take_out(self) -> None:
        """There is no engine now."""
        self.turn = object()
        self.fitted = self.stale = None
        self.turn = object()

    def refuse(self, why: str) -> None:
        """Takes the engine out; no other comes in."""
        self.refused = why
        self.take_out()

    def note_change(self) -> None:
        """The weights are others now. An engine that can follow becomes stale, another one is let go."""
        self.wasted = self.wasted + 1 if self.served < 2 else 0
        self.calm = self.served = 0
        engine = self.engine
        self.take_out()
        if engine is not None and engine.refittable:
            self.stale = engine


def takes_inputs(weights: Sequence[Any], settings: Settings) -> bool:
    """Whether the engine takes the weights, given as fake tensors, as inputs. So does one that has none."""
    if not weights or settings.weights == "inputs":
        return True
    return settings.weights == "auto" and sum(w.numel() * w.element_size() for w in weights) > BAKED_AT_MOST
