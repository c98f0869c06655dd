"""Archives of the cache: what they carry, and what they let nobody do."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cache_cases import PLAN, Warned, call, content, filled, key
from trt_dynamo.cache import Plan, Store, entry
from trt_dynamo.cache.archive import export_entries, import_entries
from trt_dynamo.cache.disk import Damaged
from trt_dynamo.cache.packing import MAGIC, packed, unpack, unpacked
from trt_dynamo.cache.signing import Refused, Signing
from trt_dynamo.cli import app

SECRET = "a secret of 20 bytes"
OURS, THEIRS = Signing(SECRET.encode()), Signing(b"some other secret key")


@pytest.fixture
def cache() -> Store:
    """The cache that the commands see."""
    return Store(Path(os.environ["TRT_DYNAMO_CACHE_DIR"]), 20 * 2**30)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other", 10**9)


class TestExportAndImport:
    def test_what_is_exported_comes_in(self, cache: Store, other: Store, tmp_path: Path) -> None:
        archive = tmp_path / "archive"
        filled(other, 1, 2, 3)
        monkey = Store(cache.folder, 10**9)
        assert export_entries(other, archive, [key(n) for n in (1, 2, 3)]).done == [key(n) for n in (1, 2, 3)]
        assert stat.S_IMODE(archive.stat().st_mode) == 0o600
        filled(monkey, 2)
        kept = content(monkey.folder)
        code, out, _ = call("import", str(archive))
        assert (code, out) == (0, f"imported 2 entries, 1 there already, to {cache.folder}\n")
        after = content(cache.folder)
        assert after == {**content(other.folder), **kept}, "what was there stays, the rest is the same to the byte"
        assert call("import", str(archive))[1] == f"imported 0 entries, 3 there already, to {cache.folder}\n"

    def test_by_the_commands(self, cache: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = tmp_path / "engines.trt"
        filled(cache, 1, 2)
        code, out, _ = call("export", str(archive), key(1)[:5], "--json")
        assert code == 0
        assert json.loads(out) == {"exported": [key(1)], "there": [], "bad": [], "failure": ""}
        assert call("export", str(archive))[0] == 1, "it is there already"
        assert "--force" in call("export", str(archive))[2]
        assert "exported 2 entries" in call("export", str(archive), "--force")[1]
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".trt")] == ["engines.trt"]
        before = content(cache.folder)
        monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "new"))
        assert "imported 2 entries" in call("import", str(archive))[1]
        assert content(tmp_path / "new") == before

    def test_of_nothing(self, cache: Store, tmp_path: Path) -> None:
        assert call("export", str(tmp_path / "archive"))[0] == 0
        assert (tmp_path / "archive").read_bytes() == MAGIC + b"end 0\n"
        assert call("import", str(tmp_path / "archive"))[0] == 0

    def test_of_a_key_that_is_not_there(self, cache: Store, tmp_path: Path) -> None:
        filled(cache, 1)
        code, _, err = call("export", str(tmp_path / "archive"), "ffff")
        assert code == 1
        assert "ffff" in err
        assert not (tmp_path / "archive").exists()

    @pytest.mark.parametrize("where", ["no folder/archive", "a file/archive", "."])
    def test_to_where_nothing_can_be_written(self, cache: Store, tmp_path: Path, where: str) -> None:
        filled(cache, 1)
        (tmp_path / "a file").write_text("")
        code, _, err = call("export", str(tmp_path / where), "--force")
        assert code == 1
        assert "cannot be written" in err
        assert [path for path in tmp_path.rglob(".*") if cache.folder not in path.parents] == []

    def test_onto_a_full_disk(self, cache: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        filled(cache, 1)
        (tmp_path / "archive").write_text("old")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        code, _, err = call("export", str(tmp_path / "archive"), "--force")
        assert code == 1
        assert "No space left" in err
        assert (tmp_path / "archive").read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_cache_that_takes_no_more(self, cache: Store, other: Store, tmp_path: Path) -> None:
        export_entries(filled(other, 1, 2), tmp_path / "archive", [key(1), key(2)])
        cache.folder.mkdir(mode=0o700)
        (cache.folder / ".tmp").write_text("in the way")
        code, _, err = call("import", str(tmp_path / "archive"))
        assert code == 1
        assert f"the entry {key(1)} could not be stored" in err

    def test_a_small_cache_keeps_its_size(self, other: Store, tmp_path: Path) -> None:
        export_entries(filled(other, 1, 2, 3), tmp_path / "archive", [key(n) for n in (1, 2, 3)])
        small = Store(tmp_path / "small", 5000)
        assert import_entries(small, tmp_path / "archive").done
        assert small.size() <= 5000
        assert small.verify() == []

    def test_a_file_that_is_not_there_or_no_archive(self, cache: Store, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("hello")
        for name, reason in (("missing", "cannot be read"), (".", "cannot be read"), ("text", "holds no engines")):
            code, _, err = call("import", str(tmp_path / name))
            assert code == 1
            assert reason in err
        assert not cache.folder.exists()


def tar_of(*members: tuple[str, str]) -> bytes:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            tar.addfile(info)
    return file.getvalue()


def zip_of(*names: str) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def line(name: str, header: bytes, data: bytes, signature: str = "-") -> bytes:
    return f"{name} {len(header)} {len(data)} {signature}\n".encode() + header + data


GOOD = entry.recorded(key(1), PLAN)
END = b"end 1\n"

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "only its name": MAGIC,
    "tar with a path": tar_of(("../../evil", "")),
    "tar with a link": tar_of(("ab", "/etc"), ("ab/evil", "")),
    "zip with a path": zip_of("../../evil", "/evil"),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "another version": MAGIC.replace(b"1", b"2") + END,
    "a path for a key": MAGIC + line("../../../evil", GOOD.header, PLAN.data) + END,
    "an absolute path for a key": MAGIC + line("/tmp/" + "a" * 59, GOOD.header, PLAN.data) + END,
    "capitals": MAGIC + line(key(1).upper().replace("0", "A"), GOOD.header, PLAN.data) + END,
    "no end": MAGIC + line(key(1), GOOD.header, PLAN.data),
    "wrong count": MAGIC + line(key(1), GOOD.header, PLAN.data) + b"end 2\n",
    "more behind": MAGIC + line(key(1), GOOD.header, PLAN.data) + END + b"\n",
    "more than there is": MAGIC + f"{key(1)} {10**14} 5 -\n".encode() + GOOD.header + PLAN.data + END,
    "a negative size": MAGIC + f"{key(1)} -5 5 -\n".encode() + GOOD.header + PLAN.data + END,
    "a size too long": MAGIC + f"{key(1)} {'9' * 400} 5 -\n".encode() + GOOD.header + PLAN.data + END,
    "cut in the header": packed(GOOD)[:200],
    "cut in the plan": packed(GOOD)[:-2000],
}

# Sound as a stream, and wrong in what it says.
WRONG: dict[str, tuple[bytes, str]] = {
    "under another key": (line(key(2), GOOD.header, PLAN.data), "belongs to the key"),
    "another plan": (line(key(1), GOOD.header, b"x" * len(PLAN.data)), "checksum"),
    "a shorter plan": (line(key(1), GOOD.header, PLAN.data[:-1]), "checksum"),
    "a flipped header": (line(key(1), GOOD.header.replace(b'"y"', b'"x"'), PLAN.data), "checksum"),
    "no header": (line(key(1), b"", PLAN.data), "not JSON"),
    "an old format": (line(key(1), entry.sealed({**GOOD.body, "format": 0}), PLAN.data), "format"),
    "no plan in the header": (line(key(1), entry.sealed({**GOOD.body, "plan": {}}), PLAN.data), "lacks"),
    "no manifest": (line(key(1), entry.sealed({**GOOD.body, "manifest": [1]}), PLAN.data), "lacks"),
    "a negative plan": (
        line(key(1), entry.sealed({**GOOD.body, "plan": {"bytes": -1, "sha256": ""}}), PLAN.data),
        "lacks",
    ),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_stream_that_is_none(self, other: Store, tmp_path: Path, name: str) -> None:
        (tmp_path / "archive").write_bytes(HOSTILE[name])
        before = sorted(tmp_path.rglob("*"))
        try:
            transfer = import_entries(other, tmp_path / "archive")
        except Damaged:
            assert sorted(tmp_path.rglob("*")) == before, "nothing was written"
        else:
            assert transfer.failure
            assert transfer.done == [key(1)]
            assert other.get(key(1)) == PLAN, "what came before the cut is whole"

    @pytest.mark.parametrize("name", WRONG)
    def test_an_entry_that_is_wrong_does_not_stop_the_others(self, other: Store, tmp_path: Path, name: str) -> None:
        stream, reason = WRONG[name]
        good = entry.recorded(key(5), PLAN)
        data = MAGIC + stream + line(key(5), good.header, PLAN.data) + b"end 2\n"
        (tmp_path / "archive").write_bytes(data)
        transfer = import_entries(other, tmp_path / "archive")
        assert transfer.done == [key(5)]
        assert len(transfer.bad) == 1
        assert reason in transfer.bad[0][1]
        assert [each.key for each in other.entries()] == [key(5)]

    def test_no_flipped_bit_and_no_cut_goes_unseen(self) -> None:
        small = entry.recorded(key(1), Plan(b"abc", {"inputs": ["x"]}), OURS)
        good = packed(small)
        assert unpacked(good, key(1), OURS) == small
        for position in range(len(good)):
            with pytest.raises(Damaged):
                unpacked(good[:position], key(1), OURS)
            for bit in range(8):
                bad = bytearray(good)
                bad[position] ^= 1 << bit
                with pytest.raises(Damaged):
                    unpacked(bytes(bad), key(1), OURS)

    def test_it_asks_for_no_more_memory_than_the_file_has(self) -> None:
        data = MAGIC + f"{key(1)} {10**14} {10**14} -\n".encode() + b"x"
        with pytest.raises(Damaged, match="cut off"):
            list(unpack(io.BytesIO(data)))


SIGNATURES: dict[str, tuple[Callable[[entry.Record], entry.Record], str]] = {
    "none": (lambda record: entry.Record(record.body, record.data), "not signed"),
    "of another key": (
        lambda record: entry.Record(record.body, record.data, THEIRS.sign(record.header)),
        "not one of our key",
    ),
    "of another entry": (
        lambda record: entry.Record(record.body, record.data, entry.recorded(key(7), PLAN, OURS).signature),
        "not one of our key",
    ),
    "of the same plan before its header was changed": (
        lambda record: entry.Record({**record.body, "manifest": {"evil": 1}}, record.data, record.signature),
        "not one of our key",
    ),
    "of another plan": (
        lambda record: entry.Record(record.body, record.data, entry.recorded(key(1), Plan(b"", {}), OURS).signature),
        "not one of our key",
    ),
}


class TestSignatures:
    def settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", SECRET)

    def test_a_signed_entry_serves_all(self, tmp_path: Path) -> None:
        signing = Store(tmp_path / "cache", 10**9, signing=OURS)
        assert signing.put(key(1), PLAN)
        assert (signing.path(key(1)) / "signature").read_text() == OURS.sign(entry.recorded(key(1), PLAN).header)
        for store in (signing, Store(tmp_path / "cache", 10**9)):
            assert store.get(key(1)) == PLAN
            assert store.verify() == []
        assert signing.size() == sum(path.stat().st_size for path in signing.path(key(1)).iterdir())

    @pytest.mark.parametrize("name", SIGNATURES)
    def test_others_are_refused_everywhere(
        self,
        tmp_path: Path,
        warned: Warned,
        name: str,
    ) -> None:
        change, reason = SIGNATURES[name]
        record = change(entry.recorded(key(1), PLAN, OURS))
        store = Store(tmp_path / "cache", 10**9, signing=OURS)
        assert store.put_record(record)
        for _ in (1, 2):
            assert store.get(key(1)) is None
        warned.once("refused", reason, "built again")
        assert [each.refused for each in store.entries()] == [True]
        assert store.verify() == [], "it is whole"
        assert store.path(key(1)).exists()
        with pytest.raises(Refused, match=reason):
            unpacked(packed(record), key(1), OURS)
        assert store.put(key(1), PLAN)
        assert store.get(key(1)) == PLAN

    def test_an_archive_of_unsigned_entries(
        self, cache: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        export_entries(filled(other, 1), tmp_path / "archive", [key(1)])
        self.settings(monkeypatch)
        code, out, _ = call("import", str(tmp_path / "archive"))
        assert code == 1
        assert "it is not signed" in out
        assert "imported 0 entries" in out
        other.signing = OURS
        filled(other, 1)
        export_entries(other, tmp_path / "archive", [key(1)])
        assert call("import", str(tmp_path / "archive"))[0] == 0
        assert content(cache.folder) == content(other.folder)

    def test_the_commands_tell_the_refused_from_the_damaged(
        self, cache: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filled(cache, 1)
        self.settings(monkeypatch)
        assert "refused: it is not signed" in call("list")[1]
        assert "1: 0 damaged, 1 refused" in call("stats")[1]
        code, out, _ = call("verify")
        assert code == 1
        assert f"refused: {key(1)}: it is not signed" in out
        assert "0 entries whole, 0 damaged, 1 refused" in out
        assert call("export", str(tmp_path / "archive"))[0] == 1
        assert "removed 1 entry" in call("clear")[1]

    @pytest.mark.parametrize(
        ("key_text", "file_bytes", "problem"),
        [
            ("short", None, "TRT_DYNAMO_CACHE_KEY holds 5 bytes"),
            ("", b"short\n", "holds 5 bytes"),
            ("", b"", "holds 0 bytes"),
            ("", None, "cannot be read (No such file or directory)"),
            (SECRET, SECRET.encode(), "both"),
        ],
    )
    def test_a_key_that_cannot_be_had_means_no_cache(
        self,
        cache: Store,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        warned: Warned,
        key_text: str,
        file_bytes: bytes | None,
        problem: str,
    ) -> None:
        from trt_dynamo.cache import get_or_build
        from trt_dynamo.settings import Settings

        filled(cache, 1)
        before = content(cache.folder)
        if key_text:
            monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", key_text)
        if file_bytes is not None:
            (tmp_path / "key").write_bytes(file_bytes)
        if file_bytes is not None or not key_text:
            monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY_FILE", str(tmp_path / "key"))
        for number in (1, 2):
            assert get_or_build(key(number), lambda: PLAN, Settings.from_env()) == (PLAN, False)
        warned.once("the engine cache is not used", problem)
        code, _, err = call("list")
        assert code == 1
        assert problem in err
        assert content(cache.folder) == before

    def test_a_file_and_a_variable_are_the_same_key(
        self, cache: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trt_dynamo.cache import open_store
        from trt_dynamo.settings import Settings

        (tmp_path / "key").write_text(f"\n {SECRET}\n")
        for given in ({"cache_key": SECRET}, {"cache_key_file": tmp_path / "key"}):
            settings: Any = Settings(cache_dir=cache.folder, **given)
            assert open_store(settings).signing == OURS
            assert SECRET not in repr(settings)
            assert SECRET not in repr(open_store(settings).signing)

    def test_the_key_is_never_printed(self, cache: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings(monkeypatch)
        monkeypatch.setenv("TRT_DYNAMO_CACHE_REMOTE", "ftp://me:password@host/engines")
        for command in (["info"], ["info", "--json"], ["cache", "stats"], ["cache", "stats", "--json"]):
            out = CliRunner().invoke(app, command).output
            assert SECRET not in out
            assert "password" not in out
            assert "ftp://me:***@host" in out
