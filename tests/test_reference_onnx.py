"""The reference evaluator against every ONNX backend test that NVIDIA's parser takes; the cases run in `benchmarks`."""

from __future__ import annotations

import os

import pytest

from benchmarks.onnx_suite import Result, judged, run_all, summary
from tests.reference_deviations import DEVIATIONS

# What the suite of onnx 1.23.2 gives with TensorRT-RTX 1.7.1. Fewer means that cases got lost on the way.
CASES = 3452
PARSED = 1957


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return run_all(workers=min(2, os.cpu_count() or 1))


@pytest.fixture(scope="module")
def by_outcome(results: list[Result]) -> dict[str, list[Result]]:
    print(summary(results))  # noqa: T201  shown by `pytest -rP`, and when a test fails
    return judged(results)


def named(found: list[Result]) -> str:
    return "\n".join(f"{result.id}: {result.detail}" for result in found)


def test_no_case_gives_a_wrong_value(by_outcome: dict[str, list[Result]]) -> None:
    assert not by_outcome.get("wrong"), named(by_outcome["wrong"])
    assert not by_outcome.get("error"), named(by_outcome["error"])


def test_every_layer_that_the_parser_makes_can_be_evaluated(by_outcome: dict[str, list[Result]]) -> None:
    assert not by_outcome.get("unsupported"), named(by_outcome["unsupported"])


def test_the_list_of_the_parsers_deviations_is_exact(by_outcome: dict[str, list[Result]]) -> None:
    assert not by_outcome.get("listed but passes"), named(by_outcome["listed but passes"])
    assert {result.id for result in by_outcome["deviates"]} == DEVIATIONS.keys()


def test_no_case_is_lost(results: list[Result], by_outcome: dict[str, list[Result]]) -> None:
    assert len({result.id for result in results}) == len(results) == CASES
    # A parser that dies takes its case along; it does so at times, on operators whose plugins are absent.
    refused = len(by_outcome["refused"]) + len(by_outcome.get("crashed", []))
    assert CASES - refused == PARSED
