"""The commands that README and docs show: each runs, in a folder with small models, or is listed with why it cannot.

A page's commands run from top to bottom in one folder. What is a placeholder there (FILE, s3://bucket) becomes
something that exists.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.test_docs import PAGES, ROOT, code_of, name_of
from trt_dynamo.cli import app
from trt_dynamo.reports import reset_report

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 8)]
    return nn.Sequential(*layers).eval(), (torch.randn(2, 64),)
"""
SCRIPT = """
import torch
import trt_dynamo
from model import make

model, args = make()
with torch.no_grad():
    fast = torch.compile(model, backend="tensorrt")
    assert torch.allclose(fast(*args), model(*args), atol=1e-2)
assert trt_dynamo.report()["engine_calls"] == 1, trt_dynamo.report()
"""
FILES = {
    **dict.fromkeys(("model.py", "llama.py", "a.py", "b.py"), MODEL),
    **dict.fromkeys(("serve.py", "evaluate.py"), SCRIPT),
    "sizes.json": '{"input": [{"min": 1, "opt": 4, "max": 16}, 64]}',
    "mine.py": code_of((ROOT / "docs" / "selftest.md").read_text())[-1],
}

PROGRAMS = ("python", "pip", "make", "head", "nsys", ".ci/run")
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
PLACEHOLDERS = {"FILE:FUNCTION": "model.py:make", "FILE": "engines.trt", "[KEY...]": ""}

# What is added, so that it takes seconds and needs no GPU.
SHORTER = {
    "bench": ["--columns", "eager,tensorrt", "--calls", "2"],
    "selftest": ["--only", "linear", "--runtime", "reference"],
}

# What cannot run here; that its options exist is tested all the same.
NOT_RUN = {
    "torchvision:": "torchvision is not among the packages of the tests",
    "timm:": "timm is not either",
    "--table": "its models are torchvision's and timm's",
    "--ray": "tests/test_build_jobs.py starts Ray",
    "trt_dynamo demo": "a network is needed for its weights; tests/test_demo.py runs it where they are",
}
SLOW = ("selftest", "bench")
OF_A_MODEL = ("explain", "debug", "build", "export")


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of each code block without a language, continued ones joined."""
    for indent, code in re.findall(r"^( *)```\n(.*?)^\1```$", without_others(text), re.MULTILINE | re.DOTALL):
        yield [line.removeprefix(indent) for line in code.replace("\\\n", " ").splitlines()]


def without_others(text: str) -> str:
    return re.sub(r"^( *)```\w+\n.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def is_command(line: str) -> bool:
    first = line.split(" ")[0]
    return first in PROGRAMS or bool(ASSIGNMENT.match(first))


def commands(text: str) -> list[str]:
    """Those in blocks, then those in running text that say what to do with a program of ours."""
    found = [line for block in blocks(text) for line in block if is_command(line)]
    spans = [span for span in re.findall(r"`([^`\n]+)`", without_others(text)) if is_command(span)]
    named = {f"python -m trt_dynamo {name}" for name in OF_A_MODEL}  # no command, but the name of one
    return found + [span for span in spans if len(span.split()) > 1 and span not in named]


def words_of(line: str) -> list[str]:
    """The command's words, without the comment."""
    words = shlex.split(line, comments=True)
    return [word for word in (PLACEHOLDERS.get(word, word) for word in words) if word]


PAGES_WITH = [page for page in PAGES if commands(page.read_text()) and page.name != "CHANGELOG.md"]


def why_not(line: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in line), None)


def subcommand(words: list[str]) -> list[str]:
    """What comes after `python -m trt_dynamo`, as the names of commands."""
    return words[3:5] if words[3] == "cache" else words[3:4]


def is_slow(words: list[str]) -> bool:
    return words[:3] == ["python", "-m", "trt_dynamo"] and words[3] in SLOW


def runs(line: str) -> bool:
    """Whether it is run as it is: ours, or a script that uses us. What others' programs do is looked at elsewhere."""
    words = words_of(line)
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    return (
        words[0] in ("head", "nsys")
        or words[:3] == ["python", "-m", "trt_dynamo"]
        or words[-1] in ("serve.py", "evaluate.py")
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("TRT_DYNAMO_RUNTIME", "reference")
    monkeypatch.setenv("TRT_DYNAMO_MIN_SEGMENT_NODES", "1")
    return place


def perform(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process; a line with pipes in a shell."""
    line = line.replace("s3://bucket/engines", (folder / "remote").as_uri())
    if line.startswith("head"):
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)
        return
    words = words_of(line)
    with monkeypatch.context() as patch:
        while ASSIGNMENT.match(words[0]):
            name, _, value = words.pop(0).partition("=")
            patch.setenv(name, value)
        words = words[2:] if words[:2] == ["nsys", "profile"] else words
        if words[1] == "-m":
            result = CliRunner().invoke(app, [*words[3:], *SHORTER.get(words[3], ())])
            assert result.exit_code == 0, (line, result.output, result.exception)
        else:
            torch._dynamo.reset()
            reset_report()
            runpy.run_path(words[1], run_name="__main__")


def check(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> int:
    lines = lines_to_run(page, slow=slow)
    for line in lines:
        perform(line, folder, monkeypatch)
    return len(lines)


def lines_to_run(page: Path, *, slow: bool) -> list[str]:
    """Each command once."""
    found: dict[tuple[str, ...], str] = {}
    for line in commands(page.read_text()):
        words = words_of(line)
        if runs(line) and why_not(line) is None and is_slow(words) == slow:
            found.setdefault(tuple(words), line)
    return list(found.values())


@pytest.mark.parametrize("page", [page for page in PAGES_WITH if lines_to_run(page, slow=False)], ids=name_of)
def test_the_commands_of_a_page_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(page, folder, monkeypatch, slow=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES_WITH if lines_to_run(page, slow=True)], ids=name_of)
def test_the_long_commands_of_a_page_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(page, folder, monkeypatch, slow=True) > 0


@pytest.mark.parametrize("page", PAGES_WITH, ids=name_of)
def test_the_options_of_our_commands_exist(page: Path) -> None:
    for words in map(words_of, commands(page.read_text())):
        if words[:3] != ["python", "-m", "trt_dynamo"]:
            continue
        shown = CliRunner().invoke(app, [*subcommand(words), "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, words
        for option in [word.split("=")[0] for word in words if word.startswith("--")]:
            assert re.search(rf"{option}\b", shown.output), (words, option)


def test_what_pip_installs_exists() -> None:
    extras = re.search(
        r"^\[project\.optional-dependencies\]$(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert extras is not None
    known = set(re.findall(r"^([\w-]+) = \[", extras[1], re.MULTILINE))
    lines = [line for page in PAGES_WITH for line in commands(page.read_text()) if line.startswith("pip install")]
    assert len(lines) >= 6
    for line in lines:
        for package in words_of(line)[2:]:
            found = re.fullmatch(r"trt-dynamo(?:\[([\w,-]+)\])?", package)
            assert found is not None and set((found[1] or "rtx").split(",")) <= known, line


def test_what_runs_the_tests_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [words_of(line) for page in PAGES_WITH for line in commands(page.read_text())]
    assert {words[1] for words in lines if words[0] == "make"} <= targets
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_each_reason_is_needed() -> None:
    """A command that nothing shows any more needs no reason."""
    lines = [line for page in PAGES_WITH for line in commands(page.read_text())]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []
