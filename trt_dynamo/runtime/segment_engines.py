"""The engines of one segment: one for each set of weights, or one that takes the weights as inputs.

Comes in: the weights of a call, and a function that makes an engine for given weights and ranges. Goes out: the slot
with the engine for them, or the reason why there is none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from trt_dynamo import shutdown
from trt_dynamo.errors import BuildError, EngineError, TrtDynamoError, Unsupported, WeightsMoved
from trt_dynamo.processes import forget_in_children
from trt_dynamo.profiles import Ranges
from trt_dynamo.reports import Build, count, noted
from trt_dynamo.runtime.background import run_in_background
from trt_dynamo.runtime.cuda_graphs import WARM
from trt_dynamo.runtime.engine import Engine, OutsideProfile
from trt_dynamo.runtime.segment_ranges import SegmentRanges
from trt_dynamo.runtime.slots import Slot, takes_inputs
from trt_dynamo.runtime.streams import is_capturing
from trt_dynamo.settings import Settings
from trt_dynamo.weights import Check, WeightSet, identity

log = logging.getLogger(__name__)

NEW_GRAPH = "new graph"
MADE_OTHERWISE = "the settings, the weights or TensorRT are others than before"
WEIGHTS_CHANGED = "the weights changed"
RANGE_GROWN = "a size outside the profile"
BEING_BUILT = "the engine is being built"
CAPTURED = "a CUDA graph is being captured, whose replays would not see that a weight changed"
TOO_LARGE = "there was too little memory for larger sizes"


class MakeEngine(Protocol):
    """Makes an engine with the weights baked in (None: it takes them as inputs), for ranges of sizes; `hot` are
    narrower ones that get profiles of their own. `refit`: one
    whose weights can be changed, and must be before its first use; `unchanged` says whether the weights still are what
    they were when the engine was asked for.
    """

    def __call__(
        self,
        weights: Sequence[torch.Tensor] | None,
        ranges: Ranges,
        hot: Sequence[Ranges] = (),
        *,
        refit: bool = False,
        unchanged: Callable[[], bool] = lambda: True,
    ) -> Engine: ...


class SegmentEngines:
    """Those of one segment, whose graph is `module`.

    Args:
        name: for the log and the report.
        module: the segment's graph.
        positions: those of its arguments that may be baked into engines.
        make_engine: makes an engine.
        settings: `weights`, `weights_check`, `rebuild`, `compile`, `max_weight_sets` and others.
        why_no_refit: why engines whose weights can be changed cannot be had, where that is so.
    """

    def __init__(
        self,
        name: str,
        module: GraphModule,
        positions: Sequence[int],
        make_engine: MakeEngine,
        settings: Settings,
        why_no_refit: str | None,
    ) -> None:
        self.name = name
        self.make_engine = make_engine
        self.settings = settings
        self.ranges = SegmentRanges(name, module, settings.max_tensor_bytes, settings.profile_count - 1)
        values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self.check: Check = "frozen" if settings.weights == "frozen" else settings.weights_check
        self.has_weights = bool(positions)
        self.takes_inputs = takes_inputs([values[i] for i in positions], settings)
        self.on_cuda = any(isinstance(v, torch.Tensor) and v.is_cuda for v in values)
        self.lock = threading.RLock()
        self.slots: dict[tuple[int, ...], Slot] = {}
        self.likely: dict[int, Slot] = {}  # by the first weight: which slot a call will need
        self.shared: Slot | None = None  # for weights as inputs, and for more sets of them than get their own engines
        self.moved: set[tuple[int, ...]] = set()  # sets whose memory was freed,
        self.fleeting = 0  # and how many of them hardly got to use their engines
        self.refits = False  # engines are built so that their weights can be changed
        self.why_no_refit = why_no_refit
        self.why_no_inputs: str | None = None  # why no engine takes the weights as inputs
        self.broken: str | None = None
        self.failure: Exception | None = None  # of a build in the background, for `strict`
        forget_in_children(self)

    def leave_to_parent(self) -> object:
        """Gives up all engines, and a lock that another thread may hold: for a forked child."""
        left = (self.slots, self.likely, self.shared)
        self.slots, self.likely, self.shared, self.lock = {}, {}, None, threading.RLock()
        return left

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Builds (or loads) the engine for the weights that the model has now, at once or in the background."""
        with self.lock:
            slot, _ = self.serve(tensors, NEW_GRAPH, self.settings.compile == "background")
            if self.check == "always" and slot is not None and slot.fitted is not None and slot.weights is not None:
                self.likely[id(tensors[0])] = slot  # the first call reads the weights like any other

    # -- which engine fits the weights --------------------------------------------------------------------------------

    def guess(self, tensors: Sequence[torch.Tensor]) -> Slot | None:
        """The slot that a call will probably need, to be confirmed when its engine has been started."""
        return self.shared if self.takes_inputs else self.likely.get(id(tensors[0]))

    def first_guess(self, tensors: Sequence[torch.Tensor]) -> tuple[Slot | None, str]:
        """The same, or the slot that the call needs, or the reason why there is none."""
        slot = self.guess(tensors)
        if slot is not None and slot is self.shared:
            return (slot, BEING_BUILT) if slot.fitted or slot.building else self.slot_for(tensors)
        if self.on_cuda and self.check != "frozen" and is_capturing():
            return None, CAPTURED
        return (slot, BEING_BUILT) if slot is not None and slot.fitted else self.slot_for(tensors)

    def slot_for(self, tensors: Sequence[torch.Tensor]) -> tuple[Slot | None, str]:
        """The slot for these weights, or why there is none. Its engine, if it is ready, has exactly these."""
        if self.broken is not None:
            return None, self.broken
        if self.failure is not None:
            raise self.failure
        with self.lock:
            slot, reason = self.serve(tensors, "another set of weights", self.settings.compile == "background")
            if slot is not None and slot.stale is not None:
                if slot.restless:
                    slot.calm += 1
                    return None, WEIGHTS_CHANGED
                if not self.refit(slot, tensors):
                    return None, WEIGHTS_CHANGED
            if slot is not None and slot.weights is not None:
                self.likely[id(tensors[0])] = slot
        return slot, reason

    def serve(self, tensors: Sequence[torch.Tensor], why: str, background: bool) -> tuple[Slot | None, str]:
        """The slot of a set of weights. A slot with an engine that is `stale` is for `refit`."""
        if self.takes_inputs:
            found = self.serve_shared(tensors, why, background)
            if self.takes_inputs:  # still: an engine could be built so
                return found
        key = identity(tensors)
        slot = self.slots.get(key)
        if slot is None:
            if len(self.slots) + self.fleeting >= self.settings.max_weight_sets:
                why = f"more than max_weight_sets={self.settings.max_weight_sets} sets of weights; they are inputs"
                return self.serve_shared(tensors, why, background)
            try:
                weights = WeightSet(tensors, self.check, functools.partial(self.forget, key))
            except Unsupported as error:
                return None, str(error)
            slot = self.slots[key] = Slot(weights)
            if key not in self.moved:
                return self.build(slot, tensors, why, background), BEING_BUILT
            # The same parameters with new memory (`p.data = ...`): a change like any other.
            self.moved.discard(key)
            self.note_change()
        elif slot.refused is not None:
            return None, slot.refused
        else:
            assert slot.weights is not None
            try:
                changed = slot.weights.changed(tensors)
            except Unsupported as error:
                return None, str(error)
            if changed:
                had = slot.engine is not None
                slot.note_change()
                if had and slot.engine is None:
                    self.note_change()
            elif slot.fitted is not None:
                slot.put(slot.fitted[0])  # the same, elsewhere perhaps
        if slot.engine is not None or slot.building:
            return slot, BEING_BUILT
        slot.calm += 1
        # An engine that can be refitted is worth building at the first change; one for these weights when they rest.
        if self.settings.rebuild == "never" or (not self.refits and slot.calm <= self.settings.rebuild_after):
            return None, WEIGHTS_CHANGED
        count("rebuilds", WEIGHTS_CHANGED)
        return self.build(slot, tensors, WEIGHTS_CHANGED, self.settings.rebuild == "background"), WEIGHTS_CHANGED

    def serve_shared(self, tensors: Sequence[torch.Tensor], why: str, background: bool) -> tuple[Slot | None, str]:
        if self.why_no_inputs is not None:
            return None, self.why_no_inputs
        if self.shared is None:
            self.shared = Slot(None)
            return self.build(self.shared, tensors, why, background), BEING_BUILT
        if self.shared.refused is not None:
            return None, self.shared.refused
        return self.shared, BEING_BUILT

    def refit(self, slot: Slot, tensors: Sequence[torch.Tensor]) -> bool:
        """Gives the slot's engine the weights that the slot's set has by now. False, and no engine, where it fails."""
        assert slot.engine is not None
        try:
            slot.engine.refit(tensors)
        except TrtDynamoError as error:
            if self.settings.strict:
                raise
            log.warning(
                "%s: its engine is rebuilt after each change, since it cannot be refitted: %s", self.name, error
            )
            self.refits, self.why_no_refit = False, str(error)
            slot.take_out()
            slot.calm = 0
            return False
        slot.put(slot.engine)
        count("refits")
        return True

    def note_change(self) -> None:
        """At a change that no engine can follow: from now on they are built so that they can."""
        self.refits = self.why_no_refit is None
        if self.refits:
            log.info("%s: its weights changed; it gets an engine whose weights can be changed", self.name)
            return
        log.info(
            "%s: its weights changed; eager serves until they rest for %d calls, since engines cannot be refitted: %s",
            self.name,
            self.settings.rebuild_after,
            self.why_no_refit,
        )

    def forget(self, key: tuple[int, ...]) -> None:
        """Lets go of the engine of weights whose memory is gone, perhaps with their model."""
        slot = self.slots.pop(key, None)
        if slot is not None:
            slot.take_out()
            # As made anew for each call, by `functional_call` for instance: no engine of their own is worth it.
            self.fleeting += slot.served < 2
            for first, each in list(self.likely.items()):
                if each is slot:
                    self.likely.pop(first, None)
            if len(self.moved) > 100:
                self.moved.clear()
            self.moved.add(key)

    # -- which engine fits the sizes ----------------------------------------------------------------------------------

    def widen(
        self, slot: Slot, narrow: Engine, tensors: Sequence[torch.Tensor], args: Sequence[Any], error: OutsideProfile
    ) -> Engine | None:
        """Asks for an engine that takes these sizes too, which `narrow` does not; gives it back only where another call
        has brought it meanwhile, or where the settings let the call wait for it.
        """
        if self.settings.rebuild == "never":
            return None
        with self.lock:
            if slot.engine is not narrow:
                return slot.engine
            if not self.ranges.grow(args, error, narrow.built_for) or slot.building:
                return None
            count("rebuilds", RANGE_GROWN)
            built = self.build(slot, tensors, RANGE_GROWN, self.settings.rebuild == "background", str(error))
            if built is None or built.engine is None or self.settings.rebuild != "sync":
                return None
            return built.engine if built.stale is None or self.refit(built, tensors) else None

    # -- building -----------------------------------------------------------------------------------------------------

    def build(
        self, slot: Slot, tensors: Sequence[torch.Tensor], why: str, background: bool, detail: str = ""
    ) -> Slot | None:
        """Fills the slot, now or later. None where nothing can be built, or not now."""
        log.info("%s: an engine is needed: %s", self.name, why)
        slot.building = True
        wanted = Build(self.name, why, detail, background=background)
        if background:
            run_in_background(functools.partial(self.fill, slot, list(tensors), wanted))
            return slot
        self.fill(slot, tensors, wanted)
        return slot if slot.engine is not None else None

    def fill(self, slot: Slot, tensors: Sequence[torch.Tensor], build: Build) -> None:
        """Builds the slot's engine for the weights and ranges of now, and puts it in if the weights are still those."""
        weights, ranges = slot.weights, self.ranges.now
        refit = weights is not None and self.refits
        content = weights.snapshot.content if weights is not None else b""
        unchanged = functools.partial(weights.is_content, tensors, content) if weights is not None else lambda: True
        hot = self.ranges.seen.hot(ranges)
        build.ranges = {str(symbol): (span.min, span.opt, span.max) for symbol, span in ranges.items()}
        build.profiles += len(hot)
        try:
            with noted(build):
                baked = tensors if weights is not None else None
                engine = self.make_engine(baked, ranges, hot, refit=refit, unchanged=unchanged)
                build.hit = engine.hit
                if build.reason == NEW_GRAPH and engine.made_otherwise:
                    build.reason, build.detail = MADE_OTHERWISE, engine.made_otherwise
        except WeightsMoved:
            # A write during the build: the next call sees it too, and asks again.
            slot.building = False
            return
        except BaseException as error:
            if isinstance(error, BuildError) and self.may_be_narrower(slot, ranges, error):
                self.fill(slot, tensors, dataclasses.replace(build, detail=TOO_LARGE))
                return
            with self.lock:
                slot.building = False
                if not isinstance(error, Exception):
                    raise  # an interrupt is the caller's
                if not shutdown.ENDING.is_set() and not self.goes_on(slot, error, refit=refit):
                    self.give_up(error, in_background=build.background)
            return
        engine.built_for = ranges
        engine.in_users_graphs = weights is None or self.check == "frozen"
        if self.on_cuda and self.settings.cuda_graphs != "off":
            # Where the whole call shall become a graph, that is tried first.
            warm = WARM if self.settings.cuda_graphs == "auto" else 2 * WARM
            engine.use_cuda_graphs(self.name, self.settings.cuda_graphs_kept, warm)
        with self.lock:
            slot.building = False
            if refit or weights is None or weights.snapshot.content == content:
                slot.put(engine, stale=refit)

    def goes_on(self, slot: Slot, error: Exception, *, refit: bool) -> bool:
        """Whether there is another way after a build that failed. With `strict`, a bug of ours is an error all the
        same.
        """
        if self.settings.strict and not isinstance(error, BuildError | Unsupported | EngineError):
            return False
        if slot.engine is not None and self.ranges.go_back(slot.engine.built_for, error):
            return True
        if refit:
            log.info("%s: no engine whose weights can be changed: %s", self.name, error)
            self.refits, self.why_no_refit = False, str(error)
            return True
        if slot.weights is None and self.has_weights:
            log.warning("%s: no engine takes these weights as inputs, so they are copied into it: %s", self.name, error)
            self.takes_inputs, self.shared = False, None
            self.why_no_inputs = f"no engine takes more weights as inputs: {error}"
            return True
        return False

    def may_be_narrower(self, slot: Slot, ranges: Ranges, error: BuildError) -> bool:
        """Whether a first engine that could not be built is tried for narrower ranges."""
        with self.lock:
            return slot.engine is None and self.ranges.shrink(ranges, error)

    def give_up(self, error: Exception, *, in_background: bool = False) -> None:
        """Eager from now on, said once; with `strict`, the error is the caller's, or the next caller's."""
        if self.settings.strict and not in_background:
            raise error
        if self.settings.strict:
            self.failure = error
        log.warning("%s runs in eager from now on: %s", self.name, error)
        self.broken = f"{type(error).__name__}: {error}"
        self.slots.clear()
        self.likely.clear()
        self.shared = None
