"""The cache's folder: what is stored comes back, what is damaged does not, and no disk ever stops a run."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

import trt_dynamo
from tests.cache_cases import DAMAGES, PLAN, Builder, Warned, flip, key, reseal, settings
from tests.compiled import in_threads
from trt_dynamo.cache import Plan, Store, entry, get_or_build, open_store, store
from trt_dynamo.cache.disk import Damaged
from trt_dynamo.reports import reset_report
from trt_dynamo.runtime.background import wait_for_builds
from trt_dynamo.settings import Settings


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10**9)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Warned]:
    """Every warning must be expected: those that no test asked for fail it."""
    each = Warned(caplog)
    yield each
    each.never()


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()}


class TestRoundTrip:
    def test_what_is_put_comes_back(self, cache: Store, warned: Warned) -> None:
        assert cache.get(key(1)) is None
        assert not cache.folder.exists(), "a look must not make the folder"
        assert cache.put(key(1), PLAN)
        assert cache.get(key(1)) == PLAN
        assert Store(cache.folder, 1).get(key(1)) == PLAN
        assert cache.get(key(2)) is None
        assert cache.put(key(1), Plan(b"", {}))
        assert cache.get(key(1)) == Plan(b"", {})

    def test_layout(self, cache: Store, warned: Warned) -> None:
        old = os.umask(0)
        try:
            cache.put(key(1), PLAN)
        finally:
            os.umask(old)
        folder = cache.folder / key(1)[:2] / key(1)
        assert sorted(path.name for path in folder.iterdir()) == ["entry.json", "plan"]
        assert (folder / "plan").read_bytes() == PLAN.data
        header = json.loads((folder / "entry.json").read_text())
        assert header["key"] == key(1)
        assert header["manifest"] == PLAN.manifest
        assert header["plan"]["bytes"] == len(PLAN.data)
        assert modes(cache.folder) == {0o700}
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert list((cache.folder / ".tmp").iterdir()) == []

    def test_all_is_on_the_disk_before_it_has_a_name(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        sync, rename = os.fsync, os.rename

        def noted_sync(descriptor: int) -> None:
            steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            sync(descriptor)

        def noted_rename(source: Path, target: Path) -> None:
            steps.append(f"rename {Path(source).name}")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(os, "rename", noted_rename)
        cache.put(key(1), PLAN)
        plan, header, temporary, renamed, shard = steps
        assert (plan, header) == ("plan", "entry.json")
        assert renamed == f"rename {temporary}"
        assert shard == key(1)[:2]

    @pytest.mark.parametrize("bad", ["", "k", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
    def test_only_keys_are_keys(self, cache: Store, bad: str) -> None:
        for use in (cache.get, lambda name: cache.put(name, PLAN), lambda name: cache.building(name).__enter__()):
            with pytest.raises(ValueError, match="not a key"):
                use(bad)

    def test_entries_are_listed_for_people(self, cache: Store, warned: Warned) -> None:
        before = int(time.time())
        assert cache.entries() == []
        for number in (1, 2, 3):
            cache.put(key(number), PLAN)
        cache.get(key(1))
        (cache.path(key(2)) / "entry.json").write_text("{}")
        entries = cache.entries()
        assert {each.key for each in entries} == {key(1), key(2), key(3)}
        assert entries[-1].key == key(3)
        whole = {each.key: each for each in entries}
        assert whole[key(1)].size == sum(path.stat().st_size for path in cache.path(key(1)).iterdir())
        assert before <= whole[key(1)].created <= whole[key(1)].used <= time.time()
        assert whole[key(1)].summary == "1 inputs, 2 outputs"
        assert whole[key(1)].versions.keys() == {"trt-dynamo", "torch"}
        assert whole[key(1)].version == whole[key(1)].versions["trt-dynamo"]
        assert "damaged" in whole[key(2)].summary
        assert cache.size() == sum(each.size for each in entries)

    def test_what_is_not_ours_is_let_be(self, cache: Store, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        outside = cache.folder.parent / "outside"
        (outside / ("ef" + "0" * 62)).mkdir(parents=True)
        (outside / ("ef" + "0" * 62) / "precious").write_text("x")
        (cache.folder / "ef").symlink_to(outside)
        for name in ("notes.txt", "ab", f"{key(1)[:2]}/notes.txt"):
            (cache.folder / name).write_text("mine")
        (cache.folder / "abc" / key(2)).mkdir(parents=True)
        assert cache.clear() == [key(1)]
        assert (outside / ("ef" + "0" * 62) / "precious").exists()
        for name in ("notes.txt", "ab", f"{key(1)[:2]}/notes.txt", f"abc/{key(2)}"):
            assert (cache.folder / name).exists()
        assert cache.entries() == []

    def test_clear_and_prune_without_a_folder(self, cache: Store, warned: Warned) -> None:
        assert [*cache.clear(), *cache.prune(), *cache.verify(), *cache.entries()] == []
        assert cache.size() == 0
        assert not cache.folder.exists()


class TestModes:
    def test_on(self, cache: Store, warned: Warned) -> None:
        build = Builder()
        assert get_or_build(key(1), build, settings(cache)) == (Plan(b"plan 1", {"build": 1}), False)
        assert get_or_build(key(1), build, settings(cache)) == (Plan(b"plan 1", {"build": 1}), True)
        assert get_or_build(key(2), build, settings(cache)) == (Plan(b"plan 2", {"build": 2}), False)
        assert list((cache.folder / ".builds").iterdir()) == []

    def test_off(self, cache: Store, warned: Warned) -> None:
        build = Builder()
        cache.put(key(1), PLAN)
        for count in (1, 2):
            assert get_or_build(key(1), build, settings(cache, cache="off")) == (
                Plan(b"plan %d" % count, {"build": count}),
                False,
            )
        assert cache.get(key(1)) == PLAN

    def test_refresh(self, cache: Store, warned: Warned) -> None:
        build = Builder()
        cache.put(key(1), PLAN)
        assert get_or_build(key(1), build, settings(cache, cache="refresh")) == (Plan(b"plan 1", {"build": 1}), False)
        assert get_or_build(key(1), build, settings(cache)) == (Plan(b"plan 1", {"build": 1}), True)

    def test_readonly(self, cache: Store, warned: Warned) -> None:
        build = Builder()
        assert get_or_build(key(1), build, settings(cache, cache="readonly")) == (Plan(b"plan 1", {"build": 1}), False)
        assert not cache.folder.exists()
        cache.put(key(1), PLAN)
        shutil.rmtree(cache.folder / ".tmp")
        shutil.rmtree(cache.folder / ".builds")
        (cache.folder / ".lock").unlink()
        header = cache.path(key(1)) / "entry.json"
        os.utime(header, (1, 1))
        assert get_or_build(key(1), build, settings(cache, cache="readonly")) == (PLAN, True)
        get_or_build(key(2), build, settings(cache, cache="readonly"))
        assert header.stat().st_mtime == 1
        header.write_text("{}")
        assert get_or_build(key(1), build, settings(cache, cache="readonly"))[1] is False
        warned.once("left where it is")
        assert sorted(path.name for path in cache.folder.iterdir()) == [key(1)[:2]]
        readonly = open_store(settings(cache, cache="readonly"))
        assert readonly.clear() == readonly.prune() == []
        assert readonly.put(key(3), PLAN) is False

    def test_a_hit_equals_a_miss(self, cache: Store, warned: Warned) -> None:
        manifest = {"shape": (1, 2), "by number": {1: None}, "b": [float("inf"), -0.0], "a": "é\ud800"}
        for mode in ("off", "readonly", "on", "on", "refresh"):
            plan, _ = get_or_build(key(1), lambda: Plan(b"x", manifest), settings(cache, cache=mode))
            assert json.dumps(plan.manifest) == json.dumps(manifest)
            assert plan.manifest["shape"] == [1, 2]
            assert list(plan.manifest) == list(manifest)

    def test_a_manifest_that_json_cannot_hold_is_told_at_once(self, cache: Store) -> None:
        for mode in ("on", "off", "readonly", "refresh"):
            with pytest.raises(TypeError, match="JSON serializable"):
                get_or_build(key(1), lambda: Plan(b"x", {"a": {1, 2}}), settings(cache, cache=mode))
        assert cache.entries() == []

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "of the build"), ValueError("x"), KeyboardInterrupt()])
    @pytest.mark.parametrize("mode", ["on", "off", "readonly", "refresh"])
    def test_errors_of_the_build_pass_untouched(
        self, cache: Store, warned: Warned, error: BaseException, mode: str
    ) -> None:
        def build() -> Plan:
            raise error

        with pytest.raises(type(error)) as caught:
            get_or_build(key(1), build, settings(cache, cache=mode))
        assert caught.value is error
        assert error.__context__ is None
        assert get_or_build(key(1), Builder(), settings(cache))[1] is False

    def test_the_folder_by_default(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert open_store(Settings(cache_dir=None)).folder == tmp_path / "trt_dynamo"
        monkeypatch.chdir(tmp_path)
        assert open_store(Settings(cache_dir=Path("here"))).folder == tmp_path / "here"


class TestDamage:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_is_a_miss_and_one_warning_and_removed(self, cache: Store, warned: Warned, name: str) -> None:
        for number in (1, 2):
            cache.put(key(number), PLAN)
        DAMAGES[name](cache.path(key(1)))
        assert cache.get(key(1)) is None
        warned.once(key(1), str(cache.folder), "unusable", "removed")
        assert not os.path.lexists(cache.path(key(1)))
        assert cache.get(key(1)) is None
        assert cache.get(key(2)) == PLAN
        assert cache.put(key(1), PLAN)
        assert cache.get(key(1)) == PLAN

    @pytest.mark.parametrize("name", DAMAGES)
    def test_is_built_again(self, cache: Store, warned: Warned, name: str) -> None:
        cache.put(key(1), PLAN)
        DAMAGES[name](cache.path(key(1)))
        build = Builder()
        assert get_or_build(key(1), build, settings(cache)) == (Plan(b"plan 1", {"build": 1}), False)
        warned.once(key(1))
        assert get_or_build(key(1), build, settings(cache)) == (Plan(b"plan 1", {"build": 1}), True)

    @pytest.mark.parametrize("name", DAMAGES)
    def test_can_be_overwritten_and_verified(self, cache: Store, warned: Warned, name: str) -> None:
        for number in (1, 2):
            cache.put(key(number), PLAN)
        DAMAGES[name](cache.path(key(1)))
        assert cache.put(key(1), PLAN)
        assert cache.get(key(1)) == PLAN
        if (cache.folder / "moved away").exists():
            (cache.folder / "moved away").unlink()
        DAMAGES[name](cache.path(key(1)))
        assert [found for found, _ in cache.verify()] == [key(1)]
        warned.once(key(1))
        assert cache.verify() == []
        assert [each.key for each in cache.entries()] == [key(2)]

    def test_no_flipped_bit_goes_unseen(self, cache: Store) -> None:
        small = Plan(b"abc", {"inputs": ["x"]})
        cache.put(key(1), small)
        folder = cache.path(key(1))
        for name in ("entry.json", "plan"):
            good = (folder / name).read_bytes()
            for position in range(len(good)):
                for bit in range(8):
                    bad = bytearray(good)
                    bad[position] ^= 1 << bit
                    (folder / name).write_bytes(bad)
                    with pytest.raises(Damaged):
                        entry.read(folder, key(1))
            for size in range(len(good)):
                (folder / name).write_bytes(good[:size])
                with pytest.raises(Damaged):
                    entry.read(folder, key(1))
            (folder / name).write_bytes(good)
        assert entry.read(folder, key(1)).plan == small

    def test_an_entry_under_another_key(self, cache: Store, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        cache.path(key(2)).parent.mkdir(exist_ok=True)
        shutil.copytree(cache.path(key(1)), cache.path(key(2)))
        assert cache.get(key(2)) is None
        warned.once("belongs to the key")
        assert cache.get(key(1)) == PLAN

    def test_a_file_of_another_user(self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.put(key(1), PLAN)
        honest = os.fstat

        def fstat(descriptor: int) -> os.stat_result:
            fields = list(honest(descriptor))
            fields[stat.ST_UID] += 1
            return os.stat_result(fields)

        with monkeypatch.context() as patch:
            patch.setattr("trt_dynamo.cache.disk.os.fstat", fstat)
            assert cache.get(key(1)) is None
        warned.once("belongs to another user", "removed")
        assert not cache.path(key(1)).exists()

    def test_an_entry_that_is_replaced_while_it_is_read(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put(key(1), PLAN)
        new = Plan(b"new", {})
        honest = entry.read_header

        def read_header(folder: Path, name: str) -> dict[str, Any]:
            header = honest(folder, name)
            monkeypatch.undo()
            assert cache.put(key(1), new)
            return header

        monkeypatch.setattr(entry, "read_header", read_header)
        assert cache.get(key(1)) == new

    def test_an_entry_that_is_evicted_while_it_is_read(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put(key(1), PLAN)
        honest = entry.read_header

        def read_header(folder: Path, name: str) -> dict[str, Any]:
            header = honest(folder, name)
            monkeypatch.undo()
            assert cache.clear() == [key(1)]
            return header

        monkeypatch.setattr(entry, "read_header", read_header)
        assert cache.get(key(1)) is None


class TestSize:
    @pytest.fixture
    def one(self, cache: Store) -> int:
        """The size of an entry of PLAN."""
        cache.put(key(0), PLAN)
        size = cache.size()
        cache.clear()
        return size

    def test_the_least_recently_used_go_first_whoever_used_them(self, cache: Store, one: int, warned: Warned) -> None:
        first, second = Store(cache.folder, 3 * one + one // 2), Store(cache.folder, 3 * one + one // 2)
        for number in (1, 2, 3):
            assert first.put(key(number), PLAN)
        assert second.get(key(1)) == PLAN
        assert second.put(key(4), PLAN)
        assert [number for number in range(1, 5) if first.get(key(number))] == [1, 3, 4]
        assert first.get(key(1)) == PLAN
        assert second.get(key(3)) == PLAN
        assert [each.key for each in second.entries()] == [key(3), key(1), key(4)]
        assert first.put(key(5), PLAN)
        assert first.put(key(6), PLAN)
        assert {each.key for each in first.entries()} == {key(3), key(5), key(6)}
        assert first.size() <= first.max_bytes

    def test_replacing_evicts_nothing_else(self, cache: Store, one: int, warned: Warned) -> None:
        cache.max_bytes = 2 * one + 9
        for number in (1, 2, 1, 2, 2, 1):
            assert cache.put(key(number), PLAN)
        assert {each.key for each in cache.entries()} == {key(1), key(2)}

    def test_a_plan_larger_than_the_cache_costs_no_other(self, cache: Store, one: int, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        small = Store(cache.folder, one)
        for size in (one, one + 1, 100 * one):
            assert small.put(key(2), Plan(bytes(size), {})) is False
            warned.once("not cached", "TRT_DYNAMO_CACHE_SIZE")
        assert small.get(key(1)) == PLAN
        assert list((cache.folder / ".tmp").iterdir()) == []

    def test_damaged_entries_count_and_go_first(self, cache: Store, one: int, warned: Warned) -> None:
        for number in (1, 2, 3):
            cache.put(key(number), PLAN)
        (cache.path(key(3)) / "entry.json").unlink()
        assert cache.prune(2 * one) == [key(3)]

    def test_remains_of_killed_writers_go_at_the_next_write(self, cache: Store, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        for name in ("killed", "killed too"):
            (cache.folder / ".tmp" / name).mkdir()
            (cache.folder / ".tmp" / name / "plan").write_bytes(PLAN.data)
        (cache.folder / ".tmp" / "file").write_text("")
        (cache.folder / ".builds" / key(7)).write_text("")
        with cache.building(key(8)):
            cache.put(key(2), PLAN)
            assert [path.name for path in (cache.folder / ".builds").iterdir()] == [key(8)]
        assert list((cache.folder / ".tmp").iterdir()) == []
        assert list((cache.folder / ".builds").iterdir()) == []

    @pytest.mark.parametrize("ahead", [25 * 3600, 10 * 365 * 24 * 3600, 2**33])
    def test_a_time_of_use_in_the_future_says_nothing(self, cache: Store, one: int, warned: Warned, ahead: int) -> None:
        """As after a clock that was wrong: such an entry is served, does not outlive all others, and heals by use."""
        for number in (1, 2, 3):
            cache.put(key(number), PLAN)
        for number in (2, 3):
            os.utime(cache.path(key(number)) / "entry.json", (time.time() + ahead, time.time() + ahead))
        assert cache.get(key(2)) == PLAN
        assert {each.key for each in cache.entries() if not each.used} == {key(3)}
        cache.max_bytes = 3 * one + 9
        assert cache.put(key(4), PLAN)
        assert [number for number in range(1, 5) if cache.record(key(number))] == [1, 2, 4]

    def test_another_machine_s_clock_may_be_a_little_ahead(self, cache: Store, one: int, warned: Warned) -> None:
        for number in (1, 2):
            cache.put(key(number), PLAN)
        os.utime(cache.path(key(1)) / "entry.json", (time.time() + 3600, time.time() + 3600))
        assert cache.prune(one) == [key(2)]

    @pytest.mark.parametrize("now", [0, 10**9, 2**32, 2**35])
    def test_whatever_the_clock_says(
        self, cache: Store, one: int, warned: Warned, monkeypatch: pytest.MonkeyPatch, now: int
    ) -> None:
        cache.put(key(1), PLAN)
        monkeypatch.setattr(time, "time", lambda: float(now))
        monkeypatch.setattr(time, "time_ns", lambda: now * 10**9)
        cache.max_bytes = 2 * one + 9
        for number in (1, 2, 3, 4):
            assert get_or_build(key(number), lambda: PLAN, settings(cache)) == (PLAN, number == 1)
            assert get_or_build(key(number), lambda: PLAN, settings(cache)) == (PLAN, True)
        assert cache.size() <= cache.max_bytes

    def test_entries_of_an_older_version_take_room_and_nothing_else(
        self, cache: Store, one: int, warned: Warned
    ) -> None:
        for number in (1, 2):
            cache.put(key(number), PLAN)
        reseal(format=0, layout="another")(cache.path(key(1)))
        (cache.path(key(1)) / "engine").write_bytes(PLAN.data)
        assert "its format is 0" in {each.key: each.damage for each in cache.entries()}[key(1)]
        cache.max_bytes = 2 * one + 9
        assert get_or_build(key(3), lambda: PLAN, settings(cache)) == (PLAN, False)
        assert get_or_build(key(3), lambda: PLAN, settings(cache)) == (PLAN, True)
        assert not cache.path(key(1)).exists()
        warned.never()

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ESTALE])
    def test_what_cannot_be_read_just_now_is_not_damaged(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        cache.put(key(1), PLAN)
        honest = os.open

        def fails(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
            if not flags & os.O_CREAT:
                raise OSError(code, os.strerror(code), path)
            return honest(path, flags, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails)
            assert cache.get(key(1)) is None
            assert cache.verify() == []
        assert cache.get(key(1)) == PLAN

    def test_prune_and_clear(self, cache: Store, one: int, warned: Warned) -> None:
        for number in (1, 2, 3, 4):
            cache.put(key(number), PLAN)
        assert cache.prune() == []
        assert cache.prune(2 * one) == [key(1), key(2)]
        assert sorted(cache.clear()) == sorted([key(3), key(4)])
        assert sorted(path.name for path in cache.folder.iterdir()) == [".builds", ".lock", ".tmp"]


class TestDisk:
    """Whatever the disk does, the run goes on."""

    def runs_without_cache(self, cache: Store, number: int = 1) -> None:
        build = Builder()
        for count in (1, 2):
            assert get_or_build(key(number), build, settings(cache)) == (
                Plan(b"plan %d" % count, {"build": count}),
                False,
            )

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    @pytest.mark.parametrize("call", ["fsync", "rename", "open", "mkdir"])
    def test_every_write_may_fail(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch, code: int, call: str
    ) -> None:
        cache.put(key(1), PLAN)
        honest = getattr(os, call)

        def fails(path: Any, *arguments: Any, **keywords: Any) -> Any:
            reading = call == "open" and not arguments[0] & os.O_CREAT
            if reading or (call == "mkdir" and os.path.isdir(path)):
                return honest(path, *arguments, **keywords)
            raise OSError(code, os.strerror(code), path)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            self.runs_without_cache(cache, 2)
            assert cache.get(key(1)) == PLAN, "reading goes on"
        warned.once(os.strerror(code), str(cache.folder), "TRT_DYNAMO_CACHE")
        assert cache.get(key(2)) is None
        assert cache.put(key(2), PLAN)
        assert list((cache.folder / ".tmp").iterdir()) == []
        assert len(cache.entries()) == 2

    def test_a_limit_of_the_kernel(self, cache: Store, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(PLAN.data) // 2, hard))
        try:
            assert cache.put(key(2), PLAN) is False
            assert cache.get(key(1)) == PLAN
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        warned.once("cannot be written")
        assert [each.key for each in cache.entries()] == [key(1)]
        assert list((cache.folder / ".tmp").iterdir()) == []

    def test_a_full_disk_still_lets_go(self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in (1, 2):
            cache.put(key(number), PLAN)
        flip("plan", 0)(cache.path(key(1)))

        def full(*arguments: Any, **keywords: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("tempfile.mkdtemp", full)
        assert cache.get(key(1)) is None
        warned.once("removed")
        assert cache.clear() == [key(2)]

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path, warned: Warned) -> None:
        (tmp_path / "file").write_text("")
        self.runs_without_cache(Store(tmp_path / "file", 10**9))
        warned.once("not a folder")
        self.runs_without_cache(Store(tmp_path / "file" / "below", 10**9))
        warned.once("cannot be used")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        self.runs_without_cache(Store(tmp_path / "link", 10**9))
        warned.once("cannot be written")

    def test_a_folder_behind_a_link_is_fine(self, cache: Store, tmp_path: Path, warned: Warned) -> None:
        cache.put(key(1), PLAN)
        (tmp_path / "link").symlink_to(cache.folder)
        assert Store(tmp_path / "link", 10**9).get(key(1)) == PLAN

    def test_a_folder_that_vanishes(self, cache: Store, warned: Warned) -> None:
        def build() -> Plan:
            shutil.rmtree(cache.folder)
            return PLAN

        cache.put(key(1), PLAN)
        assert get_or_build(key(2), build, settings(cache)) == (PLAN, False)
        assert get_or_build(key(2), build, settings(cache)) == (PLAN, True)
        shutil.rmtree(cache.folder)
        assert cache.get(key(2)) is None
        assert cache.prune() == []

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
    def test_a_folder_that_others_can_write_is_refused(self, cache: Store, warned: Warned, mode: int) -> None:
        cache.folder = cache.folder.with_name("it's a cache")
        cache.put(key(1), PLAN)
        cache.folder.chmod(mode)
        before = sorted(cache.folder.rglob("*"))
        self.runs_without_cache(cache)
        assert cache.get(key(1)) is None
        assert [*cache.entries(), *cache.verify(), *cache.clear()] == []
        assert Store(cache.folder, 10**9, readonly=True).get(key(1)) is None
        assert sorted(cache.folder.rglob("*")) == before
        quoted = "'" + str(cache.folder).replace("'", "'\"'\"'") + "'"
        warned.once("can be written by other users", f"chmod 700 {quoted}")
        cache.folder.chmod(0o755)
        assert cache.get(key(1)) == PLAN

    def test_a_shared_folder_is_not_to_be_closed(self, cache: Store, warned: Warned) -> None:
        cache.folder.mkdir()
        cache.folder.chmod(0o1777)
        self.runs_without_cache(cache)
        texts = warned.texts()
        warned.once("set TRT_DYNAMO_CACHE_DIR to a folder inside it")
        assert "chmod" not in texts[0]

    def test_the_folder_of_another_user_is_refused(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.put(key(1), PLAN)
        someone = os.geteuid() + 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: someone)
            self.runs_without_cache(cache)
            assert cache.get(key(1)) is None
        warned.once("belongs to another user", "chown", "TRT_DYNAMO_CACHE_DIR")
        assert cache.get(key(1)) == PLAN


class TestWaiting:
    def test_threads_that_want_one_engine_build_it_once(self, cache: Store, warned: Warned) -> None:
        lock, built, results = threading.Lock(), [], []

        def build() -> Plan:
            with lock:
                built.append(1)
            time.sleep(0.2)
            return PLAN

        def run(number: int) -> None:
            results.append(get_or_build(key(number % 2), build, settings(cache)))

        in_threads(8, run)
        assert [plan for plan, _ in results] == [PLAN] * 8
        assert sum(hit for _, hit in results) == 6
        assert len(built) == 2

    @pytest.mark.parametrize("compiling", ["background", "sync"])
    def test_while_another_builds_a_model_waits_or_runs_in_eager(
        self, monkeypatch: pytest.MonkeyPatch, compiling: str
    ) -> None:
        monkeypatch.setenv("TRT_DYNAMO_RUNTIME", "reference")
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
        x = torch.randn(3, 4)
        there = open_store(Settings.from_env())

        def answer(**options: Any) -> dict[str, int]:
            torch._dynamo.reset()
            fast = torch.compile(model, backend="tensorrt", options=options)
            reset_report()
            with torch.no_grad():
                torch.testing.assert_close(fast(x), model(x))
                first = trt_dynamo.report()
                release.set()
                assert wait_for_builds(60)
                torch.testing.assert_close(fast(x), model(x))
            return {"first": first["engine_calls"], "hits": trt_dynamo.report()["cache_hits"]}

        release = threading.Event()
        answer()
        (built,) = [there.record(each.key) for each in there.entries()]
        assert built is not None
        there.clear()
        release.clear()

        def build_elsewhere() -> None:
            with there.building(built.key):
                started.set()
                release.wait(2 if compiling == "sync" else 60)
                assert there.put_record(built)

        started = threading.Event()
        other = threading.Thread(target=build_elsewhere)
        other.start()
        started.wait()
        assert answer(compile=compiling) == {"first": int(compiling == "sync"), "hits": 1}
        other.join()

    def test_the_wait_is_bounded(self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "BUILD_SECONDS", 0.2)
        with cache.building(key(1)):
            assert get_or_build(key(1), Builder(), settings(cache)) == (Plan(b"plan 1", {"build": 1}), False)
        warned.once("another process has been building")
        assert get_or_build(key(1), Builder(), settings(cache))[1] is True

    def test_a_writer_that_hangs_costs_the_cache(
        self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "WRITE_SECONDS", 0.1)
        cache.put(key(1), PLAN)
        with filelock.FileLock(cache.folder / ".lock"):
            assert cache.put(key(2), PLAN) is False
            warned.once("cannot be written")
            assert cache.get(key(1)) == PLAN
            flip("plan", 0)(cache.path(key(1)))
            assert cache.get(key(1)) is None
            warned.once("left where it is")
        assert cache.put(key(2), PLAN)

    def test_a_disk_without_locks(self, cache: Store, warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
        def acquire(self: filelock.FileLock) -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

        monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
        assert get_or_build(key(1), Builder(), settings(cache))[1] is False
        warned.once("flock", "TRT_DYNAMO_CACHE_DIR")
