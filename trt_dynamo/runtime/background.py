"""Builds that run beside the calls: one at a time, in the order in which they were asked for, in a thread that is there
only while there is work.

When the interpreter ends, what has not begun never begins, a build in progress is called off, and the rest (a plan that
is being stored) is waited for, but not for long.
"""

from __future__ import annotations

import atexit
import collections
import logging
import threading
import time
from collections.abc import Callable

from trt_dynamo import shutdown
from trt_dynamo.processes import renewed_in_children

log = logging.getLogger(__name__)

# How many seconds the end of the interpreter waits for what a build still does, and for TensorRT within a step.
PATIENCE = 5.0
TENSORRT_PATIENCE = 300.0


class Builds:
    """What is to be done beside the calls, and the thread that does it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: collections.deque[Callable[[], None]] = collections.deque()
        self.worker: threading.Thread | None = None

    def add(self, work: Callable[[], None]) -> None:
        with self.changed:
            if shutdown.ENDING.is_set():
                return
            self.waiting.append(work)
            if self.worker is not None:
                return
            # A daemon, so that a build that hangs cannot keep the interpreter from its end.
            worker = threading.Thread(target=self.run, name="trt_dynamo-build", daemon=True)
            try:
                worker.start()  # it waits for `changed`
            except RuntimeError as error:  # too many threads, or from Python 3.12 on, the interpreter ends
                log.warning("builds wait until another is asked for, no thread can be started: %s", error)
                return
            self.worker = worker

    def run(self) -> None:
        while True:
            with self.changed:
                if not self.waiting or shutdown.ENDING.is_set():
                    self.waiting.clear()
                    self.worker = None
                    self.changed.notify_all()
                    return
                work = self.waiting.popleft()
            try:
                work()
            except BaseException:
                # Nobody waits for it, and the builds behind it must still be done.
                log.exception("an error in a build in the background")
            del work

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to do, `timeout` seconds at most. True if nothing is."""
        with self.changed:
            return self.changed.wait_for(lambda: self.worker is None, timeout)


builds = Builds()


def run_in_background(work: Callable[[], None]) -> None:
    """Runs `work`, which handles its own errors, as soon as the builds before it are done."""
    prepare_for_the_end()
    builds.add(work)


def wait_for_builds(timeout: float | None = None) -> bool:
    """Waits until no build runs in the background, `timeout` seconds at most. True if none does."""
    return builds.wait(timeout)


def prepare_for_the_end() -> None:
    # At each first build, not at import. Registering again moves it behind what others have registered since.
    atexit.unregister(end)
    atexit.register(end)


def end() -> None:
    """Calls off the builds; runs when the interpreter ends, while other threads can still work."""
    shutdown.ENDING.set()
    if wait_for_builds(PATIENCE):
        return
    worker, end = builds.worker, time.monotonic() + TENSORRT_PATIENCE
    if worker is not None and worker.ident in shutdown.IN_TENSORRT:
        log.warning("the program ends when TensorRT comes to the end of a step of a build, which cannot be called off")
        while worker.ident in shutdown.IN_TENSORRT and time.monotonic() < end:
            time.sleep(0.05)
        wait_for_builds(PATIENCE)


@renewed_in_children
def forget() -> None:
    """In a forked process there is no thread that builds: it starts with nothing to do."""
    global builds
    builds = Builds()
