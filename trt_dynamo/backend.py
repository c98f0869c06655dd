"""The backend, whole, on a page: settings, lowering, partition, then for each segment its precision and what runs it.
How that gets its engines is in `engine_making`: from the cache, or converted and built.

`torch.compile(model, backend="tensorrt")` calls `tensorrt` with Dynamo's graph and its inputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.bisection import Bisection
from trt_dynamo.early_look import early_look
from trt_dynamo.engine_making import engine_on_trial, make_engine
from trt_dynamo.errors import SettingsError, TrtDynamoError
from trt_dynamo.fallback import NothingForTensorRT, compile_eager_parts, compile_graph
from trt_dynamo.graph_breaks import ANOTHER_GO, note_guard_failure, warn_if_recurrent_skipped
from trt_dynamo.identity import Blueprint
from trt_dynamo.known_ranges import use_known_ranges
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.lowering.lengths import keeps_lengths
from trt_dynamo.partition import Segment, main_device, partition
from trt_dynamo.partition.single import boxed
from trt_dynamo.precision import Findings, Precision
from trt_dynamo.precision.recording import BEING_RECORDED, Recording, recall
from trt_dynamo.registration import release_shared_name, warn_if_taken
from trt_dynamo.reports import count
from trt_dynamo.runtime import SegmentModule, SegmentRunner
from trt_dynamo.runtime.agreement import accuracy_of
from trt_dynamo.runtime.cuda_graphs import Capture, NotNow
from trt_dynamo.runtime.guard import Guard
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.layouts import with_same_layouts
from trt_dynamo.runtime.one_look import with_one_look
from trt_dynamo.runtime.whole_graph import WholeGraph, why_not_whole
from trt_dynamo.settings import Settings, warn_once
from trt_dynamo.stated_types import gives_stated_types
from trt_dynamo.tf32 import allows_tf32
from trt_dynamo.training import needs_gradients, train
from trt_dynamo.wrappers import DATA_PARALLEL, in_data_parallel

log = logging.getLogger(__name__)


@keeps_lengths
@gives_stated_types
def tensorrt(module: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
    """The backend for `torch.compile(model, backend="tensorrt", options={...})`. Options are the fields of `Settings`.

    Raises:
        SettingsError: an option is unknown or does not parse. Anything else ends in eager, with the reason logged,
            unless `strict` is set.
    """
    release_shared_name(tensorrt)
    warn_if_taken(tensorrt)
    warn_if_recurrent_skipped()
    note_guard_failure()
    settings = read_settings(keywords)
    trains = settings.runtime != "eager" and needs_gradients(inputs)
    reason = "a backward pass may follow" if trains else why_eager(inputs, settings)
    if reason is not None:
        count("eager_graphs", reason)
    try:
        if trains:
            return train(module, inputs, settings)
        if reason is not None:
            return left_over(module, inputs, settings)
        use_known_ranges(module, inputs, settings)
        with early_look(module, inputs, settings):
            return lower(module, inputs, functools.partial(compile_lowered, settings=settings), settings)
    except ANOTHER_GO:
        raise
    except NothingForTensorRT as error:
        count("eager_graphs", str(error))
        return left_over(module, inputs, settings)
    except Exception as error:  # whatever it is, the user's model runs: Dynamo's graph is as it was
        if settings.strict:
            raise
        kind = type(error).__name__
        log.warning("a graph runs in %s because compiling it failed: %s: %s", settings.fallback, kind, error)
        count("eager_graphs", kind)
        return module.forward if trains else left_over(module, inputs, settings)


def left_over(module: GraphModule, inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """A graph that TensorRT has no part in: as it is, or compiled by Inductor."""
    chosen = settings.training if needs_gradients(inputs) else settings.fallback
    return compile_graph(module, inputs, settings) if chosen == "inductor" else module.forward


def compile_lowered(lowered: Lowered, settings: Settings) -> Callable[..., Any]:
    """The lowered graph with an engine in the place of each segment."""
    name, device = f"graph_{count('graphs') - 1}", main_device(lowered.module)
    with unset_fake_temporarily(), torch.no_grad():
        parts = partition(lowered.module, lowered.names, settings)
        for segment in parts.segments:
            weights = lowered.weights_of(segment.weights)
            runner = segment_runner(segment, weights, device, settings, f"{name}.{segment.name}")
            setattr(parts.module, segment.name, runner)
        outer = parts.module
        if settings.fallback == "inductor":
            outer = compile_eager_parts(parts, settings, name)
    log.info("%d segments, %d nodes in TensorRT, %d in eager", len(parts.segments), *split_count(parts.verdicts))
    verified = settings.verify != "off"
    run = with_one_look(name, boxed(outer), lowered.module, len(parts.segments), device, verified)
    if settings.cuda_graphs == "whole" and device.type == "cuda":
        run = in_whole_graph(run, lowered, device, settings, name)
    return run if settings.weights == "frozen" else with_same_layouts(run, lowered.module)


def in_whole_graph(
    run: Callable[[list[Any]], Sequence[Any]],
    lowered: Lowered,
    device: torch.device,
    settings: Settings,
    name: str,
) -> Callable[..., Any]:
    """The compiled call, replayed as one CUDA graph, unless something hinders that."""
    hindrance = why_not_whole(lowered.module)
    if hindrance is not None:
        log.info("%s is not captured whole as a CUDA graph: %s", name, hindrance)
        return run
    index = device.index if device.index is not None else torch.cuda.current_device()
    return WholeGraph(name, run, lowered.weights, index, settings.cuda_graphs_kept)


def segment_runner(
    segment: Segment, weights: Sequence[torch.Tensor], device: torch.device, settings: Settings, name: str
) -> torch.nn.Module:
    """What runs a segment, its engine built; with precision=auto, once it is known which values it computes."""

    def make(found: Findings, tensors: Sequence[torch.Tensor]) -> SegmentModule:
        precision = Precision(segment.module, segment.weights, settings, found)
        precision.see(tensors)
        tf32 = allows_tf32(segment.module)
        module = segment_module(Blueprint(segment, precision, tf32, device, settings), name)
        module.runner.engines.prepare(tensors)
        return module

    if settings.precision != "auto":
        return make(Findings(), weights)
    named = dict(zip(segment.weights, weights, strict=True))
    known = recall(segment.module, named, settings)
    if known is not None:
        return make(known, weights)
    return Recording(segment.module, named, settings.calibration_calls, make, refuse_capture)


def refuse_capture() -> None:
    """Puts off the capture of a call as a CUDA graph: a replay would record nothing."""
    if isinstance(PRESENT.larger, Capture):
        raise NotNow(BEING_RECORDED)


def segment_module(blueprint: Blueprint, name: str) -> SegmentModule:
    """What answers a segment's calls, by engines of this blueprint."""
    segment, settings = blueprint.segment, blueprint.settings
    runner = SegmentRunner(
        name,
        segment.module,
        segment.weight_positions,
        functools.partial(make_engine, blueprint),
        settings,
        None if settings.runtime == "reference" else tensorrt_module.why_no_refit(),
        guard_of(blueprint, name) if settings.verify != "off" else None,
    )
    return SegmentModule(runner)


def guard_of(blueprint: Blueprint, name: str) -> Guard:
    """What compares a segment's engines with eager, and finds the first bad node by engines that nothing keeps."""
    segment, settings = blueprint.segment, blueprint.settings
    accuracy = accuracy_of(segment.module, settings.precision, blueprint.tf32, settings.verify_tolerance)
    trial = functools.partial(engine_on_trial, blueprint, f"a part of {name}")
    search = Bisection(segment, blueprint.precision, accuracy, trial, settings.wide_products)
    return Guard(name, segment.module, accuracy, settings, search)


def read_settings(keywords: Mapping[str, Any]) -> Settings:
    """Environment and options; `mode` is Inductor's and says nothing to us."""
    unknown = set(keywords) - {"options", "mode"}
    if unknown:
        raise SettingsError(f"the backend takes options={{...}} only, not {', '.join(sorted(unknown))}")
    if keywords.get("mode") is not None:
        warn_once(f"mode={keywords['mode']!r} is Inductor's and has no meaning for the backend tensorrt; it is ignored")
    return Settings.from_env().merge(keywords.get("options"))


def why_eager(inputs: Sequence[Any], settings: Settings) -> str | None:
    """Why this graph is left to eager before anything is tried, or None."""
    if settings.runtime == "eager":
        return "the setting runtime=eager"
    missing = tensorrt_module.why_missing() if settings.runtime == "reference" else tensorrt_module.why_not_runnable()
    if missing is None and settings.runtime != "reference" and not any(is_cuda(i) for i in inputs):
        missing = "no input of the graph is on a CUDA device"
    if missing is None:
        return why_not_here(settings)
    if settings.strict or settings.runtime == "tensorrt":
        raise TrtDynamoError(f"no engine can run here: {missing}")
    warn_once(
        f"the model runs in {settings.fallback}: {missing}. "
        "(runtime=reference evaluates engines' networks without a GPU, slowly.)"
    )
    return missing


def why_not_here(settings: Settings) -> str | None:
    """Why no engine is made for this caller, though engines can run."""
    if not in_data_parallel():
        return None
    if settings.strict:
        raise TrtDynamoError(DATA_PARALLEL)
    warn_once(DATA_PARALLEL)
    return "torch.nn.DataParallel"


def is_cuda(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def split_count(verdicts: Sequence[Any]) -> tuple[int, int]:
    converted = sum(verdict.ok for verdict in verdicts)
    return converted, len(verdicts) - converted
