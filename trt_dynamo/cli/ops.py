"""`ops`: which ATen overloads have a converter, ours and those registered by what `--import` names."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from trt_dynamo.cli.output import AsJson, fail, plural, write_json, write_table

AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the page docs/operators.md.")]
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
    from trt_dynamo.cli.operators_page import converted, operators_page

    if as_markdown:
        typer.echo(operators_page(), nl=False)
        return
    rows = converted()
    overloads = sum(len(names) for _, names, _ in rows)
    if as_json:
        write_json([{"op": op, "overloads": names, "module": module} for op, names, module in rows])
        return
    write_table(("operator", "overloads", "converted in"), [(op, ", ".join(names), where) for op, names, where in rows])
    typer.echo(f"{plural(len({op for op, _, _ in rows}), 'operator')}, {plural(overloads, 'overload')}")
