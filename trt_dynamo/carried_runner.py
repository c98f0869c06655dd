"""What answers the calls of a carried segment. In: the segment, and the bytes of its engine. Out: results as tensors of
their own; from the engine where it fits, from one that is built, or from the segment's graph.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from trt_dynamo.backend import segment_runner, why_eager
from trt_dynamo.cache.carried import Carried, carrying
from trt_dynamo.cache.disk import Damaged
from trt_dynamo.carried_segment import CarriedSegment, plans_in, segment_in
from trt_dynamo.errors import EngineError, FileError
from trt_dynamo.model_file import differences
from trt_dynamo.partition import Segment, main_device
from trt_dynamo.processes import renewed_in_children
from trt_dynamo.reports import count
from trt_dynamo.settings import Settings, warn_once

log = logging.getLogger(__name__)


class Runner:
    """Answers the calls of a carried segment. Its engine is loaded, or built, at the first."""

    def __init__(self, carried: CarriedSegment, engine: torch.Tensor) -> None:
        self.carried = carried
        self.engine = engine
        self.run: Callable[..., Any] | None = None

    def __call__(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[torch.Tensor]:
        args = self.carried.arguments(tensors, numbers)
        with torch.no_grad():
            return self.carried.own((self.run or self.prepared(args))(*args))

    def prepared(self, args: Sequence[Any]) -> Callable[..., Any]:
        """What answers, made for the weights of this call."""
        with LOCK:
            if self.run is None:
                # Only for this: the runner must not keep alive what it is kept by.
                self.run, self.engine = self.made(args), torch.empty(0, dtype=torch.uint8)
            return self.run

    def made(self, args: Sequence[Any]) -> Callable[..., Any]:
        segment = self.carried.segment
        refuse_other_devices(segment, args)
        settings = settings_of(self.carried.options)
        reason = why_eager(args, settings)
        if reason is not None:
            count("eager_graphs", reason)
            return segment.module.forward
        brought = Carried()
        damage = ""
        try:
            brought.plans = plans_in(self.engine, settings)
        except (FileError, Damaged) as error:
            damage = str(error)
        brought.lacks = functools.partial(self.lacking, settings, damage)
        try:
            return with_engine(segment, args, settings, brought)
        except Exception as error:  # as in `backend`: whatever it is, the user's model runs
            if settings.strict:
                raise
            log.warning("%s runs in eager: %s: %s", segment.name, type(error).__name__, error)
            count("eager_graphs", type(error).__name__)
            return segment.module.forward

    def lacking(self, settings: Settings, damage: str) -> None:
        """Says why the engine that came does not fit.

        Raises:
            EngineError: none may be built, by the setting `rebuild`.
        """
        reason = damage or "; ".join(differences(self.carried.platform, "when it was exported"))
        reason = reason or "the weights, the settings or the converters are others than when it was exported"
        told = f"{self.carried.segment.name} of an exported program has no engine that fits: {reason}"
        if settings.rebuild == "never":
            raise EngineError(told)
        warn_once(f"{told}. It is built from the program's graph.")


# What answers for each engine's tensor lives as long as one of them does, with one engine for all that are equal.
RUNNERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
LOCK = threading.RLock()


@renewed_in_children
def renew() -> None:
    """A forked child gets a lock that no other thread holds."""
    global LOCK
    LOCK = threading.RLock()


def runner_of(engine: torch.Tensor, manifest: str) -> Runner:
    """What answers for this tensor, whose content nobody changes."""
    known = RUNNERS.get(engine)
    if known is not None and known[0] == manifest:
        return known[1]  # type: ignore[no-any-return]
    carried = segment_in(manifest)
    with LOCK:
        known = RUNNERS.get(engine)
        if known is None or known[0] != manifest:
            known = RUNNERS[engine] = (manifest, twin_of(engine, manifest) or Runner(carried, engine.detach()))
        return known[1]  # type: ignore[no-any-return]


def twin_of(engine: torch.Tensor, manifest: str) -> Runner | None:
    """What answers for the same program, loaded another time."""
    for other, (text, runner) in RUNNERS.items():
        if text == manifest and torch.equal(other.cpu(), engine.cpu()):
            return runner  # type: ignore[no-any-return]
    return None


def settings_of(options: Mapping[str, Any]) -> Settings:
    return dataclasses.replace(Settings.from_env().merge(options), compile="sync")


def with_engine(segment: Segment, args: Sequence[Any], settings: Settings, carried: Carried) -> Callable[..., Any]:
    """What answers the segment's calls, with an engine of the plans that are carried, or one that is added to them."""
    weights = [args[position] for position in segment.weight_positions]
    with torch.no_grad(), carrying(carried):
        return segment_runner(segment, weights, main_device(segment.module), settings, segment.name)


def refuse_other_devices(segment: Segment, args: Sequence[Any]) -> None:
    """
    Raises:
        EngineError: an argument lies elsewhere than the example did.
    """
    for node, given in zip(segment.module.graph.find_nodes(op="placeholder"), args, strict=True):
        value = node.meta["val"]
        if isinstance(given, torch.Tensor) and given.device != value.device:
            raise EngineError(
                f"{segment.name} of an exported program was made for {value.device}, and got {node.name} on "
                f"{given.device}: move the model before it is compiled"
            )
