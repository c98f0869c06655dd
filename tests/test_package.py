"""The package as others meet it: its metadata, its entry points, its public names, and what importing it costs."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trt_dynamo

ROOT = Path(__file__).parent.parent


def run(source: str) -> str:
    """What a new process prints; anything on stderr is a failure."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("trt-dynamo")
    assert metadata["Version"] == trt_dynamo.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra") or ()) == {
        "rtx",
        "tensorrt",
        "remote",
        "demo",
        "quantize",
        "modelopt",
        "bench",
        "ray",
        "dev",
    }


def test_torch_finds_both_names_without_an_import() -> None:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    ours = {entry.name: entry.value for entry in found if entry.dist is not None and entry.dist.name == "trt-dynamo"}
    assert ours == {"tensorrt": "trt_dynamo.backend:tensorrt", "trt_dynamo": "trt_dynamo.backend:tensorrt"}
    source = """
from torch._dynamo.backends.registry import list_backends, lookup_backend
for name in ("tensorrt", "trt_dynamo"):
    backend = lookup_backend(name)
    print(name in list_backends(exclude_tags=()), backend.__module__, backend.__name__)
"""
    assert run(source).splitlines() == ["True trt_dynamo.backend tensorrt"] * 2


def test_the_script_is_the_command_line() -> None:
    (script,) = [
        entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == "trt-dynamo"
    ]
    assert script.load().__module__ == "trt_dynamo.__main__"


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("trt_dynamo", "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"trt_dynamo-{trt_dynamo.__version__}-py3-none-any.whl"
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    packed = {name for name in names if name.parts[0] == "trt_dynamo"}
    assert packed == {path.relative_to(source) for path in (source / "trt_dynamo").rglob("*") if path.is_file()}
    assert Path("trt_dynamo/py.typed") in packed
    info = f"trt_dynamo-{trt_dynamo.__version__}.dist-info"
    assert {name.parts[0] for name in names} == {"trt_dynamo", info}
    assert Path(info, "licenses", "LICENSE") in names


def test_importing_torch_loads_nothing_of_ours() -> None:
    source = "import sys, torch; print([name for name in sys.modules if name.startswith(('trt_dynamo', 'tensorrt'))])"
    assert run(source) == "[]"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "tensorrt", "tensorrt_rtx", "cuda", "numpy", "sympy", "rich", "typer", "filelock", "platformdirs")
    assert run(f"import sys, trt_dynamo; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


def test_looking_up_the_backend_loads_no_tensorrt() -> None:
    source = "import sys, trt_dynamo.backend; print([n for n in sys.modules if n.startswith('tensorrt')])"
    assert run(source) == "[]"


def test_every_public_name_is_there() -> None:
    for name in trt_dynamo.__all__:
        assert getattr(trt_dynamo, name) is not None
        assert name in dir(trt_dynamo)
    assert set(trt_dynamo.LAZY) <= set(trt_dynamo.__all__)
    assert list(trt_dynamo.__all__) == sorted(trt_dynamo.__all__)


def test_a_public_name_is_what_it_says_whatever_was_imported_before() -> None:
    # Importing a module puts it into its package under its own name, where it would hide a function of that name.
    modules = {path.stem for path in (ROOT / "trt_dynamo").iterdir()}
    assert modules.isdisjoint(trt_dynamo.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'trt_dynamo' has no attribute 'tensort'"):
        trt_dynamo.tensort  # noqa: B018
    assert not hasattr(trt_dynamo, "__path_to_nowhere__")


WITHOUT = """
import sys
sys.modules.update(tensorrt=None, tensorrt_rtx=None)
import logging
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("trt_dynamo").addHandler(handler)
logging.getLogger("trt_dynamo").propagate = False
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
compiled = torch.compile(model, backend="tensorrt")
for rows in (3, 5):
    x = torch.randn(rows, 4)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
print(len(records), "pip install" in records[0], "eager" in records[0])
from trt_dynamo import *
import trt_dynamo
print(set(trt_dynamo.__all__) <= set(globals()))
"""


def test_without_tensorrt_models_run_in_eager_and_one_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRT_DYNAMO_STRICT")
    assert run(WITHOUT).splitlines() == ["1 True True", "True"]


def test_the_generated_pages_are_current() -> None:
    command = [sys.executable, "-m", "scripts.make_docs", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_is_not_current_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import make_docs

    monkeypatch.setattr(make_docs, "DOCS", tmp_path)
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0
    page = tmp_path / "operators.md"
    page.write_text(page.read_text().replace("`aten.relu`", "`aten.other`"))
    assert make_docs.main(["--check"]) == 1
