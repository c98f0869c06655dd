"""What `bench` says: who is timed when, and what the numbers become."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.benchmarking import (
    COLUMNS,
    Cell,
    Result,
    columns,
    memory,
    timing,
)
from trt_dynamo.benchmarking.chart import save
from trt_dynamo.benchmarking.results import bars, notes, rows, summary
from trt_dynamo.benchmarking.timing import Samples, Spread
from trt_dynamo.errors import SettingsError, TrtDynamoError
from trt_dynamo.settings import Settings

CPU = torch.device("cpu")


# -- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_column_stands_at_each_place_equally_often(count: int) -> None:
    names = [f"c{i}" for i in range(count)]
    orders = [timing.order(names, number) for number in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert set(collections.Counter(order[place] for order in orders).values()) == {2}
    if count > 2:  # not always the same neighbour before it
        before = collections.Counter((a, b) for order in orders for a, b in itertools.pairwise(order))
        assert before["c0", "c1"] and before["c1", "c0"]


def test_the_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


class Clock:
    """Time that passes only when a function says so."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.calls.append(name)

        return call


def no_failure(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


def test_functions_are_timed_in_turns() -> None:
    clock = Clock()
    functions = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 2.0)}
    found = timing.in_turns(functions, {"a": 2, "b": 1}, lambda: None, no_failure, rounds=2, clock=clock)
    assert found == {"a": Samples([1.0] * 4, [1.0] * 2), "b": Samples([2.0] * 2, [2.0] * 2)}
    # one call that is not timed, those that are timed alone, those in a row
    assert "".join(clock.calls) == "aaaaa" + "bbb" + "bbb" + "aaaaa"


def test_the_wait_is_part_of_the_time() -> None:
    clock = Clock()
    wait = clock.takes("wait", 5.0)
    found = timing.in_turns({"a": clock.takes("a", 1.0)}, {"a": 5}, wait, no_failure, rounds=1, clock=clock)
    assert found["a"].alone == [6.0] * 5 and found["a"].in_a_row == [2.0]


def test_one_that_fails_is_called_no_more_and_the_others_go_on() -> None:
    clock, told, calls = Clock(), list[tuple[str, str]](), list[int]()

    def breaks() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("too large")

    functions = {"a": clock.takes("a", 1.0), "bad": breaks}
    found = timing.in_turns(
        functions, {"a": 1, "bad": 1}, lambda: None, lambda name, error: told.append((name, str(error))), rounds=4
    )
    assert told == [("bad", "too large")] and [*found] == ["a"] and len(found["a"].alone) == 4 and len(calls) == 5


@pytest.mark.parametrize(
    ("estimate", "calls", "seconds", "expected"),
    [(0.01, None, 4.0, 20), (10.0, None, 4.0, 1), (0.01, 100, 4.0, 10), (0.01, 3, 4.0, 1), (0.0, None, 1e-9, 1)],
)
def test_how_often_a_round_calls(estimate: float, calls: int | None, seconds: float, expected: int) -> None:
    assert timing.calls_a_round(estimate, calls=calls, seconds=seconds) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, 5), (0.6, 2), (3.0, 1)])
def test_warming_ends_early_where_calls_are_long(seconds: float, expected: int) -> None:
    clock = Clock()
    assert timing.warm(clock.takes("a", seconds), lambda: None, clock=clock) == pytest.approx(seconds)
    assert len(clock.calls) == expected


def test_memory_of_a_call_on_the_host() -> None:
    for _ in range(2):  # the memory of the first is there to be used again
        for elements in (2**20, 32 * 2**20):
            found = memory.transient(CPU, lambda n=elements: torch.ones(n))  # type: ignore[misc]
            assert found is not None and 0.9 * 4 * elements < found < 4 * elements + 50 * 2**20
    assert memory.kept(CPU) is None


def test_where_linux_does_not_count_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    assert memory.transient(CPU, lambda: None) is None


# -- columns ----------------------------------------------------------------------------------------------------------


def test_columns_are_chosen_by_name() -> None:
    assert [c.name for c in columns.chosen("")] == ["eager", "inductor", "reduce-overhead", "tensorrt"]
    assert [c.name for c in columns.chosen("tensorrt, eager,tensorrt")] == ["tensorrt", "eager"]
    with pytest.raises(SettingsError, match=r"'inducter' is no column: .*did you mean 'inductor'"):
        columns.chosen("eager,inducter")


@pytest.mark.parametrize(
    ("name", "device", "runtime", "package", "gpu", "runnable", "expected"),
    [
        ("eager", "cpu", "auto", False, False, False, None),
        ("inductor", "cpu", "auto", False, False, False, None),
        ("reduce-overhead", "cpu", "auto", True, False, False, "its CUDA graphs need a GPU"),
        ("reduce-overhead", "cuda", "auto", True, True, False, None),
        ("tensorrt", "cuda", "reference", True, True, True, "the setting runtime=reference runs no TensorRT"),
        ("tensorrt", "cuda", "eager", True, True, True, "the setting runtime=eager runs no TensorRT"),
        ("tensorrt", "cuda", "auto", False, True, True, "no TensorRT is installed"),
        ("tensorrt", "cpu", "auto", True, False, False, "no GPU"),
        ("tensorrt", "cuda", "auto", True, True, False, "an old GPU"),
        ("tensorrt", "cpu", "auto", True, True, True, "the model is on cpu"),
        ("tensorrt", "cuda", "auto", True, True, True, None),
    ],
)
def test_why_a_column_is_missing(
    name: str,
    device: str,
    runtime: Any,
    package: bool,
    gpu: bool,
    runnable: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_module, "why_missing", lambda: None if package else "none")
    monkeypatch.setattr(tensorrt_module, "why_not_runnable", lambda: None if runnable else "an old GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert columns.why_missing(COLUMNS[name], torch.device(device), Settings(runtime=runtime)) == expected


# -- results ----------------------------------------------------------------------------------------------------------


def cell(name: str, seconds: float, **changes: Any) -> Cell:
    spread = Spread(seconds, 0.9 * seconds, 1.2 * seconds, 10)
    row = dataclasses.replace(spread, median=seconds / 2)
    found = Cell(name, COLUMNS[name].title, alone=spread, in_a_row=row, first_call=2.0, memory=3 * 2**20, error=1e-5)
    return dataclasses.replace(found, **changes)


RESULT = Result(
    "net",
    "a GPU",
    "float16",
    8,
    (
        cell("eager", 0.004),
        cell("inductor", 0.002),
        Cell("reduce-overhead", "Inductor, reduce-overhead", failed="OutOfMemoryError: too large"),
        cell("tensorrt", 0.001, note="partly in eager: too small"),
    ),
    options={"precision": "fp16"},
)
CELLS = {each.column: each for each in RESULT.cells}
OTHER = dataclasses.replace(
    RESULT, model="other", cells=(CELLS["inductor"], Cell("tensorrt", "TensorRT", missing="no GPU"))
)


def test_ratios_come_first_and_gaps_say_why() -> None:
    head, body = rows(RESULT)
    assert head[:3] == ["x eager", "", "ms a call (quartiles)"]
    assert body[0] == ["1.00", "eager", "4.000 (3.600 to 4.800)", "4000", "3.0 MiB", "1.0e-05", "2.0 s"]
    assert body[2] == ["-", "Inductor, reduce-overhead", "failed: OutOfMemoryError: too large", "", "", "", ""]
    assert body[3][0] == "4.00"
    assert RESULT.heading == "net on a GPU, float16, batch 8, precision=fp16"


def test_without_eager_the_first_that_was_timed_is_the_baseline() -> None:
    assert rows(OTHER)[0][0] == "x Inductor" and OTHER.ratio(OTHER.cells[0]) == 1
    empty = dataclasses.replace(OTHER, cells=OTHER.cells[1:])
    assert empty.baseline is None and rows(empty)[1][0][:3] == ["-", "TensorRT", "missing, no GPU"]


def test_the_table_of_several_models() -> None:
    head, body = summary([RESULT, OTHER])
    assert head == ["model", "eager", "Inductor", "Inductor, reduce-overhead", "TensorRT"]
    assert body == [
        ["net", "1.00x  4.00 ms", "2.00x  2.00 ms", "failed", "4.00x  1.00 ms"],
        ["other", "", "1.00x  2.00 ms", "", "missing"],
    ]
    assert notes([RESULT, OTHER]) == [
        "reduce-overhead: failed: OutOfMemoryError: too large (net)",
        "tensorrt: partly in eager: too small (net)",
        "tensorrt: missing, no GPU (other)",
    ]


def test_bars_are_as_long_as_columns_are_fast() -> None:
    assert bars(RESULT, 40) == [
        ("eager", 10, "1.00x"),
        ("Inductor", 20, "2.00x"),
        ("Inductor, reduce-overhead", 0, "failed: OutOfMemoryError: too large"),
        ("TensorRT", 40, "4.00x"),
    ]


def test_results_are_plain_data() -> None:
    found = json.loads(json.dumps(RESULT.as_dict()))
    assert found["baseline"] == "eager" and found["items"] == 8 and found["options"] == {"precision": "fp16"}
    assert [each["ratio"] for each in found["columns"]] == [1.0, 2.0, None, 4.0]
    assert found["columns"][3]["items_per_second"] == 16_000
    assert found["columns"][3]["alone"] == dataclasses.asdict(Spread(0.001, 0.9 * 0.001, 1.2 * 0.001, 10))


@pytest.mark.parametrize("results", [[RESULT], [RESULT, OTHER] * 3, [dataclasses.replace(OTHER, cells=())]], ids=len)
def test_the_chart_is_a_png(results: list[Result], tmp_path: Path) -> None:
    save(results, tmp_path / "chart.png")
    data = (tmp_path / "chart.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5_000
    with pytest.raises(TrtDynamoError, match="cannot be written"):
        save(results, tmp_path / "none" / "chart.png")
