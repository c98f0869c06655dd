"""The pages that name messages, settings and functions name those that there are; the site builds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trt_dynamo
from trt_dynamo.settings import FIELDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MESSAGES = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


class Texts(ast.NodeVisitor):
    """The text literals of a module; what is put into one at run time is …."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        self.found.append("".join(str(part) for part in parts))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append(re.sub(r"%\w", "…", node.value))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    visitor = Texts()
    for file in sorted((ROOT / "trt_dynamo").rglob("*.py")):
        visitor.visit(ast.parse(file.read_text()))
    return visitor.found


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_ours(message: str, texts: list[str]) -> None:
    """All of its parts, in this order, in one text of the code, or in one and its neighbors that are put into it."""
    parts = [part.strip(" :;,.()'\"`") for part in message.split("…")]
    pattern = ".*".join(re.escape(part) for part in parts if part)
    assert any(re.search(pattern, text, re.DOTALL) for text in texts), pattern


def right_columns(page: str) -> str:
    rows = re.findall(r"^\| (?!there|---)(.*) \| (.*) \|$", (DOCS / page).read_text(), re.MULTILINE)
    assert len(rows) > 30
    return "\n".join(here for _, here in rows)


def test_the_migration_leads_to_what_exists() -> None:
    here = right_columns("migration.md")
    codes = re.findall(r"`([^`]+)`", here)
    assigned = {name for code in codes for name in re.findall(r"^(\w+)=", code)}
    alone = {code for code in codes if re.fullmatch(r"[a-z0-9_]+", code)}
    functions = {name for code in codes for name in re.findall(r"trt_dynamo\.(\w+)", code)}
    assert assigned - FIELDS.keys() == {"backend"}
    assert alone - FIELDS.keys() <= {"mark_dynamic", "quantize_"}
    assert [name for name in functions if not hasattr(trt_dynamo, name)] == []


def test_settings_in_the_messages_exist() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    named = set(re.findall(r"`(\w+)=", text)) | {name.lower() for name in re.findall(r"TRT_DYNAMO_(\w+)", text)}
    assert named - FIELDS.keys() == {"TORCH_LOGS", "backend", "mode"}


def test_every_page_is_on_the_site(tmp_path: Path) -> None:
    nav = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(path.name for path in DOCS.glob("*.md"))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "troubleshooting.html").is_file()
