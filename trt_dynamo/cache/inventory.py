"""What lies in a cache's folder. In: the folder. Out: its entries, by what the file system says or by their headers.

What is not named like an entry of ours is not ours, and links are not followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

from trt_dynamo.cache import entry
from trt_dynamo.cache.disk import Damaged, listing
from trt_dynamo.cache.signing import Refused, Signing

KEY = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"[0-9a-f]{2}")

# Clocks of two machines differ by less. A time of use further ahead than this is a mistake, and says nothing.
SKEW_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry, for people. `created` and `used` are seconds since 1970; `damage` says why it is unusable, if so."""

    key: str
    size: int
    created: int
    used: float
    manifest: dict[str, Any]
    versions: dict[str, str]
    damage: str = ""
    refused: bool = False  # the damage is that it is not signed with our key

    @property
    def version(self) -> str:
        """The version of trt_dynamo that wrote the entry."""
        return self.versions.get("trt-dynamo", "unknown")

    @property
    def summary(self) -> str:
        """The manifest in a few words."""
        if self.damage:
            return f"{'refused' if self.refused else 'damaged'}: {self.damage}"
        counted = {name: self.manifest.get(name) for name in ("inputs", "outputs")}
        return ", ".join(f"{len(value)} {name}" for name, value in counted.items() if isinstance(value, Sized))


@dataclasses.dataclass(frozen=True)
class Found:
    """An entry as its file system shows it: bytes of all its files, nanoseconds of its last use (0: not known)."""

    used: int
    key: str
    size: int
    path: Path


def scan(folder: Path) -> Iterator[Found]:
    """Every entry, whole or damaged."""
    for shard in listing(folder):
        if SHARD.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False):
            for item in listing(Path(shard.path)):
                if KEY.fullmatch(item.name) and item.name.startswith(shard.name):
                    yield measured(Path(item.path))


def order(found: Found) -> tuple[int, str]:
    """Sorts the least recently used first."""
    return found.used, found.key


def measured(path: Path) -> Found:
    """The size and the last use of an entry; an entry without a header was never used."""
    size, used = 0, 0
    for item in listing(path):
        with contextlib.suppress(OSError):
            status = item.stat(follow_symlinks=False)
            size += status.st_size
            if item.name == entry.HEADER:
                used = status.st_mtime_ns
    # Such an entry would outlive all others for as long as the clock was wrong.
    if used > time.time_ns() + SKEW_SECONDS * 10**9:
        used = 0
    return Found(used, path.name, size, path)


def described(found: Found, signing: Signing) -> Entry | None:
    """The entry for people, from its header; None if it has gone meanwhile. The plan is not read."""
    body: dict[str, Any] = {}
    damage, refused = "", False
    try:
        body = entry.read_header(found.path, found.key)
        signing.check(entry.sealed(body), entry.read_signature(found.path))
    except OSError:
        return None
    except Damaged as error:
        damage, refused = str(error), isinstance(error, Refused)
    return Entry(
        found.key,
        found.size,
        body.get("created", 0),
        found.used / 1e9,
        body.get("manifest", {}),
        body.get("versions", {}),
        damage,
        refused,
    )
