"""How the commands print: tables that fit a terminal, plain aligned lines for a file or a pipe, JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]

UNITS = ("B", "KB", "MB", "GB", "TB")


def write_json(value: Any) -> None:
    """One JSON document on stdout; paths and the like as text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def write_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """`name  value` lines, the values under one another."""
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}".rstrip())


def write(drawn: Any, text: str) -> None:
    """What `rich` can draw on a terminal, and the same as text for a file or a pipe."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(drawn)
    else:
        typer.echo(text)


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table: drawn by `rich` on a terminal, else aligned text with a line for each row, nothing cut off."""
    from rich.console import Console

    rows = [[str(cell) for cell in row] for row in rows]
    console = Console()
    if console.is_terminal:
        draw_table(console, columns, rows)
        return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [[column.upper() for column in columns], *rows]:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def draw_table(console: Any, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The table for a person at a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def size(count: float) -> str:
    """Bytes for people: `1.5 GB` is 1.5 * 2**30, as in the setting cache_size."""
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"


def date(seconds: float) -> str:
    """Seconds since 1970 as local date and time; nothing for 0, which means unknown."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def plural(count: int, noun: str, many: str = "") -> str:
    """`1 entry`, `2 entries`."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def fail(message: str, code: int = 1) -> typer.Exit:
    """Says on stderr what is wrong; the caller raises what comes back. Code 2: the command was called wrongly."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)
