"""`selftest`: builds, runs and compares a fixed list of cases here, prints a table, writes a file for an issue."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trt_dynamo.cli.output import fail, plural, write_table

Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="PATTERN", help="Cases whose name has this in it; * and ? too; may be repeated."),
]
Runtime = Annotated[
    str, typer.Option("--runtime", metavar="NAME", help="What answers: tensorrt, or reference, which needs no GPU.")
]
JsonPath = Annotated[
    Path, typer.Option("--json", metavar="PATH", help="Where the document for an issue goes.", dir_okay=False)
]
Limit = Annotated[float, typer.Option("--limit", metavar="SECONDS", min=1, help="The longest that a case may take.")]
Also = Annotated[
    list[Path] | None,
    typer.Option("--also", metavar="FILE", help="A Python file with cases of your own; may be repeated.", exists=True),
]
List = Annotated[bool, typer.Option("--list", help="Name the cases, and run none.")]


def selftest(
    runtime: Runtime = "tensorrt",
    only: Only = None,
    json_path: JsonPath = Path("trt_dynamo_selftest.json"),
    limit: Limit = 300,
    also: Also = None,
    names_only: List = False,
) -> None:
    """Runs a list of cases on this machine's GPU and compares each with eager. Exit code 1 where one fails."""
    from trt_dynamo import trt
    from trt_dynamo.selftest import chosen, load_cases

    if runtime not in ("tensorrt", "reference"):
        raise fail(f"--runtime is tensorrt or reference, not {runtime!r}", 2)
    files = [str(file.absolute()) for file in also or ()]
    missing = trt.why_missing()
    if missing is not None:
        raise fail(missing)
    cases = load_cases(files)
    names = chosen(cases, only or ())
    if not names:
        raise fail(f"no case is like {', '.join(only or ())}; --list names them", 2)
    if names_only:
        for name in names:
            typer.echo(f"{name}  {cases[name].about}".rstrip())
        return
    why_not = trt.why_not_runnable() if runtime == "tensorrt" else None
    if why_not is not None:
        raise fail(f"no engine can run here: {why_not}. --runtime reference runs the cases without one")
    try:
        json_path.open("a").close()  # better now than when all is done
    except OSError as error:
        raise fail(f"{json_path} cannot be written: {error.strerror}", 2) from None
    if not run_all(names, runtime, files, limit, json_path):
        raise typer.Exit(1)


def run_all(names: list[str], runtime: str, files: list[str], limit: float, json_path: Path) -> bool:
    """Runs the cases, prints and writes what came of them. Whether all is well."""
    from trt_dynamo.selftest import document
    from trt_dynamo.selftest.supervisor import run_cases

    results: list[dict[str, Any]] = []
    try:
        results.extend(run_cases(names, runtime, limit=limit, files=files, starting=progress(names)))
    finally:  # also of what was run before Ctrl-C
        clear_progress()
        found = document.document(results, runtime, limit)
        json_path.write_text(json.dumps(found, indent=2) + "\n")
    write_table(document.COLUMNS, document.rows(results))
    for text in document.told(results):
        typer.echo(f"\n{text}")
    typer.echo(f"\n{document.summary(results)}. The answers are those of {found['answered_by']}.")
    typer.echo(f"For an issue: {json_path}")
    return all(result["status"] in document.GOOD for result in results)


def progress(names: list[str]) -> Any:
    """Shows on a terminal which case runs."""
    order = {name: number for number, name in enumerate(names, 1)}

    def show(name: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{order[name]} of {plural(len(names), 'case')}: {name}")
            sys.stderr.flush()

    return show


def clear_progress() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
