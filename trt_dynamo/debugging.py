"""Compares each engine of a model with eager, once: `python -m trt_dynamo debug`.

Comes in: a model and arguments. Goes out: a `Comparison`, which names the first bad node of each engine that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo.bisection import Finding
from trt_dynamo.reports import report
from trt_dynamo.runtime.guard import Judgement, judgements
from trt_dynamo.settings import Settings
from trt_dynamo.watched_runs import in_eager, none_answered, runtime_here, waiting

STAND_IN = "shows what the networks mean, not what TensorRT's kernels make of them"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`segments` are the engines that answered, each beside eager; `eager` counts, by reason, the calls of segments
    that no engine answered; `runtime` says what ran the engines.
    """

    runtime: str
    segments: tuple[Judgement, ...]
    eager: Mapping[str, int]

    @property
    def wrong(self) -> tuple[Judgement, ...]:
        return tuple(each for each in self.segments if not each.agreement.agrees)

    def __str__(self) -> str:
        lines = []
        for each in self.segments:
            verdict = "agrees with eager" if each.agreement.agrees else "DIFFERS from eager"
            lines.append(f"{each.segment} {verdict}: {each}")
            if not each.agreement.agrees:
                lines += [f"  {line}" for line in told(each.cause)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"runtime": self.runtime, "segments": [as_dict(each) for each in self.segments], "eager": self.eager}


def told(cause: object) -> list[str]:
    """Where a fault begins, a line for each thing there is to know."""
    if not isinstance(cause, Finding) or cause.why:
        return [str(cause)]
    return [
        f"first bad node: {cause.node} ({cause.target})",
        f"module:         {cause.module or '-'}",
        f"source:         {cause.source or '-'}",
        f"before it:      relative error {cause.before:.2g}",
        f"after it:       {cause.after}",
    ]


def as_dict(each: Judgement) -> dict[str, Any]:
    found = each.agreement.difference
    return {
        "segment": each.segment,
        "agrees": each.agreement.agrees,
        "precision": each.accuracy.name,
        "tolerance": each.accuracy.tolerance,
        "result": each.agreement.result,
        "relative_error": found.error if math.isfinite(found.error) else None,
        "element_error": found.worst if math.isfinite(found.worst) else None,
        "cosine": found.cosine,
        "not_finite": found.strange,
        "cause": dataclasses.asdict(each.cause) if isinstance(each.cause, Finding) else None,
    }


def compare_with_eager(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Comparison:
    """Compiles the model and calls it without gradients: once, or as often as `precision=auto` needs for its record.

    Raises:
        TrtDynamoError: no engine can run here, or none answered; the text says why.
        SettingsError: an option is unknown or does not parse.
    """
    settings = Settings.from_env().merge(options)
    runtime = runtime_here(settings, "none can be compared", STAND_IN)
    watched = {**waiting(options, runtime), "strict": False, "verify": "first"}
    compiled = torch.compile(model, backend="tensorrt", dynamic=dynamic, options=watched)
    before = report()
    with torch.no_grad(), judgements() as found:
        for _ in range(1 + (settings.calibration_calls if settings.precision == "auto" else 0)):
            compiled(*args, **kwargs)
    if not found:
        raise none_answered(before)
    return Comparison(runtime, tuple(found), in_eager(before))
