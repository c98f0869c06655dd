"""The selftest: it finds planted faults, loses nothing by a crash or a case that hangs, and says who answered."""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trt_dynamo.aten_converters.registry import CONVERTERS, lookup
from trt_dynamo.cli import app
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import report
from trt_dynamo.selftest import chosen, load_cases
from trt_dynamo.selftest.document import FORMAT, document, number, rows, told
from trt_dynamo.selftest.supervisor import AT_THE_END, environment, run_cases
from trt_dynamo.selftest.trial import CASES, Case, Skipped, Trial, case
from trt_dynamo.selftest.worker import outcome, shortened
from trt_dynamo.testing import trace

PLANTED = """
import atexit, ctypes, os, pathlib, subprocess, time
import torch
from trt_dynamo import converter
from trt_dynamo.selftest.trial import case

@converter(torch.ops.aten.relu.default, override=True)
def relu(net, x):
    return net.elementwise("PROD", net.activation("RELU", x), 1.5)

@case("planted.a_wrong_number")
def wrong(t):
    "a converter that is wrong"
    t.same(lambda x: torch.relu(x), torch.tensor([1.0, -2.0, 3.0]))

@case("planted.b_segfault")
def segfault(t):
    print("about to read address 0", flush=True)
    ctypes.string_at(0)

@case("planted.c_good")
def good(t):
    t.same(lambda x: torch.tanh(x) * 2, torch.randn(4, 4))

@case("planted.d_hang")
def hang(t):
    child = subprocess.Popen(["sleep", "1000"])
    pathlib.Path(__file__).with_name("pid").write_text(str(child.pid))
    child.wait()

@case("planted.e_leaves")
def leaves(t):
    os._exit(0)

@case("planted.f_raises")
def raises(t):
    raise KeyError("no such thing")

@case("planted.g_skipped")
def skipped(t):
    t.skip("not today")

@case("planted.h_noise_and_a_crash_at_the_end")
def last(t):
    atexit.register(os.kill, os.getpid(), 11)
    os.write(1, b'{"name": "noise", "status": "passed"}\\n')
    t.compare(torch.ones(2), torch.ones(2))
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    return file


@pytest.fixture(autouse=True)
def only_ours() -> Any:
    """What a file registers in this process is gone after the test."""
    load_cases()
    cases, converters = dict(CASES), dict(CONVERTERS)
    yield
    CASES.clear()
    CASES.update(cases)
    CONVERTERS.clear()
    CONVERTERS.update(converters)


def run_command(folder: Path, *arguments: str) -> tuple[int, str, str, dict[str, Any]]:
    """Exit code, stdout, stderr and the document of a selftest with the reference evaluator."""
    path = folder / "found.json"
    result = CliRunner().invoke(app, ["selftest", "--runtime", "reference", "--json", str(path), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr, json.loads(path.read_text()) if path.exists() else {}


def test_each_planted_fault_is_found_and_no_other_case_is_lost(planted: Path, tmp_path: Path) -> None:
    code, out, err, found = run_command(tmp_path, "--also", str(planted), "--only", "planted", "--limit", "8")
    assert (code, err) == (1, "")
    results = {result["name"].removeprefix("planted."): result for result in found["cases"]}
    assert {name: result["status"] for name, result in results.items()} == {
        "a_wrong_number": "failed",
        "b_segfault": "crashed",
        "c_good": "passed",
        "d_hang": "timeout",
        "e_leaves": "crashed",
        "f_raises": "error",
        "g_skipped": "skipped",
        "h_noise_and_a_crash_at_the_end": "passed",
        AT_THE_END: "crashed",
    }
    wrong = results["a_wrong_number"]
    assert "2 of 3 elements are not eager's; the largest difference is 1.5" in wrong["error"]
    assert (wrong["difference"], wrong["relative"], wrong["absolute"]) == (1.5, 1e-3, 1e-4)
    assert wrong["used"] > 100
    assert "signal SIGSEGV" in results["b_segfault"]["error"]
    assert "about to read address 0" in results["b_segfault"]["error"]
    assert "planted.py" in results["b_segfault"]["error"], "the Python stack of the crash"
    assert results["c_good"]["used"] < 1 and results["c_good"]["engine_calls"] == 2
    assert "no answer after 8 s" in results["d_hang"]["error"]
    assert "in hang" in results["d_hang"]["error"], "where it hung"
    assert not is_alive(int((tmp_path / "pid").read_text())), "what the case had started"
    assert "exit status 0" in results["e_leaves"]["error"]
    assert "KeyError: 'no such thing'" in results["f_raises"]["error"]
    assert results["g_skipped"]["error"] == "not today"
    assert "signal SIGSEGV" in results[AT_THE_END]["error"]
    assert found["counts"] == {"failed": 1, "crashed": 3, "passed": 2, "timeout": 1, "error": 1, "skipped": 1}
    assert "2 of 9 cases passed; 1 failed, 3 crashed, 1 timeout, 1 error, 1 skipped" in out
    assert "skipped 1 case: not today" in out
    assert "planted.b_segfault: crashed\n  the process ended (signal SIGSEGV)" in out


def test_a_good_run_says_who_answered_and_exits_with_0(tmp_path: Path) -> None:
    patterns = ["ops.activations.relu", "ops.attention.causal.float16", "weights.refit", "streams.side"]
    code, out, err, found = run_command(tmp_path, *(word for name in patterns for word in ("--only", name)))
    assert (code, err) == (0, "")
    statuses = {result["name"]: result["status"] for result in found["cases"]}
    assert statuses == dict.fromkeys(patterns, "passed") | {
        "streams.side": "passed" if torch.cuda.is_available() else "skipped"
    }
    assert "The answers are those of the reference evaluator of trt_dynamo, in PyTorch" in out
    assert "this says nothing about TensorRT's kernels" in found["answered_by"]
    assert (found["selftest"], found["runtime"]) == (FORMAT, "reference")
    assert found["machine"]["torch"]["version"] == torch.__version__
    assert {"tensorrt", "gpus", "driver", "python", "platform", "trt_dynamo"} <= set(found["machine"])
    (half,) = [result for result in found["cases"] if result["name"].endswith("float16")]
    assert 0 < half["used"] < 1 and half["difference"] > 0 and half["build_seconds"] > 0
    assert [line.split()[0] for line in out.splitlines()[1 : len(patterns) + 1]] == list(statuses)


@pytest.mark.slow
def test_every_case_passes_with_the_reference_evaluator(tmp_path: Path) -> None:
    code, out, _, found = run_command(tmp_path)
    assert code == 0, out
    assert found["counts"]["passed"] > 130
    assert not found["counts"].keys() - {"passed", "skipped"}


@pytest.mark.cuda
def test_the_cases_for_a_gpu_pass_with_the_reference_evaluator(tmp_path: Path) -> None:
    wanted = [word for name in ("streams", "cuda_graphs", "memory", "threads", "weights") for word in ("--only", name)]
    code, out, _, _ = run_command(tmp_path, *wanted)
    assert code == 0, out
    assert "needs a CUDA GPU" not in out


def test_every_family_of_converters_has_a_case() -> None:
    from trt_dynamo.selftest.operators import OPERATORS

    used = set()
    for specs in OPERATORS.values():
        for function, *makers in specs.values():
            graph = trace(function, [make() if callable(make) else torch.randn(make) for make in makers]).graph
            used |= {found.function.__module__ for node in graph.nodes if (found := lookup(node.target))}
    families = {found.function.__module__ for found in CONVERTERS.values()}
    # Those of recurrent layers are in the case `recurrent.lstm`.
    assert {name.rpartition(".")[2] for name in families - used} == {"recurrent", "recurrent_kernels"}


# -- who is compared with whom ----------------------------------------------------------------------------------------


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial("reference", tmp_path)


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (torch.ones(3), torch.ones(4), "(3,)"),
        (torch.ones(3), torch.ones(3, dtype=torch.float16), "torch.float32"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 elements"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "1 of 2 elements"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "1 of 1 elements"),
        (torch.tensor([1.0]), torch.tensor([1.002]), "atol=0.0001"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "1 results; eager gives 2"),
        ([torch.ones(1), 3], [torch.ones(1), 4], "result 1 is 3; eager gives 4"),
    ],
)
def test_a_comparison_finds(got: Any, want: Any, words: str, trial: Trial) -> None:
    with pytest.raises(AssertionError) as caught:
        trial.compare(got, want)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]),
        torch.tensor([]),
        torch.tensor([True, False]),
        torch.tensor([1.0, 1e30], dtype=torch.bfloat16),
    ],
)
def test_a_comparison_takes_the_same(value: torch.Tensor, trial: Trial) -> None:
    trial.compare(value, value.clone())
    assert trial.figures.used == 0


def test_a_comparison_says_how_much_of_the_tolerance_was_used(trial: Trial) -> None:
    trial.compare(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.00055]))
    assert trial.figures.used == pytest.approx(0.5, rel=0.01)
    assert trial.figures.difference == pytest.approx(0.00055, rel=0.01)
    trial.compare(torch.ones(2), torch.ones(2))
    assert trial.figures.used == pytest.approx(0.5, rel=0.01), "the worst of all comparisons stays"


def test_an_answer_that_no_engine_gave_is_a_failure(trial: Trial) -> None:
    with pytest.raises(AssertionError, match="no engine answered: the setting runtime=eager"):
        trial.same(lambda x: torch.relu(x) + 1, torch.randn(4), runtime="eager")


def test_a_call_in_eager_among_others_is_a_failure(trial: Trial) -> None:
    with pytest.raises(AssertionError, match="1 calls were answered in eager: outside the profile"):
        trial.same(
            lambda x: torch.relu(x) + 1, torch.randn(4, 8), dynamic=True, also=[[torch.randn(4000, 8)]], rebuild="never"
        )
    assert report()["engine_calls"] == 2


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("weights.refit", {"weights": "frozen"}, "elements are not eager's"),
        ("shapes.growth", {"rebuild": "never"}, "answered in eager"),
        ("precision.mixer.fp16", {"precision": "native"}, "the setting had no effect"),
        ("fallback.eager", {"min_segment_nodes": 100}, "no engine answered"),
    ],
)
def test_a_case_finds_the_fault_that_it_is_for(
    name: str, fault: dict[str, Any], words: str, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trial.compile

    def faulty(self: Trial, model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
        return whole(self, model, dynamic=dynamic, **{**options, **fault})

    monkeypatch.setattr(Trial, "compile", faulty)
    status, text = outcome(CASES[name], trial)
    assert (status, words in text) == ("failed", True), text


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (Skipped("needs a CUDA GPU"), "skipped", "needs a CUDA GPU"),
        (AssertionError("3 is not 4"), "failed", "3 is not 4"),
        (TrtDynamoError("TensorRT said no"), "error", "TrtDynamoError: TensorRT said no"),
        (ValueError("what"), "error", "ValueError: what"),
        (None, "passed", ""),
    ],
)
def test_what_comes_of_a_case(raised: Exception | None, status: str, words: str, trial: Trial) -> None:
    def run(given: Trial) -> None:
        if raised is not None:
            raise raised

    found, text = outcome(Case("a", run), trial)
    assert found == status
    assert text.strip().endswith(words)


def test_a_long_text_keeps_both_ends() -> None:
    text = shortened("begin" + "x" * 100_000 + "end")
    assert text.startswith("begin") and text.endswith("end") and len(text) < 5000


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_process_that_does_not_start_is_told_once_for_each_case(tmp_path: Path) -> None:
    file = tmp_path / "more.py"
    file.write_text("import sys\nsys.exit('a library is missing')\n")
    found = list(run_cases(["a", "b"], "reference", limit=30, files=[str(file)]))
    assert [(result["name"], result["status"]) for result in found] == [("a", "crashed"), ("b", "crashed")]
    assert all("did not start (exit status 1): a library is missing" in result["error"] for result in found)


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_found_and_leaves_no_process(tmp_path: Path) -> None:
    file, path = tmp_path / "more.py", tmp_path / "found.json"
    file.write_text(
        "import os, pathlib, time\nfrom trt_dynamo.selftest.trial import case\n"
        "@case('mine.a')\ndef a(t):\n    pass\n"
        "@case('mine.b')\ndef b(t):\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n    time.sleep(1000)\n"
    )
    command = [sys.executable, "-m", "trt_dynamo", "selftest", "--runtime", "reference", "--json", str(path)]
    running = subprocess.Popen([*command, "--also", str(file), "--only", "mine"], stderr=subprocess.PIPE)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.1)
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert [result["name"] for result in json.loads(path.read_text())["cases"]] == ["mine.a"]
    assert not is_alive(int((tmp_path / "pid").read_text()))


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_settings_of_the_shell_do_not_reach_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_DYNAMO_EAGER_OPS", "aten.relu")
    monkeypatch.setenv("TRT_DYNAMO_FLAVOR", "tensorrt_rtx")
    kept = environment()
    assert kept["TRT_DYNAMO_FLAVOR"] == "tensorrt_rtx"
    assert "TRT_DYNAMO_EAGER_OPS" not in kept and "TRT_DYNAMO_STRICT" not in kept
    assert kept["PATH"] == os.environ["PATH"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_list_names_the_cases_and_runs_none() -> None:
    result = CliRunner().invoke(app, ["selftest", "--list", "--only", "weights.*", "--only", "softmax"])
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert result.exit_code == 0
    assert {"weights.refit", "weights.inputs", "ops.normalization.softmax"} <= set(names)
    assert all(fnmatch.fnmatch(name, "weights.*") or "softmax" in name for name in names)
    assert "weights.two_models  Two instances of a class share one compiled graph, and not their weights." in lines


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--only", "nothing_like_this"], 2, "no case is like nothing_like_this"),
        (["--runtime", "inductor"], 2, "--runtime is tensorrt or reference, not 'inductor'"),
        (["--json", "nowhere/at/all.json", "--runtime", "reference"], 2, "cannot be written: No such file"),
        (["--also", "nowhere.py"], 2, "nowhere.py"),
    ],
)
def test_a_wrong_call_is_told_before_anything_runs(arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(app, ["selftest", *arguments])
    assert result.exit_code == code
    assert words in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="engines may run here")
def test_without_a_gpu_it_says_what_runs_without_one(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["selftest", "--json", str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no engine can run here: torch sees no CUDA GPU")
    assert "--runtime reference" in result.stderr
    assert not path.exists()


def test_patterns() -> None:
    names = ["ops.a.relu", "ops.a.relu6", "models.relu"]
    table: list[tuple[list[str], list[int]]] = [
        ([], [0, 1, 2]),
        (["relu6"], [1]),
        (["ops.*"], [0, 1]),
        (["*.relu"], [0, 2]),
        (["model?.relu", "relu6"], [1, 2]),
        (["none"], []),
    ]
    for patterns, wanted in table:
        assert chosen(names, patterns) == [names[index] for index in wanted], patterns


def test_two_cases_of_one_name_are_an_error() -> None:
    def nothing(t: Trial) -> None:
        return None

    case("mine")(nothing)
    with pytest.raises(ValueError, match="two cases 'mine'"):
        case("mine")(nothing)


def test_the_document_is_json_whatever_was_measured() -> None:
    result = {"name": "a", "status": "failed", "error": "x\ny", "seconds": 1.0, "difference": torch.inf, "used": 0.5}
    found = json.loads(json.dumps(document([result], "reference", 10), allow_nan=False))
    assert found["cases"][0]["difference"] == "inf"
    assert rows([result]) == [("a", "failed", "1.0", "inf", "0.500", "", "")]
    assert told([result]) == ["a: failed\n  x\n  y"]
    assert number({"seconds": 0.0}, "seconds", ".1f") == ""
