"""The bar chart as a PNG. In: results. Out: a file. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trt_dynamo.benchmarking.results import Cell, Result
from trt_dynamo.errors import TrtDynamoError

COLORS = {
    "eager": "#8a8f98",
    "inductor": "#e0803a",
    "reduce-overhead": "#eeb084",
    "max-autotune": "#b3541e",
    "tensorrt": "#5a9e1b",
}
HEIGHT = 0.34  # inches, of a bar
SHOWN = 90  # letters of a reason


def check_matplotlib() -> None:
    """Looks whether a chart can be drawn, before anything is timed for it.

    Raises:
        TrtDynamoError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise TrtDynamoError(f"the chart needs matplotlib: pip install 'trt-dynamo[bench]' ({error})") from None


def save(results: Sequence[Result], path: Path) -> None:
    """Writes the chart: a group of bars for each model, as long as the column is fast.

    Raises:
        TrtDynamoError: matplotlib is not installed, or the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = sum(len(result.cells) for result in results)
    figure = Figure(figsize=(9, 1.3 + HEIGHT * (bars + len(results) - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, results)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise TrtDynamoError(f"the chart cannot be written: {error}") from error


def draw(axes: Any, results: Sequence[Result]) -> None:
    """The bars, from top to bottom."""
    place, named, ticks, labels = 0.0, set[str](), [], []
    longest = max((end for result in results for cell in result.cells for end in ends(result, cell)), default=1.0)
    for result in results:
        ticks.append(place + (len(result.cells) - 1) / 2)
        labels.append(result.model)
        for cell in result.cells:
            draw_bar(axes, result, cell, place, longest, named)
            place += 1
        place += 1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place - 1.4, -0.6)
    axes.set_xlim(0, longest * 1.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    base = next((r.baseline for r in results if r.baseline), None)
    axes.set_xlabel(f"times as fast as {base.title if base else 'the baseline'}, median (whiskers: quartiles)")
    axes.axvline(1, color="#c8ccd2", linewidth=1, zorder=0)
    axes.set_title(heading(results), fontsize=10, color="#5f6670", loc="left")


def draw_bar(axes: Any, result: Result, cell: Cell, place: float, longest: float, named: set[str]) -> None:
    ratio = result.ratio(cell)
    if ratio is None or cell.alone is None:
        text = f"{cell.title}: {cell.why_empty}"
        text = text if len(text) < SHOWN else text[: SHOWN - 3] + "..."
        axes.text(longest * 0.01, place, text, va="center", fontsize=8, color="#8a8f98")
        return
    label = None if cell.title in named else cell.title
    named.add(cell.title)
    slow, fast = ends(result, cell)
    axes.barh(place, ratio, height=0.85, color=COLORS.get(cell.column, "#4a76c5"), label=label)
    axes.plot([slow, fast], [place, place], color="#33373d", linewidth=1.2)
    milliseconds = 1e3 * cell.alone.median
    text = f"{ratio:.2f}x   {milliseconds:.0f} ms" if milliseconds >= 100 else f"{ratio:.2f}x   {milliseconds:.3g} ms"
    axes.text(fast + longest * 0.01, place, text, va="center", fontsize=8)


def ends(result: Result, cell: Cell) -> tuple[float, ...]:
    """The ratios of the slow quartile and of the fast one; none where the column was not timed."""
    base = result.baseline
    if cell.alone is None or base is None or base.alone is None:
        return ()
    return base.alone.median / cell.alone.high, base.alone.median / cell.alone.low


def heading(results: Sequence[Result]) -> str:
    """Where all of them ran."""
    parts = [sorted({f"{getattr(r, name)}" for r in results}) for name in ("device", "dtype", "items")]
    devices, dtypes, items = (", ".join(part) for part in parts)
    return f"{devices}   {dtypes}   batch {items}"
