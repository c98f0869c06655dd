"""Forked children: a child has none of its parent's threads, and must not touch the engines of its parent.

Comes in: the modules that hold engines, and the functions that make locks anew. Goes out: in a child, modules without
engines, free locks, and the reason why the child cannot build, if it cannot. Costs nothing until a fork.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from trt_dynamo import shutdown

INHERITED = (
    "this process was forked while another thread of its parent was building an engine, and TensorRT's own locks have "
    "stayed locked: it cannot build here. Fork at another time, or start processes by spawn"
)


class HoldsEngines(Protocol):
    """What can give up its engines, as a `SegmentEngines` does."""

    def leave_to_parent(self) -> object:
        """Forgets all engines, makes new locks, and gives back what was forgotten."""


LIVING: weakref.WeakSet[HoldsEngines] = weakref.WeakSet()
RENEWALS: list[Callable[[], None]] = []
LEFT: list[object] = []  # the parent's; in a child, nothing ever destroys it
cannot_build: list[str] = []  # why this process cannot, at most one reason


def renewed_in_children(renew: Callable[[], None]) -> Callable[[], None]:
    """Decorates a function without arguments that makes a module's locks anew: each forked child calls it."""
    RENEWALS.append(renew)
    return renew


def forget_in_children(module: HoldsEngines) -> None:
    """From now on the module leaves its engines to the parent in each child. Holds it weakly."""
    watch_forks()
    LIVING.add(module)


@functools.cache
def watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=start_anew)


def start_anew() -> None:
    """What happens in a child, before anything else in it."""
    others = shutdown.IN_TENSORRT - {threading.get_ident()}
    shutdown.IN_TENSORRT.clear()
    if others and not cannot_build:
        cannot_build.append(INHERITED)
        end_without_destructors()
    for renew in RENEWALS:
        renew()
    if not LEFT:
        # To destroy a CUDA object of the parent's crashes the child, at its end too, when Python clears its modules.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(LEFT))
    LEFT.append([module.leave_to_parent() for module in list(LIVING)])


def end_without_destructors() -> None:
    """Ends this process, when it ends, before the C++ destructors of its libraries: TensorRT's crash after such a
    fork. Python is finalized by then, and the exit status stays.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)
