"""Work that a few threads share for a moment, such as hashing and reading, for which Python needs no lock.

In: a function and items, or functions one after another. Out: the results in order, or the first error. When the caller
goes on, the threads are gone. Where none can be started, the caller does it all.
"""

from __future__ import annotations

import collections
import os
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# More share one memory; and a thread is not worth starting for less than so many bytes.
MOST_THREADS = 4
BYTES_PER_THREAD = 2**21


def shared(function: Callable[[T], R], items: Sequence[T], sizes: Sequence[int]) -> list[R]:
    """`function` of each item, in order. `sizes` are the bytes that each has to go through; the largest come first.

    Raises:
        BaseException: the first that `function` raises, in whatever thread; no other item is begun then.
    """
    count = min(processors(), MOST_THREADS, len(items), sum(sizes) // BYTES_PER_THREAD)
    if count < 2:
        return [function(item) for item in items]
    results: dict[int, R] = {}
    errors: list[BaseException] = []
    waiting = collections.deque(sorted(range(len(items)), key=lambda index: -sizes[index]))

    def work() -> None:
        try:
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:
                    return
                results[index] = function(items[index])
        except BaseException as error:  # noqa: BLE001  raised below
            waiting.clear()
            errors.append(error)

    helpers = [helper for _ in range(count - 1) if (helper := started(work)) is not None]
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]


class Behind:
    """Runs functions one after another in a thread behind the caller; leaving waits for them. `size` is how many bytes
    they go through.

    Raises, on leaving: the first error of a function, unless the caller has one of its own; none is begun after it.
    """

    def __init__(self, size: int) -> None:
        self.functions: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.size = size
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Behind:
        if self.size >= 2 * BYTES_PER_THREAD and processors() > 1:
            self.thread = started(self.work)
        return self

    def run(self, function: Callable[[], Any]) -> None:
        if self.thread is None:
            function()
        else:
            self.functions.put(function)

    def work(self) -> None:
        while (function := self.functions.get()) is not None:
            if self.errors:
                continue
            try:
                function()
            except BaseException as error:  # noqa: BLE001  raised when the caller leaves
                self.errors.append(error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.thread is None:
            return
        if error is not None:
            self.errors.append(error)  # what waits is not begun
        self.functions.put(None)
        self.thread.join()
        if error is None and self.errors:
            raise self.errors[0]


def started(work: Callable[[], None]) -> threading.Thread | None:
    """A thread that does the work, or None: there are too many, or the interpreter is ending."""
    thread = threading.Thread(target=work, name="trt_dynamo-side", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
