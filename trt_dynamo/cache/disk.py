"""Files and folders of the cache. In: paths. Out: bytes that are known to be this user's own, and synced writes."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from trt_dynamo.side_threads import Behind

# What file systems that cannot sync a folder say.
UNSYNCABLE = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)

# These say nothing of the file: this process has too much open, or the file was replaced on a disk behind a network.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EINTR)

# Bytes that are read while those before are hashed.
READ_AT_ONCE = 2**21


class Damaged(Exception):
    """An entry is there and cannot be used; the text is the reason."""


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file that only this user can read, through to the disk.

    Raises:
        OSError: the disk refuses, or the file is there already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path, expected: int | None = None) -> bytes:
    """The content of a plain file of ours, of `expected` bytes.

    Raises:
        Damaged: it is missing, no plain file, not ours, of another size, or cannot be read.
        OSError: it may be whole, and cannot be read now.
    """
    with opened(path, expected) as file:
        return file.read()


def read_hashed(path: Path, expected: int) -> tuple[bytes, str]:
    """What `read_file` gives, and its SHA-256 in hexadecimal, computed behind the reading.

    Raises:
        Damaged, OSError: as `read_file`.
    """
    sha = hashlib.sha256()
    with opened(path, expected) as file:
        content = io.BytesIO(bytes(expected))
        with content.getbuffer() as buffer, Behind(expected) as behind:
            done = 0
            while done < expected and (count := file.readinto(buffer[done : done + READ_AT_ONCE])):
                behind.run(functools.partial(sha.update, buffer[done : done + count]))
                done += count
    if done < expected:
        raise Damaged(f"{path.name} has {done} bytes, not {expected}")
    return content.getvalue(), sha.hexdigest()


@contextlib.contextmanager
def opened(path: Path, expected: int | None = None) -> Iterator[io.BufferedReader]:
    """The file, open for reading, with the errors of `read_file` for it and for what is read inside."""
    # Neither follow a link out of the cache nor wait for the other end of a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{path.name} is no plain file")
            if (reason := why_untrusted(status)) is not None:
                raise Damaged(f"{path.name} {reason}")
            if expected is not None and status.st_size != expected:
                raise Damaged(f"{path.name} has {status.st_size} bytes, not {expected}")
            yield file
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None


def why_untrusted(status: os.stat_result) -> str | None:
    """Why a file or folder may hold what somebody else wrote, or None. A plan is code: it must be this user's own."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last. Where folders cannot be synced, a crash may cost the entry and no more."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def listing(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by name; nothing when it is missing, no folder, or cannot be read."""
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError:
        return []


def delete(path: Path) -> None:
    """Deletes a file, a link or a whole folder; what resists is left for the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
