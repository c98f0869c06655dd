"""The zoo of models: what is counted, that a run goes on where it was, and the page. The models need packages of theirs
and minutes; `python -m benchmarks.zoo` runs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo.every import CASES
from benchmarks.zoo.measure import measure
from benchmarks.zoo.page import PAGE, page
from benchmarks.zoo.results import Figures, as_line, largest_error, read


class Output:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


X = torch.tensor([1.0, -2.0, torch.nan])


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (X, X.clone(), 0.0),
        ((X + torch.tensor([0.5, 0, 0]),), [X], 0.25),
        (Output(b=X * 2, a=X), Output(a=X, b=X), 1.0),
        (X, (X, X), torch.inf),
        (X.double(), X, torch.inf),
        (X[:2], X, torch.inf),
        (X.nan_to_num(), X, torch.inf),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), 0.2),
        (torch.empty(0), torch.empty(0), 0.0),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([-torch.inf, 1.0]), torch.inf),
    ],
)
def test_the_largest_error(actual: Any, expected: Any, error: float) -> None:
    assert largest_error(actual, expected) == pytest.approx(error)


VIEW = ("aten.t.default", "a view that shares memory with another result or input", 1)


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, True),
        ({"eager": [VIEW]}, True),
        ({"eager": [VIEW, ("aten.sort.default", "too long", 1)]}, False),
        ({"engines": 2}, False),
        ({"graphs": 2}, False),
        ({"recompiled": 1}, False),
        ({"eager_calls": 1}, False),
        ({"breaks": ["item"]}, False),
        ({"failure": "TimeoutExpired"}, False),
    ],
)
def test_what_counts_as_one_engine(changes: dict[str, Any], whole: bool) -> None:
    assert Figures("m", "f", "static", **{"engines": 1, "graphs": 1, **changes}).whole is whole


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, measured = tmp_path / "r.jsonl", list[tuple[str, str]]()

    def stand_in(name: str, mode: str, *_: Any) -> Figures:
        measured.append((name, mode))
        return Figures(name, CASES[name].family, mode, failure="stopped" * (len(measured) == 1))

    monkeypatch.setattr(zoo, "measured", stand_in)
    zoo.run(["torch/lstm"], ["static"], False, 1, 1, results)
    zoo.run(["torch/lstm"], ["static", "dynamic"], False, 1, 1, results)
    assert measured == [("torch/lstm", "static"), ("torch/lstm", "dynamic")]
    zoo.run(["torch/lstm"], ["static"], True, 1, 1, results)
    assert len(results.read_text().splitlines()) == 3
    assert not read(results)["torch/lstm", "static"].failure
    zoo.tidy(results)
    assert len(results.read_text().splitlines()) == 2


def test_what_takes_too_long_or_fails_is_told() -> None:
    assert "not done after 0 s" in zoo.measured("torch/lstm", "static", 0.01, 4).failure
    assert "invalid choice" in zoo.measured("torch/lstm", "sideways", 60, 4).failure


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_model_of_torch_alone_is_one_engine(mode: str) -> None:
    torch._dynamo.config.allow_rnn = True
    try:
        figures = measure(CASES["torch/gru-cell-loop"], mode == "dynamic")
    finally:
        torch._dynamo.config.allow_rnn = False
    assert figures.whole and figures.error is not None and figures.error < 1e-5
    assert figures.layers > 50 and figures.build_s > 0 and figures.peak_mb > 100
    assert (figures.other_error is not None) == (mode == "dynamic")
    assert Figures(**json.loads(as_line(figures))).whole


def test_at_least_forty_models_of_many_kinds() -> None:
    families = {case.family for case in CASES.values()}
    assert len(CASES) >= 40
    assert {
        "torchvision",
        "segmentation",
        "detection",
        "timm",
        "transformers",
        "diffusers",
        "audio",
        "recurrent",
    } <= families


def test_the_page_is_made_of_the_results() -> None:
    figures = list(read().values())
    assert PAGE.read_text() == page(figures), "run python -m benchmarks.zoo --page"
    assert len({f.name for f in figures}) >= 40
    assert all(f.name in CASES for f in figures)


def test_the_names_are_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.zoo", "--list"],
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
        check=True,
    )
    assert done.stdout.split() == list(CASES)
