"""A segment at run time: the engine where it fits the call, else the segment's own graph in eager.

Comes in: a `Segment`'s graph and a function that makes an engine for given weights and ranges. Goes out: what answers
every call that eager would answer, and counts why it did not use an engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import CALLS, count
from trt_dynamo.runtime import profiling
from trt_dynamo.runtime.cuda_graphs import Capture, NotNow
from trt_dynamo.runtime.engine import OutsideProfile
from trt_dynamo.runtime.guard import Guard
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.one_look import Use
from trt_dynamo.runtime.ports import items_at
from trt_dynamo.runtime.segment_engines import WEIGHTS_CHANGED, MakeEngine, SegmentEngines
from trt_dynamo.runtime.streams import is_capturing
from trt_dynamo.runtime.whole_graph import CapturedUse
from trt_dynamo.settings import Settings

log = logging.getLogger(__name__)

# How often a call starts an engine anew because the weights changed under it, before eager answers.
ATTEMPTS = 3

Results = tuple[torch.Tensor, ...]


class SegmentRunner:
    """Answers the calls of one segment. `positions` are those of its arguments that may be baked into engines;
    `why_no_refit` says why engines whose weights can be changed cannot be had, where that is so; `guard` compares
    engines with eager.
    """

    def __init__(
        self,
        name: str,
        module: GraphModule,
        positions: Sequence[int],
        make_engine: MakeEngine,
        settings: Settings,
        why_no_refit: str | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.name = name
        self.eager = module
        self.guard = guard
        self.engines = SegmentEngines(name, module, positions, make_engine, settings, why_no_refit)
        self.weights_of = items_at(positions)
        self.reads = self.engines.check == "always"
        self.seen = self.engines.ranges.seen
        self.watched = guard is not None or self.seen.wanted > 0  # each call is more than an answer
        self.nvtx = profiling.nvtx_wanted(settings)

    def respond(self, args: Sequence[Any]) -> Results:
        """The answer, under the segment's name for profilers."""
        if not self.nvtx and not profiling.wanted():
            return self.answer(args)
        with profiling.marked(self.name, self.nvtx):
            return self.answer(args)

    def answer(self, args: Sequence[Any]) -> Results:
        """The answer. This function is what a call costs: it does what most calls need, and leaves the others, from
        their beginning, to `answer_with_care`.
        """
        larger = PRESENT.larger
        if larger is not None:
            return larger.answer(self, args)
        tensors = self.weights_of(args)
        slot = self.engines.guess(tensors)
        fitted = slot.fitted if slot is not None else None  # at once: another call may change it in this moment
        if slot is None or fitted is None or self.watched:
            return self.answer_with_care(args)[0]
        engine, held = fitted
        if self.reads and held is not None:
            if self.engines.on_cuda and is_capturing():
                return self.answer_with_care(args)[0]
            held.begin()
        try:
            results = engine(args)
        except TrtDynamoError:
            return self.answer_with_care(args)[0]
        # After the engine was started, so that its own work hides the cost.
        if held is not None and not held.holds(tensors):
            return self.answer_with_care(args)[0]
        slot.served += 1
        CALLS.tick()
        return results

    def answer_with_care(self, args: Sequence[Any]) -> tuple[Results, Use | None]:
        """The answer, and the use of an engine that gave it, if one did; whatever the state of the engines is."""
        if self.seen.wanted:
            self.seen.note(args)
        tensors = self.weights_of(args)
        engines = self.engines
        slot, reason = engines.first_guess(tensors)
        attempts = 0
        while slot is not None:
            fitted = slot.fitted
            if fitted is None:
                break
            engine, held = fitted
            turn = slot.turn
            if held is not None and self.reads:
                held.begin()
            try:
                results = engine(args)
            except OutsideProfile as error:
                guessed = slot
                slot, reason = engines.slot_for(tensors)
                if slot is guessed and slot.fitted and engines.widen(slot, engine, tensors, args, error) is None:
                    reason = "outside the profile"
                    break
                continue
            except TrtDynamoError as error:
                engines.give_up(error)
                reason = "the engine failed"
                break
            if held is None or held.holds(tensors):
                if self.guard is not None and self.guard.due(engine, held):
                    instead = self.guard.instead(slot, (engine, held), args, tensors, results)
                    if instead is not None:
                        return instead, None
                slot.served += 1
                CALLS.tick()
                return results, Use(self, slot, turn, held, tensors) if slot.fitted is fitted else None
            attempts += 1
            if attempts == ATTEMPTS:
                reason = WEIGHTS_CHANGED
                break
            slot, reason = engines.slot_for(tensors)
        return self.answer_in_eager(args, reason), None

    def answer_in_eager(self, args: Sequence[Any], reason: str) -> Results:
        count("eager_calls", reason)
        if not self.nvtx and not profiling.wanted():
            return tuple(self.eager.forward(*args))
        with profiling.marked(profiling.in_eager(self.name, reason), self.nvtx):
            return tuple(self.eager.forward(*args))

    def answer_for_graph(self, capture: Capture, args: Sequence[Any]) -> Results:
        """The engine's answer while a CUDA graph of ours is captured, whose replays look at the weights.

        Raises:
            NotNow: no engine is ready for this call.
        """
        tensors = self.weights_of(args)
        slot = self.engines.guess(tensors)
        fitted = slot.fitted if slot is not None else None
        if slot is None or fitted is None:
            raise NotNow(f"{self.name} has no engine for this call yet")
        if self.guard is not None and not self.guard.knows(*fitted):
            raise NotNow(f"the engine of {self.name} is not verified yet")
        try:
            results = fitted[0].for_graph(capture, args)
        except OutsideProfile as error:
            raise NotNow(str(error)) from error
        capture.uses.append(CapturedUse(slot, *fitted, tensors))
        return results


class SegmentModule(torch.nn.Module):
    """A `SegmentRunner` where FX wants a module. A module's own attributes are slow to find: a call goes past them."""

    def __init__(self, runner: SegmentRunner) -> None:
        super().__init__()
        self.runner = runner
        self.respond = runner.respond

    def forward(self, *args: Any) -> Results:
        return self.respond(args)
