"""What the tests of the cache share: plans and keys, the warnings of the package, and ways to damage an entry."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trt_dynamo.cache import Plan, Store, entry
from trt_dynamo.settings import Settings

PLAN = Plan(bytes(range(256)) * 20, {"inputs": [{"name": "x", "shape": [None, 3]}], "outputs": ["y", "z"]})


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


class Warned:
    """The warnings of the package so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def texts(self) -> list[str]:
        records = self.caplog.records
        return [r.getMessage() for r in records if r.name.startswith("trt_dynamo") and r.levelno >= logging.WARNING]

    def once(self, *parts: str) -> None:
        """There was exactly one warning, with all these parts; forgets it."""
        texts = self.texts()
        self.caplog.clear()
        assert len(texts) == 1, texts
        for part in parts:
            assert part in texts[0]

    def never(self) -> None:
        assert self.texts() == []


def settings(cache: Store, /, **changes: Any) -> Settings:
    return Settings(**{"cache_dir": cache.folder, "cache_size": cache.max_bytes, **changes})


class Builder:
    """Counts builds, each a little different."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Plan:
        self.count += 1
        return Plan(b"plan %d" % self.count, {"build": self.count})


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command `cache <arguments>`."""
    from trt_dynamo.cli import app

    result = CliRunner().invoke(app, ["cache", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def filled(cache: Store, *numbers: int) -> Store:
    for number in numbers:
        assert cache.put(key(number), Plan(bytes([number]) * 1000 * number, {"inputs": [number], "outputs": []}))
    return cache


def content(folder: Path) -> dict[str, bytes]:
    """Every entry's files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[0-9a-f][0-9a-f]/*/*")}


def flip(name: str, position: float) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        (folder / name).write_bytes(data)

    return change


def truncate(name: str, size: float) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, int(size * (folder / name).stat().st_size))


def append(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n")


def reseal(**changes: Any) -> Callable[[Path], object]:
    """Writes a header that is sound in itself, and says something else."""

    def change(folder: Path) -> None:
        header = json.loads((folder / "entry.json").read_bytes())
        del header["checksum"]
        (folder / "entry.json").write_bytes(entry.sealed({**header, **changes}))

    return change


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent.parent / "moved away")
        make(folder / name)

    return change


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def a_link_to_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "plan flipped at its start": flip("plan", 0),
    "plan flipped in the middle": flip("plan", 0.5),
    "plan flipped at its end": flip("plan", 1),
    "plan truncated": truncate("plan", 0.5),
    "plan emptied": truncate("plan", 0),
    "plan longer": append("plan"),
    "plan missing": lambda folder: (folder / "plan").unlink(),
    "plan of another": write("plan", b"x" * len(PLAN.data)),
    "plan writable by others": lambda folder: (folder / "plan").chmod(0o622),
    "plan is a link": instead("plan", lambda path: path.symlink_to(path.parent.parent.parent / "moved away")),
    "plan is a folder": instead("plan", lambda path: path.mkdir()),
    "plan is a pipe": instead("plan", os.mkfifo),
    "signature no text": write("signature", b"\xff" * 64),
    "signature too short": write("signature", b"0" * 63),
    "signature with a line of its own": write("signature", b"0" * 63 + b"\n"),
    "signature is a link": lambda folder: (folder / "signature").symlink_to(folder / "nowhere"),
    "header without a plan": reseal(plan={}),
    "header with a manifest of another type": reseal(manifest=[]),
    "header flipped": flip("entry.json", 0.5),
    "header's last byte flipped": flip("entry.json", 1),
    "header truncated": truncate("entry.json", 0.5),
    "header emptied": truncate("entry.json", 0),
    "header longer": append("entry.json"),
    "header missing": lambda folder: (folder / "entry.json").unlink(),
    "header writable by others": lambda folder: (folder / "entry.json").chmod(0o602),
    "header no JSON": write("entry.json", b"\x80\x04K\x01."),
    "header too deep": write("entry.json", b"[" * 100000),
    "header a list": write("entry.json", b"[]"),
    "header null": write("entry.json", b"null"),
    "header with a huge number": write("entry.json", b'{"format": ' + b"9" * 5000 + b"}"),
    "older format": reseal(format=0),
    "newer format": reseal(format=2),
    "format of another type": reseal(format="1"),
    "another key's": reseal(key=key(99)),
    "everything missing": emptied,
    "a file": a_file,
    "a link to nothing": a_link_to_nothing,
}
