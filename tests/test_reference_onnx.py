"""The reference evaluator against every ONNX backend test that NVIDIA's parser takes; the cases run in `benchmarks`."""

from __future__ import annotations

import os

from benchmarks.onnx_suite import README, Result, judged, readme_lines, run_all, summary
from tests.reference_deviations import DEVIATIONS

# What the suite of onnx 1.23.2 gives with TensorRT-RTX 1.7.1. Fewer means that cases got lost on the way.
CASES = 3452
PARSED = 1957


def named(found: list[Result]) -> str:
    return "\n".join(f"{result.id}: {result.detail}" for result in found)


def test_parsed_cases_pass_or_stand_in_the_list_of_deviations() -> None:
    """One test for all, because the suite runs once, in processes of its own."""
    results = run_all(workers=min(2, os.cpu_count() or 1))
    found = judged(results)
    print(summary(results))  # noqa: T201  shown by `pytest -rP`, and if the test fails
    for outcome in ("wrong", "error", "unsupported", "listed but passes"):
        assert outcome not in found, f"{outcome}:\n{named(found[outcome])}"
    assert {result.id for result in found["deviates"]} == DEVIATIONS.keys()
    assert len({result.id for result in results}) == len(results) == CASES
    # A parser that dies takes its case along; it does so at times, on operators whose plugins are absent.
    refused = len(found["refused"]) + len(found.get("crashed", []))
    assert CASES - refused == PARSED
    assert readme_lines(results) in README.read_text(), "run python -m benchmarks.onnx_suite --readme"
