"""What the tools share that run a model on its engines and look on: `debug` and `explain --profile`.

Comes in: settings, and counts from before the run. Goes out: which runtime there is, options under which every call
waits for its engine, and which calls eager answered instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings


def runtime_here(settings: Settings, consequence: str, instead: str) -> str:
    """What runs engines here: "reference" where the settings ask for it, or "tensorrt".

    Raises:
        TrtDynamoError: nothing does, with this `consequence`; `instead` says what runtime=reference would do.
    """
    if settings.runtime == "reference":
        runtime, missing, hint = "reference", tensorrt_module.why_missing(), ""
    else:
        runtime, missing = "tensorrt", tensorrt_module.why_not_runnable()
        hint = f" (--set runtime=reference {instead})"
    if missing is not None:
        raise TrtDynamoError(f"no engine can run here, so {consequence}: {missing}{hint}")
    return runtime


def waiting(options: Mapping[str, Any] | None, runtime: str) -> dict[str, Any]:
    """The options, so that every call waits for its engine, and no CUDA graph hides what runs."""
    return {**(options or {}), "runtime": runtime, "compile": "sync", "rebuild": "sync", "cuda_graphs": "off"}


def since(before: Mapping[str, Any], counter: str) -> dict[str, int]:
    """What was counted, by reason, since a report."""
    counts = report()[counter]
    return {
        why: count - before[counter].get(why, 0) for why, count in counts.items() if count > before[counter].get(why, 0)
    }


def in_eager(before: Mapping[str, Any]) -> dict[str, int]:
    """Graphs and calls that eager answered since a report, by reason."""
    return {**since(before, "eager_graphs"), **since(before, "eager_reasons")}


def none_answered(before: Mapping[str, Any]) -> TrtDynamoError:
    """The error where no engine ran since a report."""
    reasons = "; ".join(in_eager(before))
    return TrtDynamoError(f"no engine answered: {reasons or 'no part of the model is worth an engine'}")
