"""Why an engine is not in the cache although its graph was seen before: what it was made with then, and now.

Comes in: the key of a segment's graph alone, and all else that shapes its engine. Goes out: what differs, in words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from trt_dynamo.cache import open_store
from trt_dynamo.settings import Settings

# How each graph's engines of this process were made.
MADE: dict[str, list[Mapping[str, str]]] = {}
GRAPHS_KEPT = 1000


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an engine is made of: `graph` is the key of the graph and its sizes alone, `made_with` all else by name."""

    graph: str
    made_with: Mapping[str, str]

    def manifest(self) -> dict[str, Any]:
        """For the cache's entry, as JSON."""
        return {"graph": self.graph, "made_with": dict(self.made_with)}

    def note(self) -> None:
        """Remembers an engine of this process."""
        if len(MADE) >= GRAPHS_KEPT:
            MADE.clear()
        known = MADE.setdefault(self.graph, [])
        if self.made_with not in known:
            known.append(self.made_with)

    def what_changed(self, settings: Settings) -> str:
        """How the nearest engine of the same graph, in this process or the cache, was made otherwise; nothing where
        there is none.
        """
        others = [made for made in made_before(self.graph, settings) if made != self.made_with]
        nearest = min((differences(made, self.made_with) for made in others), key=len, default=[])
        return "; ".join(nearest)


def made_before(graph: str, settings: Settings) -> Iterator[Mapping[str, str]]:
    yield from MADE.get(graph, [])
    if settings.cache == "off":
        return
    for entry in open_store(settings).entries():
        origin = entry.manifest.get("origin")
        if isinstance(origin, dict) and origin.get("graph") == graph and isinstance(origin.get("made_with"), dict):
            yield origin["made_with"]


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, by name; what says nothing to a reader (a digest) without its values."""
    found = []
    for name in sorted({*then, *now}):
        before, after = then.get(name, "nothing"), now.get(name, "nothing")
        if before != after:
            found.append(f"other {name}" if len(before) == len(after) == 64 else f"{name} {after}, was {before}")
    return found
