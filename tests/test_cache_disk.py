"""The cache's folder and its disk: the size that it keeps to, disks that fail, and who waits for whom."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

import trt_dynamo
from tests.cache_cases import PLAN, Builder, Warned, flip, key, reseal, settings
from tests.compiled import in_threads
from trt_dynamo.cache import Plan, Store, get_or_build, open_store, store
from trt_dynamo.reports import reset_report
from trt_dynamo.runtime.background import wait_for_builds
from trt_dynamo.settings import Settings


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10**9)


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
