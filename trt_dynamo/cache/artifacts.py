"""Entries in what `torch.compiler.save_cache_artifacts()` saves.

Comes in: the keys of the entries that this process used, with the store that has them. Goes out: artifacts of
PyTorch's. One reads its entry when it is saved, so that no plan is held in memory until then; where it is loaded it
stores the entry, checked as one from anywhere else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.packing import packed, unpacked
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.settings import Settings, warn_once

if TYPE_CHECKING:
    from trt_dynamo.cache.store import Store

log = logging.getLogger(__name__)

TYPE = "trt_dynamo_entry"

LOCK = threading.Lock()
# Tells torch of an entry; None until the user asks for it, since torch then refuses to load what it saved in a process
# that has not asked.
RECORDERS: list[Callable[[str, Store], None]] = []


def register_cache_artifacts() -> None:
    """Engines take part in `torch.compiler.save_cache_artifacts()` and `load_cache_artifacts()` from now on.

    To be called in the process that saves, before it compiles, and in the one that loads, before it loads: torch loads
    nothing at all where it does not know one of the artifacts. What is loaded goes into the cache's folder that the
    environment names.

    Raises:
        TrtDynamoError: this torch keeps its artifacts in another way.
    """
    with LOCK:
        if not RECORDERS:
            RECORDERS.append(make_recorder())


def note(key: str, store: Store) -> None:
    """Says that this process uses the entry `key` of `store`."""
    for record in RECORDERS:
        record(key, store)


def make_recorder() -> Callable[[str, Store], None]:
    try:
        from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager
    except ImportError as error:
        raise TrtDynamoError(f"this torch keeps its cache artifacts in another way: {error}") from error

    class EntryArtifact(CacheArtifact):
        """An entry: a stream of bytes where it was loaded, a store that has it where it was recorded."""

        @staticmethod
        def type() -> str:
            return TYPE

        @staticmethod
        def encode(content: Any) -> Any:
            return content

        @property
        def content(self) -> bytes:  # type: ignore[override, unused-ignore]
            held = vars(self)["held"]
            return held if isinstance(held, bytes) else stream_of(self.key, held)

        @content.setter
        def content(self, held: bytes | Store) -> None:
            vars(self)["held"] = held

        def __eq__(self, other: object) -> bool:
            return isinstance(other, EntryArtifact) and self.key == other.key

        def __hash__(self) -> int:
            return hash((TYPE, self.key))

        def populate_cache(self) -> None:
            keep(self.key, self.content)

    CacheArtifactFactory.register(EntryArtifact)

    def record(key: str, store: Store) -> None:
        CacheArtifactManager.record_artifact(TYPE, key, store)

    return record


def stream_of(key: str, store: Store) -> bytes:
    """The entry as a stream; nothing where it is gone by now."""
    record = store.record(key)
    if record is None:
        log.info("the entry %s is no longer in the cache, and so not among the artifacts", key)
        return b""
    return packed(record)


def keep(key: str, data: bytes) -> None:
    """Stores the entry in this stream in the cache that the environment names, if it is whole."""
    from trt_dynamo.cache import open_store

    settings = Settings.from_env()
    if not data or settings.cache == "off":
        return
    store = open_store(settings)
    try:
        if store.record(key) is None:
            store.put_record(unpacked(data, key, store.signing))
    except (Damaged, ValueError) as error:
        warn_once(f"an engine among the artifacts that are loaded is left out: {error}")
