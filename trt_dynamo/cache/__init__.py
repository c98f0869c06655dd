"""The engine cache. In: a segment's key and a function that builds its plan. Out: the plan, from the disk or the
remote tier where it is there.

Nothing here knows TensorRT: a plan is bytes with a description. A disk that is full, read-only or not trusted, and a
remote that fails, cost the cache, with one warning, and never the run; an error of the build itself passes through
untouched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from trt_dynamo.cache.artifacts import register_cache_artifacts
from trt_dynamo.cache.carried import CARRIED
from trt_dynamo.cache.entry import Plan, Record, recorded
from trt_dynamo.cache.inventory import Entry
from trt_dynamo.cache.key import digest, digests, segment_key
from trt_dynamo.cache.remote import Remote, open_remote, without_password
from trt_dynamo.cache.signing import Signing, signing_of
from trt_dynamo.cache.store import Store
from trt_dynamo.settings import Settings

__all__ = [
    "Entry",
    "Plan",
    "Store",
    "digest",
    "digests",
    "get_or_build",
    "open_store",
    "register_cache_artifacts",
    "segment_key",
    "without_password",
]


def get_or_build(
    key: str, build: Callable[[], Plan], settings: Settings, others: Callable[[], Sequence[str]] = tuple
) -> tuple[Plan, bool]:
    """The plan for `key`, and whether it came from the cache, or from the file of the module that is being loaded.

    `others` gives the keys of plans that serve as well, and is only asked where the plan for `key` is not in the
    folder.
    Another process that builds or fetches the same key is waited for, within bounds. The manifest comes back as JSON
    gives it (tuples are lists, keys are strings), from a build as from the cache, so that a hit is never different from
    a miss.

    Raises:
        TypeError: `build` gave a manifest that JSON cannot hold.
        Exception: whatever `build` raises.
    """
    carried = CARRIED.get()
    if carried is None:
        return cached_or_built(key, build, settings, others)
    found = carried.find(key)
    if found is not None:
        return found, True
    carried.plans[key], hit = cached_or_built(key, build, settings, others)
    return carried.plans[key], hit


def cached_or_built(
    key: str, build: Callable[[], Plan], settings: Settings, others: Callable[[], Sequence[str]]
) -> tuple[Plan, bool]:
    """The plan from the cache, else built and cached."""
    if settings.cache == "off":
        return build().as_stored(), False
    store = open_store(settings)
    wanted = settings.cache != "refresh"
    if wanted and (plan := store.get(key)) is not None:
        return plan, True
    keys = [key, *(others() if wanted else ())]
    for other in keys[1:]:
        if (plan := store.get(other)) is not None:
            return plan, True
    # Without the key for signatures there is no cache at all.
    remote = None if store.signing.problem else open_remote(settings)
    if store.readonly:
        record = fetched(remote, keys, store.signing)
        return (build().as_stored(), False) if record is None else (record.plan, True)
    with store.building(key) as waited:
        if wanted and waited and (plan := store.get(key)) is not None:
            return plan, True
        if wanted and (record := fetched(remote, keys, store.signing)) is not None:
            store.put_record(record)
            return record.plan, True
        record = recorded(key, build().as_stored(), store.signing)
        store.put_record(record)
        if remote is not None:
            remote.put(record)
    return record.plan, False


def fetched(remote: Remote | None, keys: Sequence[str], signing: Signing) -> Record | None:
    """The first of these entries that the remote has."""
    if remote is None:
        return None
    return next((record for key in keys if (record := remote.get(key, signing)) is not None), None)


def open_store(settings: Settings) -> Store:
    """The store that these settings name. The disk is first touched when it is used, but for the file with the key."""
    folder = settings.cache_dir or default_folder()
    readonly = settings.cache == "readonly"
    return Store(folder.absolute(), settings.cache_size, readonly=readonly, signing=signing_of(settings))


def default_folder() -> Path:
    """The user's cache folder for trt_dynamo; without a home folder, one of this user's in the temporary folder."""
    folder = platformdirs.user_cache_path("trt_dynamo", appauthor=False)
    if folder.is_absolute():
        return folder
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir(), f"trt_dynamo-{user}")
