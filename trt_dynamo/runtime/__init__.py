"""A segment at run time: the engine where it fits the call, else the segment's own graph in eager.

Comes in: a `Segment`'s graph and a function that makes an engine for given weights and ranges. Goes out: a module that
answers every call that eager would answer, and counts why it did not use an engine.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from trt_dynamo.errors import BuildError, EngineError, TrtDynamoError, Unsupported
from trt_dynamo.profiles import Range, grown_for, ranges_of
from trt_dynamo.reports import count
from trt_dynamo.runtime.background import run_in_background, wait_for_builds
from trt_dynamo.runtime.engine import Engine, OutsideProfile
from trt_dynamo.settings import Settings
from trt_dynamo.weights import WeightSet, identity

log = logging.getLogger(__name__)

Ranges = Mapping[sympy.Symbol, Range]

# Makes an engine: the weights to bake in (None: they are inputs), the digests of their content, the ranges of sizes.
MakeEngine = Callable[[Sequence[torch.Tensor] | None, Sequence[str], Ranges], Engine]

WEIGHTS_CHANGED = "the weights changed"
RANGE_GROWN = "a size outside the profile"


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of one engine. `weights` are those baked into it, None where it takes them as inputs."""

    weights: WeightSet | None
    engine: Engine | None = None
    calm: int = 0  # calls since the weights last changed
    building: bool = False

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether there is an engine, and nothing points to a change of the weights in it."""
        return self.engine is not None and self.weights is not None and self.weights.is_unchanged(tensors)


class SegmentModule(torch.nn.Module):
    """Runs one segment. `positions` are those of its arguments that are baked into engines."""

    def __init__(
        self,
        name: str,
        module: GraphModule,
        positions: Sequence[int],
        make_engine: MakeEngine,
        digest: Callable[[torch.Tensor], str],
        settings: Settings,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name = name
        self.eager = module
        self.positions = tuple(positions)
        self.make_engine = make_engine
        self.digest = digest
        self.settings = settings
        self.values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self.ranges: Ranges = ranges_of(self.values)
        check = settings.weights_check
        self.reads_weights = bool(positions) and (check == "always" or (check == "auto" and device.type == "cpu"))
        self.lock = threading.RLock()
        self.slots: dict[tuple[int, ...], Slot] = {}
        self.shared: Slot | None = None  # for more sets of weights than get engines of their own
        self.moved: set[tuple[int, ...]] = set()  # sets whose memory was freed
        self.broken: str | None = None
        self.widest: str | None = None  # why the ranges grow no more
        self.failure: TrtDynamoError | None = None  # of a build in the background, for `strict`

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        tensors = [args[i] for i in self.positions]
        slot, reason = self.slot_for(tensors)
        engine = slot.engine if slot is not None else None
        while slot is not None and engine is not None:
            try:
                results = engine(args)
            except OutsideProfile as error:
                reason = "outside the profile"
                engine = self.widen(slot, tensors, args, error)
            except TrtDynamoError as error:
                self.give_up(error)
                reason, engine = "the engine failed", None
            else:
                count("engine_calls")
                return results
        count("eager_calls", reason)
        return tuple(self.eager.forward(*args))

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Builds (or loads) the engine for the weights that the model has now, at once or in the background."""
        with self.lock:
            self.serve(tensors, "first build", self.settings.compile == "background")

    # -- which engine fits the weights --------------------------------------------------------------------------------

    def slot_for(self, tensors: Sequence[torch.Tensor]) -> tuple[Slot | None, str]:
        """The slot for these weights, or why there is none. Its engine, if it has one, holds exactly these."""
        slot = self.slots.get(identity(tensors)) if not self.reads_weights else None
        if slot is not None and slot.holds(tensors):
            return slot, ""
        if self.broken is not None:
            return None, self.broken
        if self.failure is not None:
            raise self.failure
        with self.lock:
            return self.serve(tensors, "another set of weights", self.settings.compile == "background")

    def serve(self, tensors: Sequence[torch.Tensor], why: str, background: bool) -> tuple[Slot | None, str]:
        key = identity(tensors)
        slot = self.slots.get(key)
        if slot is None:
            if len(self.slots) >= max(self.settings.max_weight_sets, 1):
                return self.serve_shared(tensors, background)
            slot = self.slots[key] = Slot(WeightSet(tensors, self.digest, functools.partial(self.forget, key)))
            if key not in self.moved:
                return self.build(slot, tensors, why, background), "the engine is being built"
            # The same parameters with new memory (`p.data = ...`): a change like any other.
            self.moved.discard(key)
            self.note_change()
        assert slot.weights is not None
        doubt = self.reads_weights or not slot.weights.is_unchanged(tensors)
        if doubt and slot.weights.refresh(tensors, everything=self.reads_weights):
            if slot.engine is not None:
                self.note_change()
            slot.engine, slot.calm = None, 0
        if slot.engine is not None or slot.building:
            return slot, "the engine is being built"
        slot.calm += 1
        if slot.calm <= self.settings.rebuild_after or self.settings.rebuild == "never":
            return None, WEIGHTS_CHANGED
        count("rebuilds", WEIGHTS_CHANGED)
        return self.build(slot, tensors, WEIGHTS_CHANGED, self.settings.rebuild == "background"), WEIGHTS_CHANGED

    def serve_shared(self, tensors: Sequence[torch.Tensor], background: bool) -> tuple[Slot | None, str]:
        if self.shared is None:
            self.shared = Slot(None)
            why = f"more than max_weight_sets={self.settings.max_weight_sets} sets of weights; it takes them as inputs"
            return self.build(self.shared, tensors, why, background), "the engine is being built"
        return self.shared, "the engine is being built"

    def note_change(self) -> None:
        log.info(
            "%s: its weights changed; eager serves until they rest for %d calls", self.name, self.settings.rebuild_after
        )

    def forget(self, key: tuple[int, ...]) -> None:
        """Lets go of the engine of weights whose memory is gone, perhaps with their model."""
        if self.slots.pop(key, None) is not None:
            if len(self.moved) > 100:
                self.moved.clear()
            self.moved.add(key)

    # -- which engine fits the sizes ----------------------------------------------------------------------------------

    def widen(
        self, slot: Slot, tensors: Sequence[torch.Tensor], args: Sequence[Any], error: OutsideProfile
    ) -> Engine | None:
        """Asks for an engine that takes these sizes too; gives it back only where the settings let the call wait for
        it.
        """
        if self.settings.rebuild == "never":
            return None
        with self.lock:
            if self.widest is not None:
                log.debug("%s: %s, and %s", self.name, error, self.widest)
                return None
            wider = grown_for(self.ranges, self.values, args)
            if wider == self.ranges and not self.outdated(slot):
                log.debug("%s: %s, and no range can grow", self.name, error)
                return None
            if wider != self.ranges:
                log.info("%s: %s; the ranges grow", self.name, error)
                self.ranges = wider
            if slot.building:
                return None
            count("rebuilds", RANGE_GROWN)
            built = self.build(slot, tensors, RANGE_GROWN, self.settings.rebuild == "background")
            return built.engine if built is not None and self.settings.rebuild == "sync" else None

    def outdated(self, slot: Slot) -> bool:
        """Whether the slot's engine was built for narrower ranges than the segment has by now."""
        return slot.engine is not None and slot.engine.built_for != self.ranges

    # -- building -----------------------------------------------------------------------------------------------------

    def build(self, slot: Slot, tensors: Sequence[torch.Tensor], why: str, background: bool) -> Slot | None:
        """Fills the slot, now or later. None where nothing can be built, or not now."""
        log.info("%s: an engine is needed: %s", self.name, why)
        slot.building = True
        if background:
            run_in_background(functools.partial(self.fill, slot, list(tensors), in_background=True))
            return slot
        self.fill(slot, tensors, in_background=False)
        return slot if slot.engine is not None else None

    def fill(self, slot: Slot, tensors: Sequence[torch.Tensor], *, in_background: bool) -> None:
        """Builds the slot's engine for the weights and ranges of now, and puts it in if the weights are still those."""
        weights, ranges = slot.weights, self.ranges
        digests = list(weights.digests) if weights is not None else []
        try:
            engine = self.make_engine(None if weights is None else tensors, digests, ranges)
        except TrtDynamoError as error:
            with self.lock:
                slot.building = False
                if slot.engine is None or not self.stay(slot.engine, error):
                    self.give_up(error, in_background=in_background)
            return
        engine.built_for = ranges
        with self.lock:
            slot.building = False
            # A write during the build shows at the next check, which compares with what was baked.
            if weights is None or weights.digests == digests:
                slot.engine = engine

    def stay(self, engine: Engine, error: TrtDynamoError) -> bool:
        """Whether the engine that there is goes on after a wider one could not be made: sizes outside of its ranges
        stay in eager. A bug of ours is an error all the same.
        """
        if engine.built_for == self.ranges or not isinstance(error, BuildError | Unsupported | EngineError):
            return False
        log.warning("%s: larger sizes stay in eager, no engine takes them: %s", self.name, error)
        self.ranges, self.widest = engine.built_for, str(error)
        return True

    def give_up(self, error: TrtDynamoError, *, in_background: bool = False) -> None:
        """Eager from now on, said once; with `strict`, the error is the caller's, or the next caller's."""
        if self.settings.strict and not in_background:
            raise error
        if self.settings.strict:
            self.failure = error
        log.warning("%s runs in eager from now on: %s", self.name, error)
        self.broken = f"{type(error).__name__}: {error}"
        self.slots.clear()
        self.shared = None


__all__ = ["Engine", "OutsideProfile", "SegmentModule", "wait_for_builds"]
