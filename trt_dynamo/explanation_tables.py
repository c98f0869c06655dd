"""An explanation as tables for a terminal."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trt_dynamo.cli.output import date, plural, size

if TYPE_CHECKING:
    from trt_dynamo.explained import EngineToBe
    from trt_dynamo.explanation import Explanation


def tables(found: Explanation) -> Iterator[RenderableType]:
    """A line that sums up, the engines, what stays in eager and why, and what else there is to say."""
    total = found.converted + len(found.eager)
    share = f"{found.converted} of {plural(total, 'node')} in {plural(len(found.segments), 'TensorRT engine')}"
    yield Text(f"{share}, from {plural(found.graphs, 'graph')}", style="bold")
    if found.engines:
        yield engines_table(found.engines)
    if found.eager:
        yield eager_table(found)
    for title, lines in {
        "graphs not lowered": found.broken,
        "not traced by Dynamo": found.breaks,
        "ranges that were cut": found.cuts,
        "precision": [str(told) for told in found.precision],
        "2:4 sparsity": [str(told) for told in found.sparsity],
        "to Inductor": [f"{plural(len(names), 'node')}: {', '.join(names)}" for names in found.inductor],
        "engines of this process so far": [str(build) for build in found.builds],
    }.items():
        if lines:
            yield Text(f"\n{title}", style="bold")
            yield from (Text(f"  {line}") for line in lines)


def engines_table(engines: tuple[EngineToBe, ...]) -> Table:
    table = started("engine", "nodes", "weights", "sizes (smallest best largest)", "computes in", "in the cache")
    for engine in engines:
        sizes = "\n".join(f"{name}: {low} {best} {high}" for name, (low, best, high) in engine.ranges.items())
        weights = f"{len(engine.weights)}, {size(engine.weight_bytes)}" if engine.weights else "none"
        table.add_row(*map(Text, (engine.name, str(len(engine.nodes)), weights, sizes, computes(engine), kept(engine))))
    return table


def eager_table(found: Explanation) -> Table:
    """The operators that stay in eager, the most frequent first, each reason with the first line that asks for it."""
    groups = collections.Counter((verdict.target, verdict.reason) for verdict in found.eager)
    first = {(verdict.target, verdict.reason): verdict.source for verdict in reversed(found.eager)}
    table = started("in eager", "nodes", "why", "source")
    for (target, reason), count in groups.most_common():
        table.add_row(*map(Text, (target, str(count), reason, short(first[target, reason]))))
    return table


def short(source: str) -> str:
    """`model.py:41` of a source line."""
    place, _, _ = source.partition(", ")
    return PurePath(place).name


def started(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "nodes" else "left")
    return table


def computes(engine: EngineToBe) -> str:
    """What the engine computes in, in a few words."""
    told = engine.precision
    if told is None:
        return "the model's types"
    if not told.recorded:
        return "not recorded yet"
    name = "fp16" if told.precision == "auto" else told.precision
    return f"{name}: {told.chosen.low}, float32: {told.chosen.wide}"


def kept(engine: EngineToBe) -> str:
    """Whether the engine is there already."""
    if engine.stored is None:
        return "no"
    took = engine.stored.build_seconds
    built = "" if took is None else f", built in {took:.1f} s"
    return f"{size(engine.stored.bytes)} of {date(engine.stored.created)}{built}"
