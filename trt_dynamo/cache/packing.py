"""Entries as one stream of bytes, for archives and for the remote tier. In: Records. Out: the same, checked.

    trt_dynamo engines 1
    <key> <bytes of the header> <bytes of the plan> <signature, or ->
    <header><plan>                      these two lines for each entry
    end <number of entries>

No name of a file, no link and no object of Python's is in it, so reading one can write nowhere and run nothing. What
the lines say is checked against what follows, and every entry as one from the disk.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.entry import Record, check_plan, parsed
from trt_dynamo.cache.signing import Signing

MAGIC = b"trt_dynamo engines 1\n"
LINE = re.compile(rb"([0-9a-f]{64}) (\d{1,15}) (\d{1,15}) ([0-9a-f]{64}|-)\n")
END = re.compile(rb"end (\d{1,15})\n")
LONGEST_LINE = 200


@dataclasses.dataclass(frozen=True)
class Packed:
    """An entry as the stream has it; nothing is known of it yet."""

    key: str
    header: bytes
    data: bytes
    signature: str

    def checked(self, signing: Signing) -> Record:
        """The entry, whole and signed where a key is set.

        Raises:
            Refused: it is not signed with our key.
            Damaged: header or plan are not what they should be.
        """
        body = parsed(self.header, self.key)
        signing.check(self.header, self.signature)
        check_plan(body, self.data)
        return Record(body, self.data, self.signature)


def pack(file: BinaryIO, records: Iterable[Record]) -> int:
    """Writes the entries, one in memory at a time. Returns how many they were.

    Raises:
        OSError: the disk refuses.
    """
    count = 0
    file.write(MAGIC)
    for record in records:
        sizes = f"{len(record.header)} {len(record.data)}"
        file.write(f"{record.key} {sizes} {record.signature or '-'}\n".encode())
        file.write(record.header)
        file.write(record.data)
        count += 1
    file.write(f"end {count}\n".encode())
    return count


def packed(record: Record) -> bytes:
    """A stream of this one entry."""
    file = io.BytesIO()
    pack(file, [record])
    return file.getvalue()


def unpack(file: BinaryIO) -> Iterator[Packed]:
    """The entries of a stream that can seek, one in memory at a time.

    Raises:
        Damaged: it is no such stream, it ends too early, or something follows its end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise Damaged("it holds no engines of trt_dynamo, or those of another version")
    count = 0
    while (match := LINE.fullmatch(line := file.readline(LONGEST_LINE))) is not None:
        key, signature = match[1].decode(), match[4].decode().strip("-")
        header, data = (exactly(file, int(length), size) for length in (match[2], match[3]))
        yield Packed(key, header, data, signature)
        count += 1
    end = END.fullmatch(line)
    if end is None or int(end[1]) != count:
        raise Damaged(f"it is cut off or damaged after {count} entries")
    if file.read(1):
        raise Damaged("something follows its end")


def exactly(file: BinaryIO, count: int, size: int) -> bytes:
    """The next `count` bytes of a file of `size` bytes, asked for only if they are there."""
    if count > size - file.tell():
        raise Damaged("it is cut off")
    data = file.read(count)
    if len(data) != count:
        raise Damaged("it is cut off")
    return data


def unpacked(data: bytes, key: str, signing: Signing) -> Record:
    """The only entry of a stream, which must be the one for `key`.

    Raises:
        Refused: it is not signed with our key.
        Damaged: there is another entry, none, more than one, or it is not whole.
    """
    found = list(unpack(io.BytesIO(data)))
    if [each.key for each in found] != [key]:
        raise Damaged("it does not hold this entry and no other")
    return found[0].checked(signing)
