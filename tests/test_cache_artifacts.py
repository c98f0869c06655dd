"""Engines among the artifacts that PyTorch saves and loads: what comes along, and what is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.compiler._cache import CacheArtifactManager

from tests.cache_cases import PLAN, Warned, key, settings
from trt_dynamo.cache import Plan, Store, artifacts, get_or_build, register_cache_artifacts
from trt_dynamo.cache.artifacts import TYPE

register_cache_artifacts()


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    with CacheArtifactManager.with_fresh_cache():
        yield


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    return Warned(caplog)


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(tmp_path / "here", 2**20)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The cache that the environment names, where artifacts are loaded."""
    monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "there"))
    return Store(tmp_path / "there", 2**20)


def saved() -> bytes:
    found = torch.compiler.save_cache_artifacts()
    assert found is not None
    return found[0]


def loaded(data: bytes) -> list[str]:
    """The keys of our artifacts in `data`, which is loaded."""
    info = torch.compiler.load_cache_artifacts(data)
    assert info is not None
    return list(info.artifacts[TYPE])


def test_built_and_used_entries_come_along(here: Store, there: Store) -> None:
    here.put(key(1), PLAN)
    CacheArtifactManager.clear()
    get_or_build(key(1), lambda: pytest.fail("it is there"), settings(here))
    get_or_build(key(2), lambda: Plan(b"two", {"n": 2}), settings(here))
    here.put(key(3), PLAN)
    get_or_build(key(1), lambda: pytest.fail("it is there"), settings(here))
    assert loaded(saved()) == [key(1), key(2), key(3)]
    assert there.get(key(1)) == PLAN
    assert there.get(key(2)) == Plan(b"two", {"n": 2})


def test_no_plan_is_held_in_memory(here: Store) -> None:
    here.put(key(1), PLAN)
    (artifact,) = CacheArtifactManager._new_cache_artifacts[TYPE]
    assert isinstance(vars(artifact)["held"], Store)


def test_what_was_pruned_is_left_out(here: Store, there: Store, warned: Warned) -> None:
    for number in (1, 2):
        here.put(key(number), PLAN)
    here.clear()
    here.put(key(2), PLAN)
    assert loaded(saved()) == [key(1), key(2)]
    assert [entry.key for entry in there.entries()] == [key(2)]
    warned.never()


def test_nothing_is_recorded_without_a_folder(here: Store) -> None:
    get_or_build(key(1), lambda: PLAN, settings(here, cache="off"))
    get_or_build(key(2), lambda: PLAN, settings(here, cache="readonly"))
    assert torch.compiler.save_cache_artifacts() is None


@pytest.mark.parametrize("place", [b"bytes", b"created", b"end 1", PLAN.data[:100]])
def test_damaged_ones_are_left_out(here: Store, there: Store, warned: Warned, place: bytes) -> None:
    """By our own checksums: torch has one around all artifacts only in newer versions."""
    here.put(key(1), PLAN)
    data = bytearray(artifacts.stream_of(key(1), here))
    data[data.index(place) + 4] ^= 1
    artifacts.keep(key(1), bytes(data))
    assert there.entries() == []
    warned.once("left out")


def test_a_wrong_key_is_refused(here: Store, there: Store, warned: Warned) -> None:
    here.put(key(1), PLAN)
    record = here.record(key(1))
    assert record is not None
    artifacts.keep(key(2), artifacts.stream_of(key(1), here))
    artifacts.keep("../" + "0" * 61, artifacts.stream_of(key(1), here))
    assert there.entries() == []
    assert len(warned.texts()) == 2


def test_unsigned_ones_are_refused(here: Store, there: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    here.put(key(1), PLAN)
    data = saved()
    monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", "k" * 32)
    loaded(data)
    assert there.entries() == []
    warned.once("left out", "sign")


def test_what_is_there_stays(here: Store, there: Store) -> None:
    here.put(key(1), PLAN)
    there.put(key(1), Plan(b"other", {}))
    loaded(saved())
    assert there.get(key(1)) == Plan(b"other", {})


def test_a_cache_that_is_off_stays_off(here: Store, there: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    here.put(key(1), PLAN)
    monkeypatch.setenv("TRT_DYNAMO_CACHE", "off")
    loaded(saved())
    assert not there.folder.exists()


FIRST = """
import sys, torch, trt_dynamo
trt_dynamo.register_cache_artifacts()
torch.manual_seed(0)
model = torch.nn.Linear(4, 4).eval()
if len(sys.argv) > 2:
    assert torch.compiler.load_cache_artifacts(open(sys.argv[1], "rb").read()) is not None
options = {"runtime": "reference", "min_segment_nodes": 1, "strict": True}
with torch.no_grad():
    x = torch.ones(2, 4)
    assert torch.allclose(torch.compile(model, backend="tensorrt", options=options)(x), model(x), atol=1e-5)
report = trt_dynamo.report()
assert (report["cache_hits"], report["cache_misses"]) == ((1, 0) if len(sys.argv) > 2 else (0, 1)), report
if len(sys.argv) == 2:
    open(sys.argv[1], "wb").write(torch.compiler.save_cache_artifacts()[0])
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """The second one, with an empty cache and the first one's artifacts, builds nothing."""
    for number, more in enumerate(([], ["load"])):
        folders = {"TRT_DYNAMO_CACHE_DIR": f"{tmp_path}/{number}", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/{number}i"}
        command = [sys.executable, "-c", FIRST, str(tmp_path / "artifacts"), *more]
        subprocess.run(command, env={**os.environ, **folders}, check=True, timeout=300)
