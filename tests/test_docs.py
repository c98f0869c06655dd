"""The documentation: its code runs, its links lead somewhere, and the names in it exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trt_dynamo.cli import app
from trt_dynamo.settings import FIELDS, variable_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))

# What a page's code may take as given.
GIVEN = """\
import torch
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(text: str) -> list[str]:
    """The Python code blocks of a page, in order; those in lists are indented."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def run(arguments: list[str], folder: Path = ROOT) -> str:
    """The output of a Python process that fails on whatever would end in eager."""
    environment = {**os.environ, "TRT_DYNAMO_RUNTIME": "reference", "PYTHONWARNINGS": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page.read_text())], ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join([GIVEN, *code_of(page.read_text())]))
    run([str(script)], tmp_path)  # where it may write what it shows


def test_the_pages_with_code_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/settings.md"} <= {
        name_of(page) for page in PAGES if code_of(page.read_text())
    }
    assert len(code_of((ROOT / "CONTRIBUTING.md").read_text())) == 4


def test_the_converter_of_five_minutes_is_used() -> None:
    code = code_of((ROOT / "CONTRIBUTING.md").read_text())
    check = "\nimport trt_dynamo\nassert trt_dynamo.report()['engine_calls'] == 1, trt_dynamo.report()"
    run(
        [
            "-c",
            "\n".join(
                [GIVEN, *code[:2], "import os\nos.environ['TRT_DYNAMO_MIN_SEGMENT_NODES'] = '1'", code[3], check]
            ),
        ]
    )


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "__main__" in e.read_text()], ids=name_of)
def test_an_example_runs_on_engines(example: Path) -> None:
    output = run([str(example)])
    assert "eager" in output
    differences = [float(number) for number in re.findall(r"from eager:? (\S+)", output)]
    assert differences
    assert max(differences) < 1e-5
    assert int(re.findall(r"engine.calls:? (\d+)", output)[0]) > 0


def test_the_example_for_explain() -> None:
    (example,) = (e for e in EXAMPLES if "def make" in e.read_text())
    output = run(["-m", "trt_dynamo", "explain", f"{name_of(example)}:make", "--set", "min_segment_nodes=1"])
    assert "aten.rand_like" in output or "aten.rand." in output
    assert "no converter" in output
    assert "2 TensorRT engines" in output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    inner = [target for target in targets if not target.startswith("http")]
    assert [target for target in inner if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_names_on_a_page_exist(page: Path) -> None:
    text = page.read_text()
    variables = {variable_of(name) for name in FIELDS} | {"TRT_DYNAMO_"}
    assert set(re.findall(r"\bTRT_DYNAMO_\w*", text)) - variables - {"TRT_DYNAMO_FLAVOR"} == set()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)) - targets == set()
    files = re.findall(r"`((?:tests|docs|scripts|benchmarks|examples|trt_dynamo)/[\w/.]+)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_on_a_page_exist(page: Path) -> None:
    for words in re.findall(r"python -m trt_dynamo ([a-z]+)", page.read_text()):
        result = CliRunner().invoke(app, [words, "--help"])
        assert result.exit_code == 0, result.output
    for module in re.findall(r"python -m ((?:benchmarks|scripts)[\w.]*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_readme_shows_every_default_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(TRT_DYNAMO_\w+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 5
    for name, variable, shown in rows:
        default = FIELDS[name].default
        assert variable == variable_of(name)
        expected = "none" if default in (None, ()) else str(int(default) if isinstance(default, bool) else default)
        assert shown.strip("` ") == expected, name
