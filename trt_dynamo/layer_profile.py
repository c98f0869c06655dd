"""How long each layer of a model's engines takes: `explain --profile`.

Comes in: a model and arguments. Goes out: for each segment its layers with their milliseconds a call, as TensorRT's own
profiler measured them on this machine's GPU, or the reference evaluator in its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo.reports import report
from trt_dynamo.runtime.layer_times import layer_times
from trt_dynamo.settings import Settings
from trt_dynamo.watched_runs import none_answered, runtime_here, since, waiting

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
    runtime = runtime_here(settings, "no layer can be timed", f"gives {NO_SPEED}")
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
        raise none_answered(before)
    segments = {
        segment: {layer: sum(spent) / calls for layer, spent in layers.items()}
        for segment, layers in times.layers.items()
    }
    return LayerProfile(runtime, calls, segments, since(warm, "eager_reasons"))
