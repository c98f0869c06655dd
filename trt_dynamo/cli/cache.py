"""`cache list | stats | verify | prune | clear | export | import`: the engines on disk, for people.

The folder is the one that the settings name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_dynamo.cli.output import AsJson, date, fail, plural, size, write_json, write_pairs, write_table
from trt_dynamo.errors import SettingsError
from trt_dynamo.settings import Settings, parse

if TYPE_CHECKING:
    from trt_dynamo.cache import Store

app = typer.Typer(help="The engines on disk: list, check, remove and carry them elsewhere.", no_args_is_help=True)


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


@app.command("stats")
def stats(as_json: AsJson = False) -> None:
    """What is in the cache, in numbers."""
    found = numbers(store_in_use())
    if as_json:
        write_json(found)
        return
    share = f" ({100 * found['bytes'] / found['max_bytes']:.0f} %)" if found["max_bytes"] else ""
    free = "unknown" if found["free_bytes"] is None else size(found["free_bytes"])
    lines = [
        ("folder", found["folder"]),
        ("entries", f"{found['entries']}: {found['damaged']} damaged, {found['refused']} refused"),
        ("size", f"{size(found['bytes'])} of {size(found['max_bytes'])}{share}; the largest {size(found['largest'])}"),
        ("free on disk", free),
        ("last used", f"{date(found['newest']) or '-'}; the one that goes first: {date(found['oldest']) or '-'}"),
        *[
            ("written by", f"{versions}: {plural(count, 'entry', 'entries')}")
            for versions, count in found["by"].items()
        ],
        ("left by killed", f"{plural(found['remains'], 'file')}; the next write removes them"),
        ("signed", "yes, and others are refused" if found["signed"] else "no"),
        ("remote", found["remote"] or "none"),
    ]
    write_pairs(lines)


def numbers(store: Store) -> dict[str, Any]:
    """What `stats` knows, as plain data."""
    from trt_dynamo.cache import without_password

    entries = store.entries()
    used = [entry.used for entry in entries if entry.used]
    whole = [entry for entry in entries if not entry.damage]
    by = Counter(", ".join(f"{name} {version}" for name, version in entry.versions.items()) for entry in whole)
    remote = Settings.from_env().cache_remote
    return {
        "folder": str(store.folder),
        "entries": len(entries),
        "damaged": sum(bool(entry.damage) and not entry.refused for entry in entries),
        "refused": sum(entry.refused for entry in entries),
        "bytes": sum(entry.size for entry in entries),
        "max_bytes": store.max_bytes,
        "largest": max((entry.size for entry in entries), default=0),
        "free_bytes": store.free_bytes(),
        "newest": max(used, default=0),
        "oldest": min(used, default=0),
        "by": dict(by.most_common()),
        "remains": store.remains(),
        "signed": store.signing.key is not None,
        "remote": without_password(remote) if remote else None,
    }


@app.command("verify")
def verify(as_json: AsJson = False) -> None:
    """Reads every engine and removes the damaged. Exit code 1 where one is damaged, or not signed with the key."""
    store = store_in_use()
    damaged = store.verify()
    left = store.entries()
    known = {key for key, _ in damaged}
    refused = [(entry.key, entry.damage) for entry in left if entry.refused]
    whole = sum(entry.key not in known and not entry.damage for entry in left)
    if as_json:
        pairs = {"damaged": damaged, "refused": refused}
        found = {kind: [{"key": key, "reason": reason} for key, reason in pairs[kind]] for kind in pairs}
        write_json({"folder": store.folder, "whole": whole, **found})
    else:
        for kind, pair in [("damaged", pair) for pair in damaged] + [("refused", pair) for pair in refused]:
            typer.echo(f"{kind}: {pair[0]}: {pair[1]}")
        counts = f"{len(damaged)} damaged" + (f", {len(refused)} refused" if refused else "")
        typer.echo(f"{plural(whole, 'entry', 'entries')} whole, {counts}, in {store.folder}")
    if damaged or refused:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    max_size: Annotated[
        str | None, typer.Option("--max-size", help="What may stay, such as 5GB; by default the setting cache_size.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Removes the engines that were not used for longest, until the rest fits, and what killed processes left."""
    store = store_in_use()
    try:
        largest = store.max_bytes if max_size is None else parse("cache_size", max_size, shown="--max-size")
    except SettingsError as error:
        raise fail(str(error), 2) from None
    remove(store, largest, as_json)


@app.command("clear")
def clear(as_json: AsJson = False) -> None:
    """Removes every cached engine."""
    remove(store_in_use(), -1, as_json)


def remove(store: Store, max_bytes: int, as_json: bool) -> None:
    """Removes until at most `max_bytes` are left, and says what went."""
    before = store.size()
    try:
        removed = store.prune(max_bytes)
    except OSError as error:
        raise fail(f"the engine cache {store.folder} cannot be cleared: {error}") from None
    left = store.size()
    if as_json:
        write_json({"folder": store.folder, "removed": removed, "bytes": before - left})
    else:
        freed = size(max(0, before - left))
        typer.echo(f"removed {plural(len(removed), 'entry', 'entries')}, {freed}, from {store.folder}")
    if left > max(max_bytes, 0):
        raise fail(f"{size(left)} cannot be removed from the engine cache {store.folder}")
