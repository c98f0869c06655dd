"""What a selftest found, for people and as one JSON document: the machine, who answered, each case.

Comes in: results. Goes out: plain data, rows of a table, sentences.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from trt_dynamo.cli.info import gather
from trt_dynamo.cli.output import plural
from trt_dynamo.selftest.supervisor import Result

FORMAT = 1
GOOD = ("passed", "skipped")
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
COLUMNS = ("case", "status", "seconds", "difference", "of tolerance", "eager ms", "engine ms")


def document(results: Sequence[Result], runtime: str, limit: float) -> dict[str, Any]:
    """All of it, as plain data. Nothing in it names the user or the machine's folders, but for texts of errors."""
    facts = gather()
    kept = ("trt_dynamo", "python", "platform", "torch", "tensorrt", "driver", "gpus", "why_not_runnable")
    return {
        "selftest": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {name: facts[name] for name in kept},
        "environment": {n: os.environ[n] for n in ("TRT_DYNAMO_FLAVOR", "CUDA_VISIBLE_DEVICES") if n in os.environ},
        "runtime": runtime,
        "answered_by": answered_by(facts, runtime),
        "limit_seconds": limit,
        "counts": dict(Counter(result["status"] for result in results)),
        "cases": [{name: finite(value) for name, value in result.items()} for result in results],
    }


def finite(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def answered_by(facts: Mapping[str, Any], runtime: str) -> str:
    """Who gave the answers that are compared with eager's."""
    tensorrt = facts["tensorrt"]
    builder = f"{NAMES.get(tensorrt['flavor'], 'TensorRT')} {tensorrt['version']}"
    where = facts["gpus"][0]["name"] if facts["gpus"] else "the CPU"
    if runtime == "reference":
        return (
            f"the reference evaluator of trt_dynamo, in PyTorch on {where}. {builder} built the plans and ran none: "
            "this says nothing about TensorRT's kernels"
        )
    return f"{builder} on {where}"


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's lines."""
    return [
        (
            result["name"],
            result["status"],
            f"{result['seconds']:.1f}",
            number(result, "difference", ".1e"),
            number(result, "used", ".3f"),
            number(result, "eager_ms", ".3f"),
            number(result, "engine_ms", ".3f"),
        )
        for result in results
    ]


def number(result: Result, name: str, form: str) -> str:
    return "" if not result.get(name) else format(result[name], form)


def told(results: Sequence[Result]) -> list[str]:
    """A line on what was skipped for each reason, and a paragraph on each case that is not as it must be."""
    skipped = Counter(result["error"] for result in results if result["status"] == "skipped")
    wrong = [f"{r['name']}: {r['status']}\n  {indented(r['error'])}" for r in results if r["status"] not in GOOD]
    return [f"skipped {plural(count, 'case')}: {reason}" for reason, count in skipped.items()] + wrong


def indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def summary(results: Sequence[Result]) -> str:
    counts = Counter(result["status"] for result in results)
    rest = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "passed")
    return f"{counts['passed']} of {plural(len(results), 'case')} passed" + (f"; {rest}" if rest else "")
