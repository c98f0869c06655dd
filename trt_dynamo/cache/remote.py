"""The remote tier: entries that many machines share, behind each machine's folder. In: an fsspec URL. Out: entries, or
one warning.

An entry is one object, `<URL>/<key>.engine`, so that whoever reads sees all of it or none, and it is checked like one
from the disk. Whatever the other side does (nothing, for minutes; errors; no rights to write) costs the cache and never
the run: a read has a time limit, uploads run behind the program, and after a failure the remote is left alone for a
while.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.entry import Record
from trt_dynamo.cache.packing import packed, unpacked
from trt_dynamo.cache.signing import Signing
from trt_dynamo.errors import in_a_line
from trt_dynamo.settings import Settings, warn_once

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long a remote is left alone after a failure, and how much may wait to be uploaded.
PAUSE_SECONDS = 300.0
PENDING_BYTES = 2 * 2**30

# After how long a file in a shared folder is no longer being written.
LEFT_SECONDS = 24 * 3600.0

EXTRA = "`pip install 'trt-dynamo[remote]'` brings fsspec and s3fs; other stores need their own package"


class Errands:
    """Runs functions one after another, in a thread that does not keep the program from its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def add(self, run: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            with self.lock:
                if self.thread is None:
                    thread = threading.Thread(target=self.work, name=self.name, daemon=True)
                    thread.start()
                    self.thread = thread
        except RuntimeError as error:  # too many threads, or the interpreter is ending
            future.set_exception(error)
            return future
        self.waiting.put((run, future))
        return future

    def work(self) -> None:
        while (errand := self.waiting.get()) is not None:
            run, future = errand
            try:
                future.set_result(run())
            except Exception as error:  # noqa: BLE001  told to whoever waits for the future
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001  it must not end the waiting thread
                future.set_exception(RuntimeError(repr(error)))
            del errand, run, future

    def end(self) -> None:
        """Lets the thread end behind what is already to be done."""
        self.waiting.put(None)


class Unusable(Exception):
    """No file system can be had for the URL, now or later; the text says why."""


@dataclasses.dataclass
class Way:
    """One direction, reading or writing: its thread, and when it is worth a try again."""

    name: str
    consequence: str
    errands: Errands
    closed_until: float = 0.0
    warned: bool = False

    @property
    def open(self) -> bool:
        return time.monotonic() >= self.closed_until


class Remote:
    """The cache behind `url`. Every method is safe across threads; `get` waits at most `seconds`."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url = url
        self.shown = without_password(url)
        self.seconds = seconds
        self.reading = Way("read", "engines are built here", Errands("trt_dynamo-download"))
        self.writing = Way("written", "other machines do not get this one's engines", Errands("trt_dynamo-upload"))
        self.lock = threading.Lock()
        self.telling = threading.RLock()
        self.pending: dict[Future[None], int] = {}
        self.complained = False

    def get(self, key: str, signing: Signing) -> Record | None:
        """The entry for `key`; None where it is not there, not to be had in time, damaged or refused."""
        if not self.reading.open:
            return None
        began = time.monotonic()
        asked = self.reading.errands.add(functools.partial(self.download, key))
        try:
            data = asked.result(self.seconds)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  each file system has errors of its own
            if asked.done():
                self.fail(self.reading, error)
            else:
                self.fail(self.reading, TimeoutError(f"no answer within {self.seconds:g} s"), stuck=True)
            return None
        try:
            record = unpacked(data, key, signing)
        except Damaged as error:
            self.complain(key, error)
            return None
        seconds = time.monotonic() - began
        log.info("the engine %s came from %s: %d bytes in %.2f s", key, self.shown, len(data), seconds)
        return record

    def put(self, record: Record) -> None:
        """Uploads the entry behind the caller's back."""
        if not self.writing.open:
            return
        with self.lock:
            waiting = sum(self.pending.values())
            crowded = waiting > 0 and waiting + record.size > PENDING_BYTES
            if not crowded:
                upload = self.writing.errands.add(functools.partial(self.upload, record))
                self.pending[upload] = record.size
        if crowded:
            warn_once(
                f"the remote cache {self.shown} takes engines more slowly than they are built: other machines do not "
                "get all of this one's engines"
            )
            return
        with contextlib.suppress(RuntimeError):  # the end is here already
            finish_at_the_end()
        upload.add_done_callback(self.uploaded)

    def fail(self, way: Way, error: BaseException, *, stuck: bool = False) -> None:
        """Leaves one direction alone for a while, and says so the first time; what closes both is said once."""
        with self.lock:
            now = time.monotonic()
            known = way.warned or any(not other.open for other in (self.reading, self.writing) if other is not way)
            way.closed_until, way.warned = now + PAUSE_SECONDS, True
            if stuck:  # its thread may never come back
                way.errands.end()
                way.errands = Errands(way.errands.name)
            if isinstance(error, Unusable):
                self.reading.closed_until = self.writing.closed_until = math.inf
        reason = in_a_line(error).replace(self.url, self.shown)
        if isinstance(error, Unusable):
            text = f"the remote cache {self.shown} is not used: {reason}"
        else:
            later = f"it is tried again after {PAUSE_SECONDS / 60:.0f} minutes"
            text = f"the remote cache {self.shown} cannot be {way.name} ({reason}): {way.consequence}; {later}"
        log.log(logging.INFO if known else logging.WARNING, "%s", text)

    def finish(self, seconds: float | None = None) -> bool:
        """Waits until every upload is done or has failed, by default as long as `get` would. False: some are left."""
        with self.lock:
            pending = [*self.pending]
        done, left = wait(pending, self.seconds if seconds is None else seconds)
        # A future tells its waiters before its callbacks.
        for future in done:
            self.uploaded(future)
        if left:
            self.fail(self.writing, TimeoutError(f"{len(left)} uploads were not done in time"), stuck=True)
        return not left

    def uploaded(self, upload: Future[None]) -> None:
        # What is no longer pending has been told of: `finish` relies on it.
        with self.telling:
            error = upload.exception()
            if error is not None and upload in self.pending:
                self.fail(self.writing, error)
            with self.lock:
                self.pending.pop(upload, None)

    def download(self, key: str) -> bytes:
        files, root = self.file_system()
        data: bytes = files.cat_file(f"{root}/{key}.engine")
        return data

    def upload(self, record: Record) -> None:
        if not self.writing.open:
            return  # one before it has failed
        files, root = self.file_system()
        path, data = f"{root}/{record.key}.engine", packed(record)
        if is_local(files):
            write_at_once(Path(path), data)
        else:
            files.pipe_file(path, data)

    def file_system(self) -> tuple[Any, str]:
        """The file system and the path in it. fsspec keeps one for each thread.

        Raises:
            Unusable: a package for it is missing, or the URL is none.
        """
        try:
            import fsspec  # type: ignore[import-untyped, unused-ignore]

            files, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise Unusable(f"{in_a_line(error)}; {EXTRA}") from None
        return files, str(root).rstrip("/")

    def complain(self, key: str, error: Damaged) -> None:
        if not self.complained:
            self.complained = True
            log.warning(
                "the remote cache %s has entries of no use, which are built again, the first of them %s: %s",
                self.shown, key, error,
            )  # fmt: skip


def write_at_once(path: Path, data: bytes) -> None:
    """Writes a file of a shared folder, whose content appears whole, and removes what killed processes left there.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()


def is_local(files: Any) -> bool:
    protocol = files.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def without_password(url: str) -> str:
    """A URL as it may be printed."""
    return re.sub(r"(://[^/:]*):[^/]*@", r"\1:***@", url)


def open_remote(settings: Settings) -> Remote | None:
    """The remote that these settings name, one object for the whole process."""
    if settings.cache_remote is None:
        return None
    return remote_of(settings.cache_remote, settings.cache_remote_seconds, os.getpid())


@functools.cache
def remote_of(url: str, seconds: float, process: int) -> Remote:
    """A fork has a remote of its own: threads do not live on in it."""
    remote = Remote(url, seconds)
    REMOTES.append((process, remote))
    return remote


REMOTES: list[tuple[int, Remote]] = []


@functools.cache
def finish_at_the_end() -> None:
    """Has the end of the program wait for uploads, while pools of threads (asyncio's, for names of hosts) still work.

    `atexit` comes when they no longer take anything. concurrent.futures ends its pools by the same private function,
    in the reverse order.
    """
    importlib.import_module("concurrent.futures.thread")  # its end must come after ours
    register = getattr(threading, "_register_atexit", atexit.register)
    register(finish_uploads)


def finish_uploads() -> None:
    """Waits for the uploads of this process, but not for long."""
    for process, remote in REMOTES:
        if process == os.getpid():
            remote.finish()
