"""Archives: entries of one cache in a file, for another. In: a store, a file. Out: the file, or what came of them.

An import trusts nothing: each entry is checked as one from the disk, and for its signature where a key is set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.entry import Record
from trt_dynamo.cache.packing import pack, unpack
from trt_dynamo.cache.store import Store


@dataclasses.dataclass
class Transfer:
    """What came of an export or import, as keys. `failure` says why an import ended early, if it did."""

    done: list[str] = dataclasses.field(default_factory=list)
    there: list[str] = dataclasses.field(default_factory=list)  # had them already
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # damaged or refused, with the reason
    failure: str = ""


def export_entries(store: Store, file: Path, keys: Sequence[str]) -> Transfer:
    """Writes these entries to `file`, which appears when all is in it; those of no use are left out.

    Raises:
        OSError: the file cannot be written.
    """
    transfer = Transfer()

    def records() -> Iterator[Record]:
        for key in keys:
            record = store.record(key)
            if record is None:
                transfer.bad.append((key, "damaged, refused or gone"))
            else:
                transfer.done.append(key)
                yield record

    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(descriptor, "wb") as out:
            pack(cast("BinaryIO", out), records())
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return transfer


def import_entries(store: Store, file: Path) -> Transfer:
    """Stores the entries of an archive that the store does not have.

    Raises:
        OSError: the file cannot be read.
        Damaged: it is no archive. One that is cut off gives what it has before the cut, and a `failure`.
    """
    transfer = Transfer()
    with file.open("rb") as source:
        entries = unpack(cast("BinaryIO", source))
        while True:
            try:
                packed = next(entries, None)
            except Damaged as error:
                if not (transfer.done or transfer.there or transfer.bad):
                    raise
                transfer.failure = f"{file}: {error}"
                break
            if packed is None:
                break
            try:
                record = packed.checked(store.signing)
            except Damaged as error:
                transfer.bad.append((packed.key, str(error)))
                continue
            if store.record(record.key) is not None:
                transfer.there.append(record.key)
            elif store.put_record(record):
                transfer.done.append(record.key)
            else:
                transfer.failure = f"the entry {record.key} could not be stored in {store.folder}"
                break
    return transfer
