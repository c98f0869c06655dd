"""One look at the weights of all engines in a compiled call, in place of one for each engine.

Comes in: what computes a lowered graph. Goes out: the same; once each of its segments was answered by an engine some
times in a row, the next calls start the same engines without asking, and look at all their weights at the end. Where
that shows a change, or anything is not as it was, the call begins again and each segment looks for itself. So this is
for graphs that can be run twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from trt_dynamo.processes import forget_in_children
from trt_dynamo.reports import CALLS
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.streams import current_stream, is_capturing
from trt_dynamo.weights import Reader, Snapshot, pointers_of

if TYPE_CHECKING:
    from trt_dynamo.runtime.segment_runner import SegmentRunner
    from trt_dynamo.runtime.slots import Slot

log = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Sequence[Any]]

# So many calls in a row must find all as it was before; twice as many after each that did not, up to PATIENCE.
CALM, PATIENCE = 3, 64


class NotAsBefore(Exception):
    """A segment has another engine than in the calls before."""


@dataclasses.dataclass(eq=False)
class Use:
    """An engine that answered in a call: that of a slot at one of its turns. No engine is kept alive by this."""

    segment: SegmentRunner
    slot: Slot
    turn: object
    held: Snapshot | None
    tensors: Sequence[torch.Tensor]


class Noting:
    """A call whose segments look each for itself, and what answered them: None where that was not an engine."""

    def __init__(self) -> None:
        self.uses: list[Use | None] = []

    def answer(self, segment: SegmentRunner, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        results, use = segment.answer_with_care(args)
        self.uses.append(use)
        return results


class Looking:
    """A call that looks at all weights at its end; `tensors` are those that it came with."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        self.at = 0
        self.tensors: list[torch.Tensor] = []

    def answer(self, segment: SegmentRunner, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """What the engine gives that answered at this place before."""
        if self.at == len(self.uses):
            raise NotAsBefore
        use = self.uses[self.at]
        slot = use.slot
        fitted = slot.fitted  # before its turn is read, which changes first
        if use.segment is not segment or fitted is None or slot.turn is not use.turn:
            raise NotAsBefore
        self.at += 1
        if segment.seen.wanted:
            segment.seen.note(args)
        if use.held is not None:
            self.tensors += segment.weights_of(args)
        return fitted[0](args)


class Look:
    """What all engines of a call hold, as one snapshot; None where no weights are baked into any."""

    def __init__(self, uses: Sequence[Use], baked: Sequence[tuple[Snapshot, Sequence[torch.Tensor]]]) -> None:
        for use in uses:
            use.slot.served += 1  # once for all calls to come
        # Without the tensors, which a later call brings.
        self.uses = [dataclasses.replace(use, tensors=()) for use in uses]
        self.snapshot = joined(baked) if baked else None


def joined(baked: Sequence[tuple[Snapshot, Sequence[torch.Tensor]]]) -> Snapshot:
    """The snapshots of some tensors as one of all of them."""
    parts = [part for part, _ in baked]
    starts = itertools.accumulate([len(part.pointers) for part in parts[:-1]], initial=0)
    return Snapshot(
        parts[0].check,
        b"".join(part.objects for part in parts),
        [pointer for part in parts for pointer in part.pointers],
        [version for part in parts for version in part.versions],
        parts[0].steps,
        parts[0].declared,
        b"".join(part.content for part in parts),
        Reader([tensor for _, tensors in baked for tensor in tensors]),
        tuple(start for start, part in zip(starts, parts, strict=True) if part.pointers),
    )


def can_be_joined(parts: Sequence[tuple[Snapshot, Sequence[torch.Tensor]]]) -> bool:
    """Whether one snapshot can stand for these, each with its tensors: they are of one device, where content is read in
    their order; of one time, where that counts; and the tensors still lie where they lay.
    """
    times = {(each.check, {"observed": each.steps, "frozen": each.declared}.get(each.check)) for each, _ in parts}
    devices = {tensor.device for _, tensors in parts for tensor in tensors}
    if len(times) > 1 or len(devices) > 1:
        return False
    return all(each.check == "frozen" or pointers_of(tensors) == each.pointers for each, tensors in parts)


class OneLook:
    """Calls `run`, which has `segments` segments. Takes its arguments as a list."""

    _boxed_call = True

    def __init__(self, name: str, run: Boxed, segments: int, index: int | None) -> None:
        self.name, self.run, self.segments = name, run, segments
        self.index = index  # of the GPU; None on the CPU
        self.look: Look | None = None
        self.calm, self.patience = 0, CALM
        forget_in_children(self)

    def leave_to_parent(self) -> object:
        """Engines are not for a forked child."""
        left, self.look, self.calm = self.look, None, 0
        return left

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if PRESENT.larger is not None:
            return self.run(args)
        look = self.look
        if look is not None and not self.captured_by_user():
            results = self.at_the_end(look, args)
            if results is not None:
                return results
            self.look, self.calm, self.patience = None, 0, min(2 * self.patience, PATIENCE)
        return self.each_for_itself(args)

    def captured_by_user(self) -> bool:
        """Whether the user captures a CUDA graph: then each segment says what it can do."""
        return self.index is not None and current_stream(self.index) != 0 and is_capturing()

    def at_the_end(self, look: Look, args: list[Any]) -> Sequence[Any] | None:
        """The results, or None where they may not be those for the weights of this call."""
        PRESENT.larger = this = Looking(look.uses)
        try:
            if look.snapshot is not None:
                look.snapshot.begin()
            results = self.run(args)
        except Exception as error:  # noqa: BLE001  whatever it is: if it is not about the engines, it comes again
            log.debug("%s begins again: %s: %s", self.name, type(error).__name__, error)
            return None
        finally:
            PRESENT.larger = None
        if this.at != len(look.uses):
            return None
        if look.snapshot is not None and not look.snapshot.holds(tuple(this.tensors)):
            return None
        for _ in look.uses:
            CALLS.tick()
        return results

    def each_for_itself(self, args: list[Any]) -> Sequence[Any]:
        PRESENT.larger = this = Noting()
        try:
            results = self.run(args)
        finally:
            PRESENT.larger = None
        uses = [use for use in this.uses if use is not None]
        baked = [(use.held, use.tensors) for use in uses if use.held is not None]
        if len(uses) == len(this.uses) == self.segments and can_be_joined(baked):
            self.calm += 1
            if self.calm >= self.patience:
                self.look = Look(uses, baked)
        else:
            self.calm = 0
        return results


def with_one_look(
    name: str, run: Boxed, module: GraphModule, segments: int, device: torch.device, verified: bool
) -> Callable[..., Any]:
    """`run`, with one look at the weights of its segments where there are some, none of which is `verified` by eager,
    and where the lowered graph can be run twice.
    """
    if segments < 2 or verified or not repeatable(module):
        return run
    on_cuda = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_cuda else None
    return OneLook(name, run, segments, index)


def repeatable(module: GraphModule) -> bool:
    """Whether to run the graph twice is to run it once: it writes to nothing and draws no random numbers."""
    return all(node.op != "call_function" or pure(node.target) for node in module.graph.nodes)


def pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return getattr(target, "__module__", None) in ("_operator", "math") or target in (
        torch.sym_float,
        torch.sym_int,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
        torch.sym_ite,
        torch.sym_sum,
    )
