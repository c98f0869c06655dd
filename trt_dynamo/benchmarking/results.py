"""What was found: a `Cell` for each column of a model, its `Result`, and both as rows for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trt_dynamo.benchmarking.timing import Spread


@dataclasses.dataclass(frozen=True)
class Cell:
    """One column of one model. `missing` says why it could not be tried here, `failed` what went wrong; both are empty
    where it was timed.

    `alone` are the seconds of a call that is waited for, `in_a_row` those of one among many; `first_call` those of the
    first, with all that it compiles. `memory` is what it takes beyond the model, in bytes. `error` is how far its
    results are from those of the model as it was given: the norm of the difference over the norm. `note` says what a
    reader of the time must know.
    """

    column: str
    title: str
    missing: str = ""
    failed: str = ""
    alone: Spread | None = None
    in_a_row: Spread | None = None
    first_call: float | None = None
    memory: int | None = None
    error: float | None = None
    note: str = ""

    @property
    def why_empty(self) -> str:
        return f"missing, {self.missing}" if self.missing else f"failed: {self.failed}" if self.failed else ""


@dataclasses.dataclass(frozen=True)
class Result:
    """A model in all columns. `dtype` is its own, `items` what a call takes (the batch), `options` are TensorRT's
    settings, `versions` those of what it ran on.
    """

    model: str
    device: str
    dtype: str
    items: int
    cells: tuple[Cell, ...]
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def heading(self) -> str:
        """What was timed, and where."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.model} on {self.device}, {self.dtype}, batch {self.items}{options}"

    @property
    def baseline(self) -> Cell | None:
        """What ratios are of: eager, or else the first column that was timed."""
        timed = [cell for cell in self.cells if cell.alone is not None]
        return next((cell for cell in timed if cell.column == "eager"), timed[0] if timed else None)

    def ratio(self, cell: Cell) -> float | None:
        """How many times as fast as the baseline a call is, by the medians; None where it was not timed."""
        if cell.alone is None or self.baseline is None or self.baseline.alone is None:
            return None
        return self.baseline.alone.median / cell.alone.median

    def throughput(self, cell: Cell) -> float | None:
        """Items a second, of calls in a row."""
        return self.items / cell.in_a_row.median if cell.in_a_row is not None else None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON: seconds, bytes, ratios."""
        baseline = self.baseline
        cells = []
        for cell in self.cells:
            found = {"column": cell.column, "ratio": self.ratio(cell), "items_per_second": self.throughput(cell)}
            cells.append({**found, **dataclasses.asdict(cell)})
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "items": self.items,
            "options": self.options,
            "baseline": baseline.column if baseline else None,
            "versions": self.versions,
            "columns": cells,
        }


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """The table of one model, ratios first: its head, and a row for each column."""
    name = result.baseline.title if result.baseline else "baseline"
    head = [f"x {name}", "", "ms a call (quartiles)", "items/s", "memory", "error", "first call"]
    return head, [row(result, cell) for cell in result.cells]


def row(result: Result, cell: Cell) -> list[str]:
    ratio, throughput = result.ratio(cell), result.throughput(cell)
    if cell.alone is None or ratio is None or throughput is None:
        return ["-", cell.title, cell.why_empty, "", "", "", ""]
    return [
        f"{ratio:.2f}",
        cell.title,
        f"{1e3 * cell.alone.median:.3f} ({1e3 * cell.alone.low:.3f} to {1e3 * cell.alone.high:.3f})",
        f"{throughput:.4g}",
        "" if cell.memory is None else f"{cell.memory / 2**20:.1f} MiB",
        "" if cell.error is None else f"{cell.error:.1e}",
        "" if cell.first_call is None else f"{cell.first_call:.1f} s",
    ]


def summary(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The table of several models: of each column the ratio and the milliseconds of a call."""
    titles = {cell.column: cell.title for result in results for cell in result.cells}
    body = []
    for result in results:
        cells = {cell.column: cell for cell in result.cells}
        body.append([result.model, *(short(result, cells.get(column)) for column in titles)])
    return ["model", *titles.values()], body


def short(result: Result, cell: Cell | None) -> str:
    if cell is None or cell.alone is None:
        return "" if cell is None else "missing" if cell.missing else "failed"
    return f"{result.ratio(cell):.2f}x  {1e3 * cell.alone.median:.2f} ms"


def bars(result: Result, width: int = 40) -> list[tuple[str, int, str]]:
    """A bar for each column: its title, its length (the fastest has `width`), what stands behind it."""
    ratios = [result.ratio(cell) for cell in result.cells]
    longest = max((ratio for ratio in ratios if ratio is not None), default=1.0)
    return [
        (cell.title, 0, cell.why_empty)
        if ratio is None
        else (cell.title, max(1, round(width * ratio / longest)), f"{ratio:.2f}x")
        for cell, ratio in zip(result.cells, ratios, strict=True)
    ]


def notes(results: Sequence[Result]) -> list[str]:
    """What readers of the table must know, each thing once: reasons for gaps, and notes on what was timed."""
    found: dict[str, list[str]] = {}
    for result in results:
        for cell in result.cells:
            told = cell.why_empty or cell.note
            if told:
                found.setdefault(f"{cell.column}: {told}", []).append(result.model)
    everywhere = len(results)
    return [text if len(models) == everywhere else f"{text} ({', '.join(models)})" for text, models in found.items()]
