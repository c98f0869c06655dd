"""Engines for machines with GPUs, built on one without. In: a model and example arguments on the CPU, settings, the
compute capability to build for. Out: entries in the cache, under the keys that such a machine looks up.

The model is traced as if it were on a GPU (`as_if_on_cuda`); from there on the way is that of `backend`, but that
engines are stored and not loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.fx import GraphModule, Interpreter

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.as_if_on_cuda import CUDA, Twins, moved, place_for, relocated
from trt_dynamo.backend import segment_runner
from trt_dynamo.cache import open_store
from trt_dynamo.errors import BuildError, SettingsError, in_a_line, typed_in_a_line
from trt_dynamo.graph_breaks import ANOTHER_GO
from trt_dynamo.known_ranges import use_known_ranges
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.lowering.lengths import keeps_lengths
from trt_dynamo.lowering.whole import keep_whole
from trt_dynamo.partition import main_device, partition
from trt_dynamo.runtime import SegmentModule
from trt_dynamo.settings import Settings
from trt_dynamo.training import needs_gradients
from trt_dynamo.unloaded import Unloaded, not_loading

log = logging.getLogger(__name__)

PORTABLE = "portable"

VALUES_ASKED = (
    "from some point on the model asks what its tensors hold, which only a run tells; the engines of the graphs before "
    "it are built, those behind it are built where it runs"
)


@dataclasses.dataclass
class Ahead:
    """What came of one model for one target: the `engines` that are in the cache now, and what kept others out."""

    engines: list[Unloaded] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """The engines' keys in the cache, each once."""
        return list(dict.fromkeys(engine.key for engine in self.engines))


def settings_for(target: str, settings: Settings) -> Settings:
    """The settings with which engines for a target are made: its compute capability, or `portable` for the engine of
    TensorRT for RTX that runs on all.

    Raises:
        SettingsError: no machine would use such an engine, or it cannot be made or kept here.
        TensorRTMissing: no TensorRT is installed.
    """
    if settings.cache in ("off", "readonly"):
        raise SettingsError(f"with the setting cache={settings.cache} no engine would be kept")
    refusal = open_store(settings).refusal()
    if refusal is not None:
        raise SettingsError(refusal)
    if not tensorrt_module.is_rtx():
        raise SettingsError(
            "engines for other machines need TensorRT for RTX (TRT_DYNAMO_FLAVOR=tensorrt_rtx): TensorRT builds for "
            "the GPU that it runs on"
        )
    targets: tuple[str, ...] = ()
    if target != PORTABLE:
        targets = settings.merge({"targets": target}).targets
        major, minor = map(int, targets[0].split("."))
        why_not = tensorrt_module.why_not_on((major, minor))
        if why_not is not None:
            raise SettingsError(f"no machine would use an engine for {target}: {why_not}")
    # The rest changes no engine: what runs them, what runs beside them, when they are built.
    return dataclasses.replace(
        settings, targets=targets, runtime="auto", fallback="eager", compile="sync", verify="off", strict=False
    )


def build_ahead(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settings: Settings,
    *,
    dynamic: bool | None = None,
    device: torch.device = CUDA,
) -> Ahead:
    """Makes the engines that `torch.compile(model, backend="tensorrt", dynamic=dynamic)(*args, **kwargs)` would look up
    without gradients, with all parameters, buffers and tensors among the arguments on `device`. `settings` are those of
    `settings_for`. Nothing of the model is computed.
    """
    place = place_for(device)
    found, twins = Ahead(), Twins(place)
    run = torch.compile(
        model,
        backend=functools.partial(backend, twins=twins, device=device, settings=settings, found=found),
        dynamic=dynamic,
    )
    torch._dynamo.reset()
    try:
        with torch.no_grad(), moved(model, twins), not_loading() as made:
            found.engines = made
            given, named = twins.arguments(args, kwargs)
            run(*given, **named)
    except (DataDependentOutputException, DynamicOutputShapeException):
        found.problems.append(VALUES_ASKED)
    except Exception as error:
        log.debug("the model could not be followed", exc_info=True)
        found.problems.append(told(error))
    finally:
        torch._dynamo.reset()
    if not found.engines and not found.problems:
        found.problems.append("no part of it goes to TensorRT; `python -m trt_dynamo explain` says why")
    return found


@keeps_lengths
def backend(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    twins: Twins,
    device: torch.device,
    settings: Settings,
    found: Ahead,
) -> Callable[..., Any]:
    """Stores the engines of one of Dynamo's graphs. What comes back follows the graph without computing anything."""

    def follow(*values: Any) -> Any:
        with twins.mode:
            # What generated code calls by name is torch's own function.
            return Interpreter(keep_whole(module)).run(*values)

    try:
        if needs_gradients(inputs):
            found.problems.append("a backward pass may follow one of its graphs, which stays in eager")
            return follow
        use_known_ranges(module, inputs, settings)

        def store(lowered: Lowered) -> Callable[..., Any]:
            with relocated(lowered.module, twins.device, device):
                store_engines(lowered, settings, found)
            return follow  # which nobody calls

        lower(module, [twins.real(value) for value in inputs], store, settings, traced=inputs)
    except ANOTHER_GO:
        raise
    except Exception as error:
        log.debug("a graph could not be lowered", exc_info=True)
        found.problems.append(f"a graph could not be compiled: {told(error)}")
    return follow


def store_engines(lowered: Lowered, settings: Settings, found: Ahead) -> None:
    """Makes the engine of each segment of a lowered graph, as `backend.compile_lowered` does."""
    device = main_device(lowered.module)
    with unset_fake_temporarily(), torch.no_grad():
        parts = partition(lowered.module, lowered.names, settings)
        for segment in parts.segments:
            weights = lowered.weights_of(segment.weights)
            try:
                runner = segment_runner(segment, weights, device, settings, segment.name)
                problem = why_no_engine(runner)
            except Exception as error:  # noqa: BLE001  the other segments are to be built
                problem = told(error)
            if problem:
                found.problems.append(f"{segment.name}: {problem}")


def why_no_engine(runner: torch.nn.Module) -> str | None:
    if isinstance(runner, SegmentModule):
        return runner.runner.engines.broken
    return (
        "precision=auto knows nothing of the values in it: calibrate the model (trt_dynamo.calibrate) with the same "
        "cache first, or use fp16 or bf16"
    )


def told(error: BaseException) -> str:
    """An error in a line."""
    inner = getattr(error, "inner_exception", None) or error
    return in_a_line(inner) if isinstance(inner, BuildError) else typed_in_a_line(inner)
