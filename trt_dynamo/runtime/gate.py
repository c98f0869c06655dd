"""A gate for the host: any number of threads enqueue work to an engine, or one changes the engine and nobody enqueues.

A call pays two short locked steps, well under a microsecond; TensorRT's own work runs outside of the lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """`enter` and `leave` around a call; `closed` around a change, which waits for the calls inside and goes before
    those that come.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()  # of those who change the engine
        self.lock = threading.Lock()
        self.moved = threading.Condition(self.lock)
        self.inside = 0
        self.closing = False

    def enter(self) -> None:
        with self.lock:
            while self.closing:
                self.moved.wait()
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.closing and not self.inside:
                self.moved.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Alone with the engine."""
        with self.turn:
            with self.lock:
                self.closing = True
                while self.inside:
                    self.moved.wait()
            try:
                yield
            finally:
                with self.lock:
                    self.closing = False
                    self.moved.notify_all()
