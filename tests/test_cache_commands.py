"""The commands of the cache: what they print, what they remove, and what they leave alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache_cases import DAMAGES, call, content, filled, key
from trt_dynamo.cache import Store, entry
from trt_dynamo.cache.archive import export_entries


@pytest.fixture
def cache() -> Store:
    """The cache that the commands see."""
    return Store(Path(os.environ["TRT_DYNAMO_CACHE_DIR"]), 20 * 2**30)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other", 10**9)


class TestCommands:
    def test_stats(self, cache: Store) -> None:
        filled(cache, 1, 2, 3)
        (cache.path(key(2)) / "entry.json").write_text("{}")
        (cache.folder / ".tmp" / "killed").mkdir()
        found = json.loads(call("stats", "--json")[1])
        version = entry.versions()["trt-dynamo"]
        assert (found["entries"], found["damaged"], found["refused"], found["remains"]) == (3, 1, 0, 1)
        assert found["bytes"] == cache.size()
        assert found["largest"] == max(each.size for each in cache.entries())
        assert 0 < found["oldest"] <= found["newest"] <= time.time()
        assert found["by"] == {f"trt-dynamo {version}, torch {entry.versions()['torch']}": 2}
        assert (found["signed"], found["remote"]) == (False, None)
        code, out, _ = call("stats")
        assert code == 0
        assert "3: 1 damaged, 0 refused" in out
        assert str(cache.folder) in out

    @pytest.mark.parametrize("command", ["list", "stats", "verify", "prune", "clear"])
    def test_a_folder_that_is_not_there(self, cache: Store, command: str) -> None:
        for arguments in ([command], [command, "--json"]):
            code, out, err = call(*arguments)
            assert (code, err) == (0, "")
            assert str(cache.folder) in out
        assert not cache.folder.exists()

    @pytest.mark.parametrize(("option", "left"), [("7KB", 2), ("0", 0), ("1T", 3), (None, 3)])
    def test_prune(self, cache: Store, option: str | None, left: int) -> None:
        filled(cache, 1, 2, 3)
        cache.get(key(1))
        before = cache.size()
        code, out, _ = call("prune", "--json", *(["--max-size", option] if option else []))
        gone = json.loads(out)
        assert code == 0
        assert gone["removed"] == [key(2), key(3), key(1)][: 3 - left]
        assert gone["bytes"] == before - cache.size()
        assert len(cache.entries()) == left

    def test_prune_takes_what_killed_processes_left(self, cache: Store) -> None:
        filled(cache, 1)
        (cache.folder / ".tmp" / "killed").mkdir()
        assert call("prune")[:2] == (0, f"removed 0 entries, 0 B, from {cache.folder}\n")
        assert list((cache.folder / ".tmp").iterdir()) == []

    @pytest.mark.parametrize("option", ["much", "-1", "", "5XB"])
    def test_prune_to_what_is_no_size(self, cache: Store, option: str) -> None:
        filled(cache, 1)
        code, _, err = call("prune", "--max-size", option)
        assert code == 2
        assert "expected a size such as 500MB" in err.lower() or "Expected a size such as 500MB" in err
        assert len(cache.entries()) == 1

    @pytest.mark.parametrize("name", DAMAGES)
    def test_damaged_entries(self, cache: Store, tmp_path: Path, name: str) -> None:
        filled(cache, 1, 2)
        DAMAGES[name](cache.path(key(1)))
        code, out, _ = call("list")
        assert code == 0
        assert key(1)[:12] in out
        assert call("stats")[0] == 0
        code, out, _ = call("export", str(tmp_path / "archive"))
        assert code == 1
        assert f"left out: {key(1)}" in out
        assert "exported 1 entry" in out
        assert [each.key for each in cache.entries()] == [key(2)]
        assert call("verify")[0] == 0

    def test_foreign_files_are_let_be(self, cache: Store, tmp_path: Path) -> None:
        filled(cache, 1)
        shard = key(1)[:2]
        names = ["notes.txt", f"{shard}/notes.txt", f"{shard}/{'A' * 64}", "Ab"]
        for name in names:
            (cache.folder / name).write_text("mine")
        (tmp_path / "outside").mkdir()
        (cache.folder / "ff").symlink_to(tmp_path / "outside")
        (tmp_path / "outside" / ("ff" + "0" * 62)).mkdir()
        for command in (["list"], ["stats"], ["verify"], ["export", str(tmp_path / "archive")], ["prune"], ["clear"]):
            code, out, _ = call(*command)
            assert code == 0
            assert "2 entries" not in out
        assert all((cache.folder / name).read_text() == "mine" for name in names)
        assert (tmp_path / "outside" / ("ff" + "0" * 62)).is_dir()

    @pytest.mark.parametrize("command", ["prune", "clear", "import", "verify"])
    def test_a_cache_that_may_only_be_read(
        self, cache: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        filled(cache, 1)
        export_entries(filled(other, 2), tmp_path / "archive", [key(2)])
        monkeypatch.setenv("TRT_DYNAMO_CACHE", "readonly")
        before = content(cache.folder)
        given = {"prune": ["--max-size", "0"], "import": [str(tmp_path / "archive")]}
        code, out, err = call(command, *given.get(command, []))
        assert code == (0 if command == "verify" else 1)
        assert "error: " in err or "1 entry whole" in out
        assert content(cache.folder) == before

    @pytest.mark.parametrize("command", ["prune", "clear", "import", "verify", "list", "stats", "export"])
    def test_a_disk_that_may_only_be_read(
        self, cache: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        filled(cache, 1, 2)
        export_entries(filled(other, 3), tmp_path / "in", [key(3)])
        (cache.path(key(1)) / "plan").write_bytes(b"x" * 1000)
        before = content(cache.folder)
        honest = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "unlink", "rmdir", "utime")}

        def readonly(name: str) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
                if cache.folder in Path(path).parents and (name != "open" or arguments[0] & os.O_CREAT):
                    raise OSError(30, "Read-only file system", str(path))
                return honest[name](path, *arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in honest:
                patch.setattr(os, name, readonly(name))
            given = {"prune": ["--max-size", "0"], "import": [str(tmp_path / "in")], "export": [str(tmp_path / "out")]}
            code, out, err = call(command, *given.get(command, []))
        assert code == (0 if command in ("list", "stats") else 1)
        assert content(cache.folder) == before
        expected = {
            "prune": "Read-only file system",
            "clear": "Read-only file system",
            "import": "could not be stored",
            "verify": "1 entry whole, 1 damaged",
            "export": "exported 1 entry",
            "list": "2 entries",
            "stats": str(cache.folder),
        }
        assert expected[command] in out + err

    @pytest.mark.parametrize("command", ["list", "stats", "verify", "prune", "clear", "export FILE", "import FILE"])
    def test_a_cache_that_others_can_write_is_refused(self, cache: Store, tmp_path: Path, command: str) -> None:
        filled(cache, 1)
        cache.folder.chmod(0o777)
        code, out, err = call(*command.replace("FILE", str(tmp_path / "archive")).split())
        assert (code, out) == (1, "")
        assert "chmod 700" in err
        cache.folder.chmod(0o700)
        assert len(cache.entries()) == 1

    def test_what_cannot_be_removed_is_told(self, cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        filled(cache, 1)
        monkeypatch.setattr(Store, "remove", lambda *_: False)
        code, out, err = call("clear")
        assert code == 1
        assert out == f"removed 0 entries, 0 B, from {cache.folder}\n"
        assert "cannot be removed" in err

    def test_the_table_for_a_person(self, cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        filled(cache, 1, 2)
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
        code, out, _ = call("list")
        assert code == 0
        assert "─" in out
        for text in ("engine", "last used", key(1)[:12], key(2)[:12], "1 inputs, 0 outputs", "2 entries"):
            assert text in out


def test_a_folder_that_vanishes_between_two_commands(cache: Store, tmp_path: Path) -> None:
    filled(cache, 1)
    assert call("export", str(tmp_path / "archive"))[0] == 0
    shutil.rmtree(cache.folder)
    assert call("list")[0] == 0
    assert call("import", str(tmp_path / "archive"))[0] == 0
    assert len(cache.entries()) == 1
