"""The cache's folder: `<folder>/<2 hex>/<key>/`. In: keys and Plans. Out: Plans, entries to list, and few surprises.

- An entry is made in `.tmp`, synced and renamed into place under the lock `.lock`; it goes the other way before it is
  deleted. So whoever looks sees a whole entry or none, whatever was killed when, and all that lies in `.tmp` when the
  lock is free is rubbish.
- Readers take no lock. What looks damaged is read again under the lock, then removed with a warning.
- The size is what the disk says, the time of last use is the file time of `entry.json`: every process sees the same.
- The folder is trusted only when this user alone can write to it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from trt_dynamo.cache import artifacts, entry
from trt_dynamo.cache.disk import Damaged, delete, listing, sync_folder, why_untrusted
from trt_dynamo.cache.entry import Plan, Record
from trt_dynamo.cache.inventory import KEY, Entry, described, order, scan
from trt_dynamo.cache.signing import Refused, Signing
from trt_dynamo.settings import warn_once

log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
BUILDS = ".builds"

# How long to wait for another process, in seconds: for one that writes or evicts, and for one that builds this engine.
WRITE_SECONDS = 120.0
BUILD_SECONDS = 900.0

ELSEWHERE = "or set TRT_DYNAMO_CACHE_DIR to another folder"


class Store:
    """The cache in `folder`, of at most `max_bytes`. Every method is safe across threads and processes."""

    def __init__(
        self, folder: Path, max_bytes: int, *, readonly: bool = False, signing: Signing = entry.UNSIGNED
    ) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.readonly = readonly
        self.signing = signing

    def get(self, key: str) -> Plan | None:
        """The plan for `key`, which is now the most recently used; None when it is not there or of no use."""
        record = self.record(key)
        if record is None:
            return None
        if not self.readonly:
            # A disk that became read-only still serves its plans.
            with contextlib.suppress(OSError):
                entry.touch(self.path(key))
        artifacts.note(key, self)
        return record.plan

    def record(self, key: str) -> Record | None:
        """The entry for `key`, with no note of its use; None when it is not there or of no use."""
        path = self.path(key)
        if not self.trusted():
            return None
        try:
            return entry.read(path, key, self.signing)
        except OSError:
            return None
        except Refused as error:
            self.refuse(error)
            return None
        except Damaged:
            return self.read_again(key)[0]

    def put(self, key: str, plan: Plan) -> bool:
        """Stores a plan that was built now, as `put_record`."""
        self.path(key)
        return self.put_record(entry.recorded(key, plan, self.signing))

    def put_record(self, record: Record) -> bool:
        """Stores an entry, in the place of an older one; evicts what was not used for longest. False: not stored.

        Why not (a full disk, a folder that cannot be written or trusted, a plan larger than the whole cache) is warned
        about, once.
        """
        path = self.path(record.key)
        if self.readonly:
            return False
        try:
            if not self.created():
                return False
            with self.locked() as failure:
                if failure is not None:
                    raise failure
                self.sweep()
                stored = self.publish(path, record)
            if stored:
                artifacts.note(record.key, self)
            return stored
        except OSError as error:
            self.complain(error)
            return False

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first. Plans are not read: see `verify`."""
        if not self.trusted():
            return []
        found = sorted(scan(self.folder), key=order, reverse=True)
        return [each for each in (described(one, self.signing) for one in found) if each is not None]

    def size(self) -> int:
        """The bytes in all entries."""
        return sum(found.size for found in scan(self.folder))

    def free_bytes(self) -> int | None:
        """What the disk has left; None where it does not say, or the folder is not there yet."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return None

    def remains(self) -> int:
        """How many things lie in the folder for what is being written or was killed, at this moment."""
        return len(listing(self.folder / TEMPORARY))

    def verify(self) -> list[tuple[str, str]]:
        """Reads every plan and removes the damaged. Returns their keys, each with the reason.

        Entries that are not signed with our key stay: somebody else's key may fit, and we never use them.
        """
        bad = []
        for found in scan(self.folder) if self.trusted() else ():
            try:
                entry.read(found.path, found.key, self.signing)
            except (OSError, Refused):
                continue  # evicted meanwhile, or not ours to judge
            except Damaged:
                _, reason = self.read_again(found.key)
                if reason:
                    bad.append((found.key, reason))
        return bad

    def prune(self, max_bytes: int | None = None) -> list[str]:
        """Removes the least recently used entries until at most `max_bytes` (by default the store's) are left.

        Returns the keys that went. Remains of killed processes go too.

        Raises:
            OSError: the folder cannot be written or locked.
        """
        if self.readonly or not self.folder.is_dir() or not self.created():
            return []
        with self.locked() as failure:
            if failure is not None:
                raise failure
            self.sweep()
            return self.evict(self.max_bytes if max_bytes is None else max_bytes)

    def clear(self) -> list[str]:
        """Removes every entry, and nothing that is not the cache's own. Returns their keys.

        Raises:
            OSError: the folder cannot be written or locked.
        """
        return self.prune(-1)

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[bool]:
        """Only one process at a time is inside for one key. Yields whether the entry may have come meanwhile.

        A wait ends after BUILD_SECONDS, or at once where locks cannot be had: then several may build.
        """
        self.path(key)
        try:
            usable = self.created()
        except OSError as error:
            self.complain(error)
            usable = False
        if not usable:
            yield False
            return
        path = self.folder / BUILDS / key
        with self.locked(path, BUILD_SECONDS) as failure:
            if isinstance(failure, TimeoutError):
                log.warning(
                    "another process has been building this engine for %g s; building it here too", BUILD_SECONDS
                )
            elif failure is not None:
                self.complain(failure)
            try:
                yield True
            finally:
                if failure is None:
                    # Whoever waits for this file notices that it has gone, and makes a new one.
                    with contextlib.suppress(OSError):
                        path.unlink()

    def refusal(self) -> str | None:
        """Why this folder is not used, with what mends it, or None. A folder that is not there yet is fine."""
        if self.signing.problem:
            return f"the engine cache is not used, since entries are to be signed and {self.signing.problem}"
        try:
            status = self.folder.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"the engine cache {self.folder} cannot be used: {error.strerror}; mend it, {ELSEWHERE}"
        if not stat.S_ISDIR(status.st_mode):
            return f"the engine cache {self.folder} is not a folder; remove it, {ELSEWHERE}"
        reason = why_untrusted(status)
        if reason is None:
            return None
        name = shlex.quote(str(self.folder))
        mend = f"chmod 700 {name}" if status.st_uid == os.geteuid() else f"sudo chown -R {os.geteuid()} {name}"
        if status.st_mode & stat.S_ISVTX:
            mend = "set TRT_DYNAMO_CACHE_DIR to a folder inside it"  # it is /tmp or its like, and must stay as it is
        else:
            mend += f" ({ELSEWHERE})"
        return f"the engine cache {self.folder} is not used: it {reason}, and a plan is code. Mend it: {mend}"

    def trusted(self) -> bool:
        reason = self.refusal()
        if reason is not None:
            warn_once(reason)
        return reason is None

    def created(self) -> bool:
        """Makes the folder where it is missing; False when it is there and not trusted."""
        if not self.trusted():
            return False
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.trusted():  # somebody else was quicker
            return False
        for name in (TEMPORARY, BUILDS):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        return True

    def path(self, key: str) -> Path:
        """The entry's folder.

        Raises:
            ValueError: not a key, which is 64 hexadecimal digits.
        """
        if KEY.fullmatch(key) is None:
            raise ValueError(f"not a key of the engine cache: {key!r}")
        return self.folder / key[:2] / key

    @contextlib.contextmanager
    def locked(self, path: Path | None = None, seconds: float | None = None) -> Iterator[OSError | None]:
        """Holds a lock file (the folder's own by default), or yields why it cannot be had."""
        seconds = WRITE_SECONDS if seconds is None else seconds
        lock = filelock.FileLock(path or self.folder / ".lock", timeout=seconds, mode=0o600)
        failure: OSError | None = None
        try:
            lock.acquire()
        except OSError as error:
            failure = error
        except NotImplementedError as error:  # a file system without locks, to an older filelock
            failure = OSError(errno.ENOLCK, str(error))
        try:
            yield failure
        finally:
            if failure is None:
                # The kernel frees the lock with the file; an error here must not hide one of the build.
                with contextlib.suppress(OSError):
                    lock.release()

    def read_again(self, key: str) -> tuple[Record | None, str]:
        """Reads what looked damaged once more, while nobody writes: the entry, or why it was removed."""
        with contextlib.ExitStack() as stack:
            writable = not self.readonly and stack.enter_context(self.locked()) is None
            try:
                return entry.read(self.path(key), key, self.signing), ""
            except (OSError, Refused):
                return None, ""
            except Damaged as error:
                reason = str(error)
            removed = writable and self.remove(self.path(key))
            text = f"the entry {key} of the engine cache {self.folder} is unusable and was"
            if removed:
                log.warning("%s removed: %s", text, reason)
            else:
                warn_once(f"{text} left where it is, since it cannot be removed: {reason}")
            return None, reason

    def publish(self, path: Path, record: Record) -> bool:
        """Writes the entry and renames it into place. The lock is held."""
        temporary = Path(tempfile.mkdtemp(dir=self.folder / TEMPORARY))
        try:
            size = record.size
            if size > self.max_bytes:
                warn_once(
                    f"an engine of {size:,} bytes is not cached: the engine cache holds {self.max_bytes:,} bytes; "
                    "set TRT_DYNAMO_CACHE_SIZE to more"
                )
                return False
            entry.write(temporary, record)
            if os.path.lexists(path) and not self.remove(path):
                raise OSError(errno.EACCES, f"the old entry {path} cannot be removed")
            self.evict(self.max_bytes - size)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(temporary, path)
            sync_folder(path.parent)
            return True
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def evict(self, max_bytes: int) -> list[str]:
        """Removes entries, the least recently used first, until at most `max_bytes` are left. The lock is held."""
        found = sorted(scan(self.folder), key=order)
        total = sum(each.size for each in found)
        gone = []
        for each in found:
            if total <= max_bytes:
                break
            if self.remove(each.path):
                total -= each.size
                gone.append(each.key)
        return gone

    def remove(self, path: Path) -> bool:
        """Takes an entry away at once, then deletes it. The lock is held."""
        try:
            grave = Path(tempfile.mkdtemp(dir=self.folder / TEMPORARY))
            os.rename(path, grave / "entry")
            delete(grave)
        except OSError:
            # A disk so full that it has no room for another name: delete it where it is.
            delete(path)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        return not os.path.lexists(path)

    def sweep(self) -> None:
        """Deletes what killed processes left: all in `.tmp`, and lock files that nobody holds. The lock is held."""
        for path in (self.folder / TEMPORARY).iterdir():
            delete(path)
        for path in (self.folder / BUILDS).iterdir():
            with self.locked(path, 0) as failure:
                if failure is None:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def refuse(self, error: Refused) -> None:
        warn_once(
            f"entries of the engine cache {self.folder} are refused, because a key is set and a plan is code: {error}. "
            "Such engines are built again"
        )

    def complain(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        warn_once(
            f"the engine cache {self.folder} cannot be written ({reason}): engines are built again in every process. "
            f"Make it writable or free space on its disk, {ELSEWHERE}, or set TRT_DYNAMO_CACHE=off"
        )
