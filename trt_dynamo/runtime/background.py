"""Builds that run beside the calls: one at a time, in a thread that ends with the interpreter and leaves nothing half
done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

ONE_AT_A_TIME = threading.Lock()
RUNNING: set[threading.Thread] = set()


def interpreter_ends() -> bool:
    """Whether the program is over: what has not begun shall not begin; a build in progress is waited for."""
    return not threading.main_thread().is_alive()


def run_in_background(work: Callable[[], None]) -> None:
    """Runs `work`, which handles its own errors, as soon as the builds before it are done."""

    def run() -> None:
        try:
            with ONE_AT_A_TIME:
                if not interpreter_ends():
                    work()
        finally:
            RUNNING.discard(threading.current_thread())

    # Not a daemon: the interpreter waits for it, and TensorRT is not torn down under a build.
    thread = threading.Thread(target=run, name="trt_dynamo-build")
    RUNNING.add(thread)
    thread.start()


def wait_for_builds(timeout: float | None = None) -> bool:
    """Waits until no build runs in the background, `timeout` seconds at most. True if none does."""
    end = None if timeout is None else time.monotonic() + timeout
    for thread in list(RUNNING):
        thread.join(None if end is None else max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in list(RUNNING))
