"""A segment at run time: the engine where it fits the call, else the segment's own graph in eager.

Comes in: a `Segment`'s graph and a function that makes an engine for given weights. Goes out: a module that answers every
call that eager would answer, and counts why it did not use an engine.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import count
from trt_dynamo.runtime.engine import Engine, OutsideProfile
from trt_dynamo.weights import WeightSet, identity

log = logging.getLogger(__name__)

MakeEngine = Callable[[Sequence[torch.Tensor] | None, Sequence[str]], Engine]


class Served:
    """A weight set and the engine that was built from it; none while its weights are in motion."""

    def __init__(self, weights: WeightSet, engine: Engine | None) -> None:
        self.weights = weights
        self.engine = engine
        self.calm = 0  # calls since the weights last changed


class SegmentModule(torch.nn.Module):
    """Runs one segment. `weights` are the positions of the arguments that are baked into its engines."""

    def __init__(
        self,
        name: str,
        module: GraphModule,
        weights: Sequence[int],
        make_engine: MakeEngine,
        digest: Callable[[torch.Tensor], str],
        *,
        max_weight_sets: int,
        rebuild_after: int,
        strict: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.eager = module
        self.positions = tuple(weights)
        self.make_engine = make_engine
        self.digest = digest
        self.max_weight_sets = max_weight_sets
        self.rebuild_after = rebuild_after
        self.strict = strict
        self.lock = threading.RLock()
        self.served: dict[tuple[int, ...], Served] = {}
        self.shared: Engine | None = None  # takes the weights as inputs, for more sets than get engines of their own
        self.moved: set[tuple[int, ...]] = set()  # sets whose memory was freed
        self.broken: str | None = None

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        engine, reason = self.engine_for([args[i] for i in self.positions])
        if engine is not None:
            try:
                results = engine(args)
            except OutsideProfile as error:
                log.info("%s: %s; answered in eager", self.name, error)
                reason = "outside the profile"
            except TrtDynamoError as error:
                self.give_up(error)
                reason = "the engine failed"
            else:
                count("engine_calls")
                return results
        count("eager_calls", reason)
        results = self.eager.forward(*args)
        return tuple(results)

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Builds (or loads) the engine for the weights that the model has now."""
        with self.lock:
            self.serve(tensors, "first build")

    def engine_for(self, tensors: Sequence[torch.Tensor]) -> tuple[Engine | None, str]:
        """The engine that holds exactly these weights, or why there is none."""
        served = self.served.get(identity(tensors))
        if served is not None and served.engine is not None and not served.weights.dead and served.weights.is_unchanged(tensors):
            return served.engine, ""
        if self.broken is not None:
            return None, self.broken
        with self.lock:
            return self.serve(tensors, "another set of weights")

    def serve(self, tensors: Sequence[torch.Tensor], why: str) -> tuple[Engine | None, str]:
        key = identity(tensors)
        served = self.served.get(key)
        if served is None or served.weights.dead:
            if len(self.served) >= max(self.max_weight_sets, 1):
                return self.serve_shared()
            weights = WeightSet(tensors, self.digest, functools.partial(self.forget, key))
            if key not in self.moved:
                return self.build(key, weights, tensors, why)
            # The same parameters with new memory (`p.data = ...`): a change like any other.
            self.moved.discard(key)
            served = self.served[key] = Served(weights, None)
            self.note_change()
        if not served.weights.is_unchanged(tensors) and served.weights.refresh(tensors):
            if served.engine is not None:
                self.note_change()
            served.engine, served.calm = None, 0
        if served.engine is not None:
            return served.engine, ""
        served.calm += 1
        if served.calm <= self.rebuild_after:
            return None, "the weights changed"
        count("rebuilds", "the weights changed")
        return self.build(key, served.weights, tensors, "the weights changed")

    def note_change(self) -> None:
        log.info("%s: its weights changed; eager serves until they rest for %d calls", self.name, self.rebuild_after)

    def forget(self, key: tuple[int, ...]) -> None:
        """Lets go of the engine of weights whose memory is gone, perhaps with their model."""
        if self.served.pop(key, None) is not None:
            if len(self.moved) > 100:
                self.moved.clear()
            self.moved.add(key)

    def serve_shared(self) -> tuple[Engine | None, str]:
        if self.shared is None:
            log.info("%s: more than %d sets of weights; one engine takes them as inputs", self.name, self.max_weight_sets)
            try:
                self.shared = self.make_engine(None, ())
            except TrtDynamoError as error:
                return None, self.give_up(error)
        return self.shared, ""

    def build(
        self, key: tuple[int, ...], weights: WeightSet, tensors: Sequence[torch.Tensor], why: str
    ) -> tuple[Engine | None, str]:
        log.info("%s: an engine is needed: %s", self.name, why)
        try:
            engine = self.make_engine(tensors, weights.digests)
        except TrtDynamoError as error:
            return None, self.give_up(error)
        # A write during the build makes the engine stale: it shows at the next check, which compares with what was baked.
        self.served[key] = Served(weights, engine)
        return engine, ""

    def give_up(self, error: TrtDynamoError) -> str:
        """Eager from now on, said once; with `strict`, the error is the caller's."""
        if self.strict:
            raise error
        log.warning("%s runs in eager from now on: %s", self.name, error)
        self.broken = f"{type(error).__name__}: {error}"
        self.served.clear()
        self.shared = None
        return self.broken
