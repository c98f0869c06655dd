"""`cache list | verify | clear`: the engines on disk, for people. The folder is the one that the settings name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from trt_dynamo.cli.output import AsJson, date, fail, plural, size, write_json, write_table
from trt_dynamo.settings import Settings

if TYPE_CHECKING:
    from trt_dynamo.cache import Store

app = typer.Typer(help="The engines on disk: list them, check them, remove them.", no_args_is_help=True)


def store_in_use() -> Store:
    """The store that the settings name; exits where it is not to be trusted."""
    from trt_dynamo.cache import open_store

    store = open_store(Settings.from_env())
    refusal = store.refusal()
    if refusal is not None:
        raise fail(refusal)
    return store


@app.command("list")
def list_entries(as_json: AsJson = False) -> None:
    """Lists the cached engines, the most recently used first."""
    store = store_in_use()
    entries = store.entries()
    if as_json:
        listed = [dataclasses.asdict(entry) for entry in entries]
        write_json({"folder": store.folder, "max_bytes": store.max_bytes, "entries": listed})
        return
    if entries:
        rows = [(e.key[:12], size(e.size), date(e.created), date(e.used), e.version, e.summary) for e in entries]
        write_table(("key", "size", "built", "last used", "by", "engine"), rows)
    total = size(sum(entry.size for entry in entries))
    typer.echo(f"{plural(len(entries), 'entry', 'entries')}, {total} of {size(store.max_bytes)}, in {store.folder}")


@app.command("verify")
def verify(as_json: AsJson = False) -> None:
    """Reads every engine and removes the damaged. Exit code 1 where there was one."""
    store = store_in_use()
    damaged = store.verify()
    whole = len(store.entries())
    if as_json:
        found = [{"key": key, "reason": reason} for key, reason in damaged]
        write_json({"folder": store.folder, "whole": whole, "damaged": found})
    else:
        for key, reason in damaged:
            typer.echo(f"damaged: {key}: {reason}")
        typer.echo(f"{plural(whole, 'entry', 'entries')} whole, {len(damaged)} damaged, in {store.folder}")
    if damaged:
        raise typer.Exit(1)


@app.command("clear")
def clear(as_json: AsJson = False) -> None:
    """Removes every cached engine."""
    store = store_in_use()
    before = store.size()
    try:
        removed = store.clear()
    except OSError as error:
        raise fail(f"the engine cache {store.folder} cannot be cleared: {error}") from None
    freed = before - store.size()
    if as_json:
        write_json({"folder": store.folder, "removed": removed, "bytes": freed})
    else:
        typer.echo(f"removed {plural(len(removed), 'entry', 'entries')}, {size(freed)}, from {store.folder}")
