"""How long each layer of a model's engines takes: `explain --profile`.

Comes in: a model and arguments. Goes out: for each segment its layers with their milliseconds a call, as TensorRT's own
profiler measured them on this machine's GPU, or the reference evaluator in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import report
from trt_dynamo.runtime.layer_times import layer_times
from trt_dynamo.settings import Settings

WARM_UP = 3
NO_SPEED = "times of the reference evaluator, which say nothing about the speed of an engine"


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """`segments[segment][layer]`: milliseconds a call, the layers in the order in which they ran. `runtime` says what
    ran them; `calls` how often; `eager` counts the calls of segments that eager answered, by reason.
    """

    runtime: str
    calls: int
    segments: Mapping[str, Mapping[str, float]]
    eager: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return dataclasses.asdict(self)


def profile_layers(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    calls: int = 10,
) -> LayerProfile:
    """Compiles the model, calls it without gradients, and gives the mean over `calls` calls after a warm-up.

    Raises:
        TrtDynamoError: no engine can run here, or none answered; the text says why.
        SettingsError: an option is unknown or does not parse.
    """
    settings = Settings.from_env().merge(options)
    runtime = "reference" if settings.runtime == "reference" else "tensorrt"
    missing = tensorrt_module.why_missing() if runtime == "reference" else tensorrt_module.why_not_runnable()
    if missing is not None:
        hint = "" if runtime == "reference" else f" (--set runtime=reference gives {NO_SPEED})"
        raise TrtDynamoError(f"no engine can run here, so no layer can be timed: {missing}{hint}")
    compiled = torch.compile(model, backend="tensorrt", dynamic=dynamic, options=waiting(options, runtime))
    before = report()
    with torch.no_grad(), layer_times() as times:
        for _ in range(WARM_UP):
            compiled(*args, **kwargs)
        times.forget()
        warm = report()
        for _ in range(calls):
            compiled(*args, **kwargs)
    if not times.layers:
        reasons = {**since(before, "eager_graphs"), **since(before, "eager_reasons")}
        raise TrtDynamoError(f"no engine answered: {'; '.join(reasons) or 'no part of the model is worth an engine'}")
    segments = {
        segment: {layer: sum(spent) / calls for layer, spent in layers.items()}
        for segment, layers in times.layers.items()
    }
    return LayerProfile(runtime, calls, segments, since(warm, "eager_reasons"))


def since(before: Mapping[str, Any], counter: str) -> dict[str, int]:
    """What was counted, by reason, since a report."""
    counts = report()[counter]
    return {
        why: count - before[counter].get(why, 0) for why, count in counts.items() if count > before[counter].get(why, 0)
    }


def waiting(options: Mapping[str, Any] | None, runtime: str) -> dict[str, Any]:
    """The options, so that every call waits for its engine, and no CUDA graph hides the layers."""
    return {**(options or {}), "runtime": runtime, "compile": "sync", "rebuild": "sync", "cuda_graphs": "off"}
