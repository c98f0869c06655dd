"""`ops`: which ATen overloads have a converter, ours and those registered by what `--import` names."""

from __future__ import annotations

import collections
import importlib
from typing import Annotated

import typer

from trt_dynamo.cli.output import AsJson, fail, plural, write_json, write_table

AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, as for the documentation.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Imported first, for the converters that it registers."),
]


def ops(as_markdown: AsMarkdown = False, as_json: AsJson = False, modules: Modules = None) -> None:
    """The ATen operators that have a converter, with their overloads."""
    for name in modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise fail(f"{name} cannot be imported: {error}", 2) from None
    rows = converted()
    overloads = sum(len(names) for _, names, _ in rows)
    if as_json:
        write_json([{"op": op, "overloads": names, "module": module} for op, names, module in rows])
        return
    if as_markdown:
        typer.echo("| operator | overloads | converted in |\n| --- | --- | --- |")
        for op, names, module in rows:
            typer.echo(f"| `{op}` | {', '.join(f'`{name}`' for name in names)} | `{module}` |")
        return
    write_table(("operator", "overloads", "converted in"), [(op, ", ".join(names), where) for op, names, where in rows])
    typer.echo(f"{plural(len({op for op, _, _ in rows}), 'operator')}, {plural(overloads, 'overload')}")


def converted() -> list[tuple[str, list[str], str]]:
    """Operator, its overloads and the module of their converter, by name."""
    from trt_dynamo.aten_converters import CONVERTERS

    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for target, converter in CONVERTERS.items():
        module = converter.function.__module__.removeprefix("trt_dynamo.aten_converters.")
        groups[str(target.overloadpacket), module].append(target._overloadname)
    return [(op, sorted(names), module) for (op, module), names in sorted(groups.items())]
