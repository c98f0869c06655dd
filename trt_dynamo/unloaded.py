"""Engines that are made for other machines and not loaded here. In: keys and plans, as engines are made. Out: a list of
them, and something in an engine's place that answers no call.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(eq=False)
class Unloaded:
    """An engine in the cache: its key, the bytes of its plan, and whether it was there before (`hit`)."""

    key: str
    size: int
    hit: bool
    made_otherwise: str = ""
    built_for: Any = None
    refittable: bool = False

    def take_weights(self, positions: Sequence[int]) -> None:
        """It takes its weights as inputs, of which nobody here gives any."""

    def use_cuda_graphs(self, name: str, kept: int, warm: int) -> None:
        """It is not called, so there is nothing to capture."""


UNLOADED: contextvars.ContextVar[list[Unloaded] | None] = contextvars.ContextVar("engines not loaded", default=None)


@contextlib.contextmanager
def not_loading() -> Iterator[list[Unloaded]]:
    """Inside, engines that this thread makes are only stored, and added to the list."""
    made: list[Unloaded] = []
    token = UNLOADED.set(made)
    try:
        yield made
    finally:
        UNLOADED.reset(token)


def loading() -> bool:
    """Whether engines are made for this machine."""
    return UNLOADED.get() is None


def unloaded(key: str, size: int, hit: bool) -> Any:
    """What stands for the engine, if engines are not to be loaded; None otherwise."""
    made = UNLOADED.get()
    if made is None:
        return None
    made.append(Unloaded(key, size, hit))
    return made[-1]
