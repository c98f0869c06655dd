"""The execution contexts of an engine: made on demand up to a bound, each used by one thread at a time.

A context stays with one stream, whose order keeps its memory safe, and with one profile, since to change that costs
time on the device. Where there are as many as may be, one of another stream or profile is taken over, in the order of
the device; where all are in use, the call waits for the next.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_dynamo.runtime.calls import Call

if TYPE_CHECKING:
    from trt_dynamo.runtime.engine import Engine

Use = tuple[int, int]  # a stream's handle and a profile


class Contexts:
    """Lends the contexts of the engine that asks, at most so many at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.idle: dict[Use, list[Call]] = collections.defaultdict(list)
        self.all: list[Call] = []
        self.making = 0
        self.waiting = 0
        self.given_back = threading.Condition()

    def give_back(self, call: Call) -> None:
        """Lends it again. An engine does the same at each call, in its own lines."""
        # To append and then to look is enough without the lock: who waits counts itself first, and looks then.
        self.idle[call.stream, call.profile].append(call)
        if self.waiting:
            self.tell()

    def tell(self) -> None:
        """One of those who wait looks again."""
        with self.given_back:
            self.given_back.notify()

    def take(self, engine: Engine, stream: int, profile: int) -> Call:
        """A context for this stream and profile that no other thread uses. An engine looks itself for an idle one."""
        try:
            return self.idle[stream, profile].pop()
        except IndexError:
            return self.take_slowly(engine, stream, profile)

    def take_slowly(self, engine: Engine, stream: int, profile: int) -> Call:
        """A new one, one of another stream or profile, or the next that is given back."""
        with self.given_back:
            while len(self.all) + self.making >= self.most:
                self.waiting += 1
                try:
                    call = self.pop(self.by_fit(stream, profile))
                    if call is None:
                        self.given_back.wait()
                        continue
                finally:
                    self.waiting -= 1
                if (call.stream, call.profile) != (stream, profile):
                    engine.turn(call, stream, profile)
                return call
            self.making += 1
        made = None
        try:
            made = engine.make_call(stream, profile)
        finally:
            with self.given_back:
                self.making -= 1
                if made is not None:
                    self.all.append(made)
        return made

    def withdraw(self, stream: int, profile: int) -> Call | None:
        """A context of this profile that nobody uses, and that is not lent again; None if there is none."""
        with self.given_back:
            uses = [use for use in self.by_fit(stream, profile) if use[1] == profile]
            call = self.pop(uses)
            if call is not None:
                self.all.remove(call)
        return call

    def readmit(self, call: Call) -> None:
        """Takes a context back that was withdrawn."""
        with self.given_back:
            self.all.append(call)
        self.give_back(call)

    def by_fit(self, stream: int, profile: int) -> list[Use]:
        return sorted([*self.idle], key=lambda use: (use != (stream, profile), use[1] != profile))

    def pop(self, uses: Sequence[Use]) -> Call | None:
        """A context that nobody uses: other threads may take and bring some meanwhile."""
        for use in uses:
            try:
                return self.idle[use].pop()
            except IndexError:
                continue
        return None
