"""One entry on disk: a folder with `plan` and `entry.json`. In: a Plan. Out: the same Plan, or the reason why not.

`entry.json` says what the plan is and holds the SHA-256 of the plan and of itself. It is compared byte by byte with
what would be written again, so that no flipped bit, not even one in a space, goes unseen. There is no pickle: nothing
that is read can run before its checksum is known.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

from trt_dynamo.cache.disk import Damaged, read_file, sync_folder, write_file

# Raise it when the layout on disk changes. It is part of every key, so entries of two formats never meet in one place.
FORMAT = 1
PLAN = "plan"
HEADER = "entry.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A serialized engine, and the caller's JSON-able description of its inputs and outputs."""

    data: bytes
    manifest: dict[str, Any]

    def as_stored(self) -> Plan:
        """This plan as it would come back from the disk.

        Raises:
            TypeError: JSON cannot hold the manifest.
        """
        return Plan(self.data, json.loads(json.dumps(self.manifest)))


@functools.cache
def versions() -> dict[str, str]:
    """The packages that an entry was written with, for people: what decides is in the key."""
    found = {}
    for name in ("trt-dynamo", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def write(folder: Path, key: str, plan: Plan) -> int:
    """Writes the entry into an empty folder, through to the disk. Returns its size in bytes.

    Raises:
        OSError: the disk refuses.
    """
    body = {
        "format": FORMAT,
        "key": key,
        "created": int(time.time()),
        "versions": versions(),
        "plan": {"bytes": len(plan.data), "sha256": hashlib.sha256(plan.data).hexdigest()},
        "manifest": plan.manifest,
    }
    header = sealed(body)
    write_file(folder / PLAN, plan.data)
    write_file(folder / HEADER, header)
    touch(folder)
    sync_folder(folder)
    return len(plan.data) + len(header)


def read(folder: Path, key: str) -> Plan:
    """The plan in `folder`, which must be the one for `key`.

    Raises:
        FileNotFoundError: there is no such folder.
        Damaged: it is truncated, changed, foreign, of another format, or cannot be read.
    """
    header = read_header(folder, key)
    data = read_file(folder / PLAN, header["plan"]["bytes"])
    if hashlib.sha256(data).hexdigest() != header["plan"]["sha256"]:
        raise Damaged("the plan's checksum differs")
    return Plan(data, header["manifest"])


def read_header(folder: Path, key: str) -> dict[str, Any]:
    """What `entry.json` says; the same errors as `read`, but the plan itself is not looked at."""
    try:
        folder.lstat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"its folder cannot be read: {error.strerror}") from None
    raw = read_file(folder / HEADER)
    try:
        header = json.loads(raw)
        body = {name: value for name, value in header.items() if name != "checksum"} if isinstance(header, dict) else {}
        unchanged = sealed(body) == raw
    except (ValueError, RecursionError):
        raise Damaged(f"{HEADER} is not JSON") from None
    if body.get("format") != FORMAT:
        raise Damaged(f"its format is {body.get('format')!r}, not {FORMAT}")
    if not unchanged:
        raise Damaged(f"the checksum of {HEADER} differs")
    if header["key"] != key:
        raise Damaged(f"it belongs to the key {header['key']}")
    return body


def sealed(body: dict[str, Any]) -> bytes:
    """The bytes of `entry.json`: the body with its own checksum."""
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=1).encode()


def touch(folder: Path) -> None:
    """Notes that the entry was used now: the header's time of change is the time of last use."""
    now = time.time_ns()
    os.utime(folder / HEADER, ns=(now, now))
