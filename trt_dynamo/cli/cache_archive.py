"""`cache export FILE` and `cache import FILE`: engines from one machine's cache into another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trt_dynamo.cli.cache import store_in_use
from trt_dynamo.cli.output import AsJson, fail, plural, size, write_json

if TYPE_CHECKING:
    from trt_dynamo.cache import Store
    from trt_dynamo.cache.archive import Transfer


def export(
    file: Annotated[Path, typer.Argument(help="The archive to write.")],
    keys: Annotated[list[str] | None, typer.Argument(help="The first digits of the keys; by default all.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Writes engines to a file, for `import` elsewhere. Exit code 1 where an engine was damaged and is left out."""
    from trt_dynamo.cache.archive import export_entries

    store = store_in_use()
    if file.exists() and not force:
        raise fail(f"{file} is there already; --force replaces it")
    try:
        transfer = export_entries(store, file, wanted(store, keys or []))
        written = file.stat().st_size
    except OSError as error:
        raise fail(f"{file} cannot be written: {error.strerror or error}") from None
    say(transfer, "exported", f"{size(written)}, to {file}", as_json)


def import_(
    file: Annotated[Path, typer.Argument(help="An archive that `export` wrote.")], as_json: AsJson = False
) -> None:
    """Adds the engines of an archive to the cache. An engine is code: import only what you would also run."""
    from trt_dynamo.cache.archive import import_entries
    from trt_dynamo.cache.disk import Damaged

    store = store_in_use()
    if store.readonly:
        raise fail("the setting cache=readonly forbids it")
    try:
        transfer = import_entries(store, file)
    except OSError as error:
        raise fail(f"{file} cannot be read: {error.strerror or error}") from None
    except Damaged as error:
        raise fail(f"{file}: {error}") from None
    say(transfer, "imported", f"{len(transfer.there)} there already, to {store.folder}", as_json)


def wanted(store: Store, prefixes: Sequence[str]) -> list[str]:
    """The keys of the entries that begin with one of these; of all entries, where none is given."""
    keys = [entry.key for entry in store.entries()]
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in keys):
            raise fail(f"no entry of {store.folder} begins with {prefix}")
    return [key for key in keys if not prefixes or key.startswith(tuple(prefixes))]


def say(transfer: Transfer, verb: str, where: str, as_json: bool) -> None:
    """Prints what came of it; exits with 1 unless all went well."""
    if as_json:
        bad = [{"key": key, "reason": reason} for key, reason in transfer.bad]
        write_json({verb: transfer.done, "there": transfer.there, "bad": bad, "failure": transfer.failure})
    else:
        for key, reason in transfer.bad:
            typer.echo(f"left out: {key}: {reason}")
        typer.echo(f"{verb} {plural(len(transfer.done), 'entry', 'entries')}, {where}")
    if transfer.failure:
        raise fail(transfer.failure)
    if transfer.bad:
        raise typer.Exit(1)
