"""The accuracy guard (setting `verify`): compares engines with their eager twins while a model runs.

Comes in: an engine's results for a call. Goes out: eager's where they differ; the engine is then taken out of use, with
one warning that names the segment and the node where the fault begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trt_dynamo.errors import AccuracyError
from trt_dynamo.processes import forget_in_children
from trt_dynamo.reports import count
from trt_dynamo.runtime.agreement import Accuracy, Agreement, Rounded, compare
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.runtime.slots import Slot
from trt_dynamo.settings import Settings
from trt_dynamo.weights import Snapshot

log = logging.getLogger(__name__)

DIFFERS = "verify: the engine's answers are not eager's"
NOT_VERIFIED = "verify: the engine was not compared with eager before a CUDA graph is captured"
MOVED = "verify: the weights changed during the comparison"

# So many wrong engines of a segment (each set of weights has its own) get a search for the bad node, and a warning.
SEARCHES = 4

# Finds where the fault of an engine begins, for the arguments of a call; says it as a text.
Locate = Callable[[Engine, Sequence[Any]], object]


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """One comparison. `cause` is where the fault begins, None where there is none."""

    segment: str
    accuracy: Accuracy
    agreement: Agreement
    cause: object | None = None

    def __str__(self) -> str:
        of = f"result {self.agreement.result}"
        limit = f"tolerance {self.accuracy.tolerance:.2g}, for {self.accuracy.name}"
        return f"{of}: {self.agreement.difference} ({limit})"


class Guard:
    """Watches over the engines of one segment.

    Args:
        name: the segment's.
        eager: its own graph.
        accuracy: how near the results must be.
        settings: `verify`, `verify_every`, `strict`.
        locate: finds the node where a fault begins.
    """

    def __init__(self, name: str, eager: GraphModule, accuracy: Accuracy, settings: Settings, locate: Locate) -> None:
        self.name, self.eager, self.accuracy, self.locate = name, eager, accuracy, locate
        self.strict = settings.strict
        self.every = settings.verify_every if settings.verify == "sample" else 0
        self.calls = itertools.count(1)
        self.lock = threading.Lock()
        self.passed: weakref.WeakKeyDictionary[Engine, Any] = weakref.WeakKeyDictionary()
        self.causes: weakref.WeakKeyDictionary[Engine, object] = weakref.WeakKeyDictionary()
        self.searches = 0
        forget_in_children(self)

    def leave_to_parent(self) -> object:
        """A lock that nobody holds, for a forked child."""
        self.lock = threading.Lock()
        return None

    def knows(self, engine: Engine, held: Snapshot | None) -> bool:
        """Whether the engine, with the weights that it has now, has been found right."""
        return bool(self.passed.get(engine) == mark(engine, held))

    def due(self, engine: Engine, held: Snapshot | None) -> bool:
        """Whether the call that the engine has just answered is to be looked at."""
        return not self.knows(engine, held) or (self.every > 0 and next(self.calls) % self.every == 0)

    def instead(
        self,
        slot: Slot,
        fitted: tuple[Engine, Snapshot | None],
        args: Sequence[Any],
        tensors: tuple[torch.Tensor, ...],
        results: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...] | None:
        """Eager's answer, where the engine's must not be given; None where it may.

        Raises:
            AccuracyError: the engine is wrong, with `strict`.
        """
        engine, held = fitted
        if engine.on_cuda and torch.cuda.is_current_stream_capturing():
            if self.knows(engine, held):
                return None
            count("eager_calls", NOT_VERIFIED)
            return tuple(self.eager.forward(*args))
        try:
            expected = tuple(self.eager.forward(*args))
            found = compare(results, expected, self.accuracy, lambda: self.rounded(args))
        except torch.OutOfMemoryError as error:
            log.warning("%s could not be compared with eager, and is used as it is: %s", self.name, error)
            self.passed[engine] = mark(engine, held)
            return None
        count("verified")
        if found.agrees:
            tell(Judgement(self.name, self.accuracy, found))
            if found.compared:
                self.passed[engine] = mark(engine, held)
            return None
        if held is not None:
            held.begin()
            if not held.holds(tensors):  # eager may have seen others than the engine
                count("eager_calls", MOVED)
                return expected
        self.breach(slot, engine, found, args)
        count("eager_calls", DIFFERS)
        return expected

    def rounded(self, args: Sequence[Any]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            results: Sequence[torch.Tensor] = Rounded(self.eager, self.accuracy.unit).run(*args)
        return results

    def breach(self, slot: Slot, engine: Engine, found: Agreement, args: Sequence[Any]) -> None:
        """Takes the engine out of use and says why, once; with `strict`, raises instead, at each call."""
        self.passed.pop(engine, None)
        if not self.strict:
            with self.lock:
                if slot.refused is not None:
                    return
                slot.refuse(DIFFERS)
        cause = self.cause(engine, args)
        judgement = Judgement(self.name, self.accuracy, found, cause)
        tell(judgement)
        count("breaches", f"{self.name}: {judgement}")
        if self.strict:
            raise AccuracyError(f"{self.name}: its engine's answers are not eager's: {judgement}. {cause}")
        text = "%s: its engine's answers are not eager's, so eager answers from now on: %s. %s"
        log.log(logging.WARNING if cause else logging.INFO, text, self.name, judgement, cause)

    def cause(self, engine: Engine, args: Sequence[Any]) -> object:
        """Where the fault of an engine begins; nothing where enough was searched."""
        with self.lock:
            if engine not in self.causes:
                self.searches += 1
                self.causes[engine] = self.locate(engine, args) if self.searches <= SEARCHES else ""
            return self.causes[engine]


def mark(engine: Engine, held: Snapshot | None) -> Any:
    """The state in which an engine was found right: a refit, or other weights, make another."""
    return (held.content if held is not None else None, engine.refits)


LISTENERS: list[list[Judgement]] = []


@contextlib.contextmanager
def judgements() -> Iterator[list[Judgement]]:
    """Collects the comparisons that are made while the block runs, in all threads."""
    collected: list[Judgement] = []
    LISTENERS.append(collected)
    try:
        yield collected
    finally:
        LISTENERS[:] = [each for each in LISTENERS if each is not collected]


def tell(judgement: Judgement) -> None:
    log.debug("%s: %s", judgement.segment, judgement)
    for each in LISTENERS:
        each.append(judgement)
