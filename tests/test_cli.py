"""The command line, as a person and as a program use it: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trt_dynamo.__main__ import main
from trt_dynamo.cache import Plan, Store
from trt_dynamo.cli import app
from trt_dynamo.cli.output import date, plural, size
from trt_dynamo.settings import FIELDS

MODEL = """
import torch
from beside import WIDTH

def make():
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.ReLU()).eval(), (torch.randn(2, WIDTH),)

def with_keywords():
    return (lambda x, *, scale: torch.relu(x) * scale), [torch.randn(3)], {"scale": 2.0}

def unconvertible():
    return (lambda x: torch.relu(x).double() * 2), (torch.tensor([0.0, 1.0]),)

def wants_something(x):
    return x

def raises():
    raise TypeError("my own mistake")

def nothing():
    return None

def alone():
    return (make,)

def no_model():
    return 5, ()

def no_args():
    return make, torch.ones(2)

def bad_keywords():
    return make, (), {1: 2}

NUMBER = 7
"""


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own."""
    command = [sys.executable, "-m", "trt_dynamo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with models, which imports a module beside it."""
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    file = tmp_path / "models.py"
    file.write_text(MODEL)
    return file


@pytest.fixture
def store() -> Store:
    """The cache that the commands will see, with two entries."""
    store = Store(Path(os.environ["TRT_DYNAMO_CACHE_DIR"]), 2**30)
    for letter in "ab":
        assert store.put(letter * 64, Plan(b"plan" * 1000, {"inputs": [1], "outputs": []}))
    return store


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "info",
        "demo",
        "explain",
        "ops",
        "selftest",
        *(f"cache {c}".strip() for c in ("", "list", "stats", "verify", "prune", "clear", "export", "import")),
    ],
)
def test_every_command_has_help(arguments: str) -> None:
    code, out, err = call(*arguments.split(), "--help")
    assert code == 0
    assert "Usage" in out
    assert err == ""


def test_help_answers_without_loading_torch() -> None:
    source = "import sys, trt_dynamo.cli; print([n for n in ('torch', 'tensorrt_rtx', 'sympy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unknown_command_exits_with_2() -> None:
    done = process("inof")
    assert done.returncode == 2
    assert "inof" in done.stderr
    assert done.stdout == ""


def test_info_says_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TRT_DYNAMO_EAGER_OPS", "aten.gelu,aten.mm")
    monkeypatch.setenv("TRT_DYNAMO_CACHE_SIZE", "3GB")
    code, out, _ = call("info")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == 0
    assert torch.__version__ in lines["torch"]
    assert "tensorrt" in lines["TensorRT"]
    assert lines["eager_ops"].split() == ["eager_ops", "aten.gelu,aten.mm", "TRT_DYNAMO_EAGER_OPS"]
    assert lines["cache_size"].split() == ["cache_size", "3.0", "GB", "TRT_DYNAMO_CACHE_SIZE"]
    assert lines["rebuild_after"].split() == ["rebuild_after", "8", "default"]
    assert f"cache       {os.environ['TRT_DYNAMO_CACHE_DIR']} (0 entries, 0 B of 3.0 GB)" in out.splitlines()
    assert set(FIELDS) <= set(lines)


def test_info_as_json_is_complete() -> None:
    code, out, err = call("info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert set(facts["settings"]) == set(FIELDS)
    assert facts["settings"]["strict"] == {"value": True, "source": "TRT_DYNAMO_STRICT"}
    assert facts["settings"]["cache"] == {"value": "on", "source": "default"}
    assert (facts["driver"]["cuda"] is None) != (facts["driver"]["missing"] is None)
    assert (facts["tensorrt"]["version"] is None) != (facts["tensorrt"]["missing"] is None)
    assert facts["cache"]["entries"] == 0
    assert facts["problems"] == []


def test_info_names_each_mistake_in_the_environment_once() -> None:
    done = process("info", TRT_DYNAMO_CACHEDIR="/x", TRT_DYNAMO_PROGRESS="sometimes")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count("TRT_DYNAMO_CACHEDIR is not a setting") == 1
    assert "Did you mean 'TRT_DYNAMO_CACHE_DIR'?" in done.stdout
    assert done.stdout.count("TRT_DYNAMO_PROGRESS cannot be 'sometimes'") == 1


def test_info_without_tensorrt_says_what_to_install() -> None:
    source = (
        "import sys; sys.modules.update(tensorrt=None, tensorrt_rtx=None); from trt_dynamo.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", source, "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "pip install" in done.stdout
    assert "cannot run here" in done.stdout


def test_info_with_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_dynamo.cli.info import driver

    result = types.SimpleNamespace(CUDA_SUCCESS=0)
    cuda = types.SimpleNamespace(CUresult=result, cuDriverGetVersion=lambda: (0, 13020))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=cuda))
    assert driver() == {"cuda": "13.2", "missing": None}


def test_info_with_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_dynamo.cli.info import driver

    failure = types.SimpleNamespace(name="CUDA_ERROR_UNKNOWN")
    result = types.SimpleNamespace(CUDA_SUCCESS=0)
    cuda = types.SimpleNamespace(CUresult=result, cuDriverGetVersion=lambda: (failure, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=cuda))
    assert driver() == {"cuda": None, "missing": "the driver answers CUDA_ERROR_UNKNOWN"}


def test_a_terminal_gets_a_drawn_table_and_a_pipe_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_DYNAMO_EAGER_OPS", ",".join(f"aten.a_rather_long_name_{i}" for i in range(20)))
    monkeypatch.setenv("COLUMNS", "60")
    _, plain, _ = call("info")
    assert os.environ["TRT_DYNAMO_EAGER_OPS"] in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, drawn, _ = call("info")
    assert "─" in drawn
    assert "─" not in plain
    assert os.environ["TRT_DYNAMO_EAGER_OPS"] not in drawn, "a terminal's table is folded to its width"


def test_cache_list(store: Store) -> None:
    code, out, _ = call("cache", "list")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["KEY", "SIZE", "BUILT", "LAST", "USED", "BY", "ENGINE"]
    assert {line[:12] for line in lines[1:3]} == {"a" * 12, "b" * 12}
    assert lines[-1].startswith("2 entries, ")
    assert str(store.folder) in lines[-1]


def test_cache_list_as_json(store: Store) -> None:
    code, out, _ = call("cache", "list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {entry["key"] for entry in listed["entries"]} == {"a" * 64, "b" * 64}
    assert all(entry["size"] > 4000 for entry in listed["entries"])
    assert listed["folder"] == str(store.folder)


def test_cache_list_of_a_folder_that_is_not_there() -> None:
    code, out, _ = call("cache", "list")
    assert code == 0
    assert out.startswith("0 entries, 0 B of 20.0 GB, in ")


def test_cache_verify_finds_and_removes_what_is_damaged(store: Store) -> None:
    assert call("cache", "verify")[:2] == (0, f"2 entries whole, 0 damaged, in {store.folder}\n")
    plan = store.path("a" * 64) / "plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    code, out, _ = call("cache", "verify")
    assert code == 1
    assert f"damaged: {'a' * 64}: " in out
    assert "1 entry whole, 1 damaged" in out
    code, out, _ = call("cache", "verify", "--json")
    assert code == 0
    assert json.loads(out) == {"folder": str(store.folder), "whole": 1, "damaged": [], "refused": []}


def test_cache_clear_removes_all(store: Store) -> None:
    code, out, _ = call("cache", "clear")
    assert code == 0
    assert out.startswith("removed 2 entries, ")
    assert store.entries() == []
    assert json.loads(call("cache", "clear", "--json")[1])["removed"] == []


@pytest.mark.parametrize("command", ["list", "verify", "clear"])
def test_a_cache_that_others_can_write_is_refused(command: str, store: Store) -> None:
    store.folder.chmod(0o777)
    code, out, err = call("cache", command)
    assert code == 1
    assert out == ""
    assert "chmod 700" in err
    store.folder.chmod(0o700)
    assert len(store.entries()) == 2


def test_ops_lists_every_converter() -> None:
    from trt_dynamo.aten_converters import CONVERTERS

    listed = json.loads(call("ops", "--json")[1])
    names = {f"{row['op']}.{overload}" for row in listed for overload in row["overloads"]}
    assert names == {str(target) for target in CONVERTERS}
    code, out, _ = call("ops")
    assert code == 0
    assert out.splitlines()[-1] == f"{len({row['op'] for row in listed})} operators, {len(CONVERTERS)} overloads"
    page = call("ops", "--markdown")[1]
    assert all(f"| `{row['op']}` |" in page.split("## With a converter")[1] for row in listed)


def test_the_operators_page_accounts_for_all_of_core_aten() -> None:
    page = call("ops", "--markdown")[1]
    total = int(re.findall(r"tags (\d+) overloads", page)[0])
    counts = [int(n) for n in re.findall(r"^\| [^`|]+ \| (\d+) \|$", page, re.MULTILINE)]
    core = page.split("These stay in eager")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in core.strip().splitlines()[4:]]
    assert total >= 190
    assert sum(counts) == total
    assert len([row for row in rows if row[1] != "a converter"]) == counts[-1] <= 12
    assert all(cell for row in rows for cell in row)


def test_ops_knows_a_users_converters(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom trt_dynamo import converter\n"
        "@converter(torch.ops.aten._linalg_eigh.default)\ndef eigh(net, x): return x\n"
    )
    done = process("ops", "--import", "mine", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines() if "eigh" in line] == [
        ["aten._linalg_eigh", "default", "mine"]
    ]


def test_ops_with_a_module_that_is_not_there() -> None:
    assert call("ops", "--import", "no_such_module") == (
        2,
        "",
        "error: no_such_module cannot be imported: No module named 'no_such_module'\n",
    )


def test_output_cut_off_by_the_reader_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trt_dynamo", "ops"]
    with os.fdopen(write) as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""


def test_explain_tells_what_goes_where(model: Path) -> None:
    code, out, _ = call("explain", f"{model}:make", "--set", "min_segment_nodes=1")
    assert code == 0
    assert "in 1 TensorRT engine" in out
    facts = json.loads(call("explain", f"{model}:make", "--set", "min_segment_nodes=1", "--json")[1])
    assert len(facts["segments"]) == 1
    assert facts["converted"] == len(facts["segments"][0]["nodes"])
    assert facts["eager"] == []


def test_explain_hands_on_keywords_and_settings(model: Path) -> None:
    spec = f"{model}:with_keywords"
    facts = json.loads(
        call("explain", spec, "--json", "--set", "min_segment_nodes=1", "--set", "eager_ops=aten.relu")[1]
    )
    assert [verdict["target"] for verdict in facts["eager"]] == ["aten.relu.default"]
    assert facts["converted"] == 1


def test_explain_gives_the_reason_of_what_stays_in_eager(model: Path) -> None:
    facts = json.loads(call("explain", f"{model}:unconvertible", "--json")[1])
    reasons = {verdict["target"]: verdict["reason"] for verdict in facts["eager"]}
    assert "float64" in reasons["aten.mul.Tensor"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("wants_something", "must take no arguments"),
        ("nothing", "must return (model, args) or (model, args, kwargs), not NoneType"),
        ("alone", "not tuple of 1"),
        ("no_model", "its model, int, cannot be called"),
        ("no_args", "its args must be a tuple, not Tensor"),
        ("bad_keywords", "its kwargs must be a dict with names as keys"),
        ("maek", "has no function 'maek'; did you mean 'make'?"),
        ("NUMBER", "has no function 'NUMBER'"),
        ("zzzzzz", "has no function 'zzzzzz'\n"),
        ("", "is not FILE:FUNCTION, for example model.py:make"),
    ],
)
def test_explain_refuses_a_bad_function(model: Path, function: str, words: str) -> None:
    code, out, err = call("explain", f"{model}:{function}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "is not FILE:FUNCTION"),
        ("model.py", "is not FILE:FUNCTION"),
        (":make", "is not FILE:FUNCTION"),
        ("nowhere/model.py:make", "there is no file nowhere/model.py"),
        (f"{Path(__file__).parent}:make", "there is no file"),
        (f"{Path(__file__).parent.parent / 'LICENSE'}:make", "is not a Python file"),
    ],
)
def test_explain_refuses_a_bad_file(spec: str, words: str) -> None:
    code, _, err = call("explain", spec)
    assert code == 2
    assert words in err


@pytest.mark.parametrize("text", ["min_segment_nodes", "=1", ""])
def test_explain_refuses_a_setting_without_a_value(text: str, model: Path) -> None:
    code, _, err = call("explain", f"{model}:make", "--set", text)
    assert code == 2
    assert f"--set wants NAME=VALUE, not {text!r}" in err


def test_an_error_of_ours_is_a_line_and_not_a_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trt-dynamo", "explain", f"{model}:make", "--set", "min_segment_node=1"])
    with pytest.raises(SystemExit) as caught:
        main()
    err = capsys.readouterr().err
    assert caught.value.code == 1
    assert err.startswith("error: option 'min_segment_node' is not a setting of trt_dynamo. Did you mean")
    assert err.count("\n") == 1


def test_an_error_of_the_users_is_shown_where_it_is(model: Path) -> None:
    done = process("explain", f"{model}:raises")
    assert done.returncode == 1
    assert "my own mistake" in done.stderr
    assert "models.py" in done.stderr


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_demo_is_the_demo_with_its_exit_code(result: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trt_dynamo.demo", types.SimpleNamespace(main=lambda: result))
    assert call("demo")[0] == code


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 20 * 2**30, 2**50)] == ["0 B", "1023 B", "1.5 KB", "20.0 GB", "1024.0 TB"]
    assert (plural(1, "entry", "entries"), plural(0, "entry", "entries"), plural(2, "op")) == (
        "1 entry",
        "0 entries",
        "2 ops",
    )
    assert date(0) == ""
    assert date(86400 * 365)[:2] == "19"
