"""The cache's folder: what is stored comes back, in every mode, and what is damaged does not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cache_cases import DAMAGES, PLAN, Builder, Warned, key, settings
from trt_dynamo.cache import Plan, Store, entry, get_or_build, open_store
from trt_dynamo.cache.disk import Damaged
from trt_dynamo.settings import Settings


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10**9)


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
