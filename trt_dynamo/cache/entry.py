"""One entry. In: a Plan. Out: the same Plan, or the reason why not.

On disk it is a folder with `plan`, `entry.json` and, where a key is set, `signature`. `entry.json`, the header, says
what the plan is and holds the SHA-256 of the plan and of itself. It is compared byte by byte with what would be written
again, so that no flipped bit, not even one in a space, goes unseen. There is no pickle: nothing that is read can run
before its checksum, and its signature where a key is set, are known.
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

from trt_dynamo.cache.disk import Damaged, read_file, read_hashed, sync_folder, write_file
from trt_dynamo.cache.signing import Signing

# Raise it when the layout on disk changes. It is part of every key, so entries of two formats never meet in one place.
FORMAT = 1
PLAN = "plan"
HEADER = "entry.json"
SIGNATURE = "signature"
SIGNATURE_BYTES = 64
UNSIGNED = Signing()
OTHER_PLAN = "the plan's checksum differs"

# What a header of this format has, and of which type.
FIELDS = {"key": str, "created": int, "versions": dict, "plan": dict, "manifest": dict}
PLAN_FIELDS = {"bytes": int, "sha256": str}


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


@dataclasses.dataclass(frozen=True)
class Record:
    """A whole entry as it is kept and sent: the header, the plan's bytes, the signature of the header or nothing."""

    body: dict[str, Any]
    data: bytes
    signature: str = ""

    @functools.cached_property
    def header(self) -> bytes:
        """The bytes of `entry.json`."""
        return sealed(self.body)

    @property
    def key(self) -> str:
        key: str = self.body["key"]
        return key

    @property
    def plan(self) -> Plan:
        return Plan(self.data, self.body["manifest"])

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return len(self.data) + len(self.header) + len(self.signature)


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


def recorded(key: str, plan: Plan, signing: Signing = UNSIGNED) -> Record:
    """The entry for a plan that was built now, signed where there is a key."""
    body = {
        "format": FORMAT,
        "key": key,
        "created": int(time.time()),
        "versions": versions(),
        "plan": {"bytes": len(plan.data), "sha256": hashlib.sha256(plan.data).hexdigest()},
        "manifest": plan.manifest,
    }
    return Record(body, plan.data, signing.sign(sealed(body)))


def write(folder: Path, record: Record) -> int:
    """Writes the entry into an empty folder, through to the disk. Returns its size in bytes.

    Raises:
        OSError: the disk refuses.
    """
    write_file(folder / PLAN, record.data)
    if record.signature:
        write_file(folder / SIGNATURE, record.signature.encode())
    write_file(folder / HEADER, record.header)
    touch(folder)
    sync_folder(folder)
    return record.size


def read(folder: Path, key: str, signing: Signing = UNSIGNED) -> Record:
    """The entry in `folder`, which must be the one for `key`.

    Raises:
        FileNotFoundError: there is no such folder.
        Refused: it is not signed with our key.
        Damaged: it is truncated, changed, foreign, of another format, or cannot be read.
    """
    body = read_header(folder, key)
    signature = read_signature(folder)
    signing.check(sealed(body), signature)
    data, sha256 = read_hashed(folder / PLAN, body["plan"]["bytes"])
    if sha256 != body["plan"]["sha256"]:
        raise Damaged(OTHER_PLAN)
    return Record(body, data, signature)


def read_header(folder: Path, key: str) -> dict[str, Any]:
    """What `entry.json` says; the same errors as `read`, but neither the plan nor the signature is looked at."""
    try:
        folder.lstat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"its folder cannot be read: {error.strerror}") from None
    return parsed(read_file(folder / HEADER), key)


def read_signature(folder: Path) -> str:
    """The signature beside the header; nothing where there is none.

    Raises:
        Damaged: it is no plain file, not ours, cannot be read, or is no signature.
    """
    try:
        (folder / SIGNATURE).lstat()
    except FileNotFoundError:
        return ""
    signature = read_file(folder / SIGNATURE, SIGNATURE_BYTES)
    if not set(signature) <= set(b"0123456789abcdef"):
        raise Damaged(f"{SIGNATURE} is none")
    return signature.decode()


def parsed(raw: bytes, key: str) -> dict[str, Any]:
    """The header in these bytes, without its checksum.

    Raises:
        Damaged: it is not whole, not of this format, not for `key`, or lacks a field.
    """
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
    if not (has(body, FIELDS) and has(body["plan"], PLAN_FIELDS) and body["plan"]["bytes"] >= 0):
        raise Damaged(f"{HEADER} lacks a field, or has one of another type")
    if body["key"] != key:
        raise Damaged(f"it belongs to the key {body['key']}")
    return body


def has(body: dict[str, Any], fields: dict[str, type]) -> bool:
    return all(type(body.get(name)) is kind for name, kind in fields.items())


def check_plan(body: dict[str, Any], data: bytes) -> None:
    """
    Raises:
        Damaged: these bytes are not the plan of this header.
    """
    if len(data) != body["plan"]["bytes"] or hashlib.sha256(data).hexdigest() != body["plan"]["sha256"]:
        raise Damaged(OTHER_PLAN)


def sealed(body: dict[str, Any]) -> bytes:
    """The bytes of `entry.json`: the body with its own checksum."""
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, indent=1).encode()


def touch(folder: Path) -> None:
    """Notes that the entry was used now: the header's time of change is the time of last use."""
    now = time.time_ns()
    os.utime(folder / HEADER, ns=(now, now))
