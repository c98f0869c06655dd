"""Plans that a compiled module brings along, beside the cache. In: keys and plans, as engines are made. Out: the plans
that its file has, and those to write into its next.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

from trt_dynamo.cache.entry import Plan
from trt_dynamo.errors import FileError


@dataclasses.dataclass
class Carried:
    """Plans by key. `lacks` is told of each that is not among `plans`; `refused` is the error by which it forbids to
    make it."""

    plans: dict[str, Plan] = dataclasses.field(default_factory=dict)
    lacks: Callable[[], None] = lambda: None
    refused: FileError | None = None

    def find(self, key: str) -> Plan | None:
        plan = self.plans.get(key)
        if plan is None:
            self.lacks()
        return plan


CARRIED: contextvars.ContextVar[Carried | None] = contextvars.ContextVar("plans brought along", default=None)


@contextlib.contextmanager
def carrying(carried: Carried) -> Iterator[None]:
    """Inside, engines are made of these plans where they fit, and all others are added to them."""
    token = CARRIED.set(carried)
    try:
        yield
    finally:
        CARRIED.reset(token)
