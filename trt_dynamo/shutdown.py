"""The end of the program, which a build must not outlive, and interrupts, which must not be lost in one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Set when the interpreter begins to end: builds are called off.
ENDING = threading.Event()

# Threads inside a build of TensorRT's. Between its steps it can be called off; in the midst of one, which may compile a
# whole subgraph, it cannot, and when Python is gone its next word to Python would abort the process.
IN_TENSORRT: set[int] = set()


@contextlib.contextmanager
def in_tensorrt() -> Iterator[None]:
    """Marks this thread as one that the end of the program must wait for."""
    IN_TENSORRT.add(threading.get_ident())
    try:
        yield
    finally:
        IN_TENSORRT.discard(threading.get_ident())


@contextlib.contextmanager
def signals_kept() -> Iterator[list[BaseException]]:
    """What signal handlers raise inside the block goes into the list, and is raised behind the block.

    TensorRT calls Python from its builder, there handlers run too, and an exception such as KeyboardInterrupt ends in
    TensorRT, which prints it and goes on. Handlers run in the main thread only; elsewhere nothing is done.
    """
    raised: list[BaseException] = []
    replaced: dict[int, tuple[Any, Any]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                replaced[number] = (handler, keeping(handler, raised))
                signal.signal(number, replaced[number][1])
    try:
        yield raised
    finally:
        for kept, (handler, ours) in replaced.items():
            if signal.getsignal(kept) is ours:  # else the handler has put another in its place
                signal.signal(kept, handler)
        if raised:
            raise raised[0]


def keeping(handler: Callable[[int, Any], Any], raised: list[BaseException]) -> Callable[[int, Any], None]:
    """The signal handler, with what it raises kept."""

    def ours(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except BaseException as error:  # noqa: BLE001  raised again behind the block
            raised.append(error)

    return ours
