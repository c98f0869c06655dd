"""Many builds at once: models by precisions by targets, here or on a Ray cluster, and what of them is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.test_cache_remote import nothing_known  # noqa: F401  a fixture
from trt_dynamo import ray_builds
from trt_dynamo.build_jobs import Job, Result, planned, run, run_all
from trt_dynamo.cache import open_store
from trt_dynamo.cache.store import Store
from trt_dynamo.cli import app
from trt_dynamo.settings import PREFIX, Settings

MODEL = """
import os
import torch

def make():
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    return torch.nn.Sequential(*layers).eval(), (torch.ones(2, 16),)

def other():
    torch.manual_seed(1)
    layers = torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)
    return torch.nn.Sequential(*layers).eval(), (torch.ones(2, 8),)

def bad():
    raise ValueError("no such weights")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ahead_model.py"
    path.write_text(MODEL)
    return path


def outcomes(results: Any) -> list[tuple[str, str, str]]:
    return [(r.job.spec.rpartition(":")[2], r.job.target, r.outcome) for r in results]


def test_what_is_planned() -> None:
    jobs = planned(["a.py:f", "b.py:f", "a.py:f"], ["native", "fp16"], ["8.6", "8.9"], {"profiles": "2"}, True)
    wanted = [(s, p, t) for s in ("a.py:f", "b.py:f") for p in ("native", "fp16") for t in ("8.6", "8.9")]
    assert [(job.spec, job.precision, job.target) for job in jobs] == wanted
    assert all(job.options == {"profiles": "2"} and job.dynamic and job.folder == os.getcwd() for job in jobs)


def test_built_then_found_and_what_fails_costs_nobody_else(file: Path) -> None:
    jobs = planned([f"{file}:make", f"{file}:bad", f"{file}:other"], ["native"], ["8.6", "7.5", "8.9"], {})
    first, second = list(run_all(jobs)), list(run_all(jobs))
    rows = {"make": ("built", "failed", "built"), "bad": ("failed",) * 3, "other": ("built", "failed", "built")}
    targets = ("8.6", "7.5", "8.9")
    assert outcomes(first) == [(name, t, o) for name, row in rows.items() for t, o in zip(targets, row, strict=True)]
    again = [(name, target, "found" if outcome == "built" else outcome) for name, target, outcome in outcomes(first)]
    assert outcomes(second) == again
    assert [result.keys for result in first] == [result.keys for result in second]
    assert "no machine would use" in first[1].reason and first[3].reason == "ValueError: no such weights"
    good = [result for result in first if result.outcome == "built"]
    assert len({key for result in good for key in result.keys}) == 4 and all(r.new == 1 and r.bytes > 0 for r in good)


def test_a_model_is_loaded_once(file: Path) -> None:
    file.write_text(MODEL + "\ncalls = []\ndef counted():\n    calls.append(1)\n    return make()\n")
    assert [r.outcome for r in run_all(planned([f"{file}:counted"], ["native", "fp16"], ["8.6"], {}))] == ["built"] * 2
    assert sys.modules["ahead_model"].calls == [1]


@pytest.mark.parametrize("there", [True, False])
def test_a_path_is_the_users(file: Path, there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (job,) = planned(["ahead_model.py:make"], ["native"], ["8.6"], {})
    if not there:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(job).outcome == "built"


def test_a_job_has_the_variables_that_it_was_given(file: Path, tmp_path: Path) -> None:
    (job,) = planned([f"{file}:make"], ["native"], ["8.6"], {})
    before = dict(os.environ)
    found = run(job, {f"{PREFIX}CACHE_DIR": str(tmp_path / "theirs")})
    assert found.outcome == "built" and dict(os.environ) == before
    assert [e.key for e in Store(tmp_path / "theirs", 2**30).entries()] == [*found.keys]
    assert open_store(Settings.from_env()).entries() == []


def test_engines_that_were_here_get_into_the_remote_too(file: Path, tmp_path: Path) -> None:
    spec, remote = f"{file}:make", tmp_path / "remote"
    (job,) = planned([spec], ["native"], ["8.6"], {})
    (shared,) = planned([spec], ["native"], ["8.6"], {"cache_remote": str(remote)})
    assert run(job).outcome == "built" and not remote.exists()
    found = run(shared)
    assert (found.outcome, [path.stem for path in remote.iterdir()]) == ("found", [*found.keys])
    # Another machine finds them there.
    other = run(shared, {f"{PREFIX}CACHE_DIR": str(tmp_path / "other")})
    assert (other.outcome, other.keys) == ("found", found.keys)


def test_a_remote_that_takes_nothing_is_a_failure(file: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("a file")
    (job,) = planned([f"{file}:make"], ["native"], ["8.6"], {"cache_remote": str(tmp_path / "remote")})
    failed = run(job)
    assert failed.outcome == "failed" and "does not have all of the engines" in failed.reason
    assert [entry.key for entry in open_store(Settings.from_env()).entries()] == [*failed.keys]  # and here they stay


def test_a_cache_that_keeps_nothing_is_a_failure(file: Path) -> None:
    (job,) = planned([f"{file}:make"], ["native"], ["8.6"], {"cache_size": "1K"})
    failed = run(job)
    assert failed.outcome == "failed" and "did not keep 1 of 1 engines" in failed.reason


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["build", *arguments])


def test_the_command_prints_a_table(file: Path) -> None:
    done = invoke(f"{file}:make", f"{file}:bad", "--targets", "8.6, portable", "--precision", "native,FP16")
    lines = done.stdout.splitlines()
    assert done.exit_code == 1 and len(lines) == 9
    assert lines[0].split() == [
        "MODEL",
        "PRECISION",
        "TARGET",
        "OUTCOME",
        "ENGINES",
        "NEW",
        "SIZE",
        "SECONDS",
        "REASON",
    ]
    cells = [line.split()[1:6] for line in lines[1:5]]
    assert cells == [[p, t, "built", "1", "1"] for p in ("native", "fp16") for t in ("8.6", "portable")]
    assert all(line.endswith("ValueError: no such weights") for line in lines[5:])
    assert "[8/8]" in done.stderr


def test_the_command_as_json(file: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"input": [{"min": 2, "max": 32}, 16]}')
    done = invoke(f"{file}:make", "--targets", "8.9", "--profiles", "sizes.json", "--json")
    (found,) = json.loads(done.stdout)
    assert done.exit_code == 0, done.stderr
    assert (found["model"], found["precision"], found["target"]) == (f"{file}:make", "native", "8.9")
    assert (found["outcome"], found["engines"], found["new"], len(found["keys"])) == ("built", 1, 1, 1)
    assert found["bytes"] > 0 and found["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "new"], "not of the form 8.6"),
        (["--targets", ","], "want at least one value"),
        (["--precision", "fp12"], "Expected one of native"),
        (["--set", "targets=8.6"], "is --targets here"),
        (["--set", "nonsense=1"], "not a setting"),
        (["--profiles", "many"], "profiles"),
        (["--ray"], "--remote URL"),
    ],
)
def test_the_command_called_wrongly(file: Path, arguments: list[str], words: str) -> None:
    done = invoke(f"{file}:make", *arguments)
    assert done.exit_code == 2 and words in done.stderr


def test_without_ray(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ray_builds.RayMissing, match=r"pip install 'trt-dynamo\[ray\]'"):
        list(ray_builds.run_on_cluster(planned(["m.py:f"], ["native"], ["8.6"], {})))


class PlainRay(types.ModuleType):
    """Ray without a cluster: tasks run when their result is asked for; the last come first, and one is lost."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, function: Any) -> Any:
        def options(**options: Any) -> Any:
            self.asked.append(options)
            return types.SimpleNamespace(remote=lambda *args: lambda: function(*args))

        return types.SimpleNamespace(options=options)

    def wait(self, waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return waiting[-1:], waiting[:-1]

    def get(self, task: Any) -> Any:
        return task()

    def cancel(self, task: Any, force: bool) -> None:
        self.cancelled.append(task)


@pytest.fixture
def plain_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainRay]:
    ray = PlainRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_results_of_a_cluster_are_collected(plain_ray: PlainRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(job: Job, environ: Any) -> Result:
        assert environ == {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
        if job.target == "8.9":
            raise RuntimeError("The worker died\nunexpectedly")
        return Result(job, "built")

    monkeypatch.setattr(ray_builds, "run_in_worker", work)
    jobs = planned(["m.py:f"], ["native"], ["8.6", "8.9", "12.0"], {})
    results = list(ray_builds.run_on_cluster(jobs))
    assert [(r.job.target, r.outcome) for r in results] == [("12.0", "built"), ("8.9", "failed"), ("8.6", "built")]
    assert results[1].reason == "the task was lost: RuntimeError: The worker died unexpectedly"
    assert [(each["name"], each["max_retries"]) for each in plain_ray.asked] == [(str(job), 3) for job in jobs]
    assert plain_ray.cancelled == []


def test_tasks_end_with_the_command(plain_ray: PlainRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_builds, "run_in_worker", lambda job, environ: Result(job, "built"))
    results = ray_builds.run_on_cluster(planned(["m.py:f"], ["native"], ["8.6", "8.9", "12.0"], {}))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(plain_ray.cancelled) == 2


def test_the_command_on_a_cluster_keeps_the_order(file: Path, plain_ray: PlainRay, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    done = invoke(f"{file}:make", f"{file}:bad", "--targets", "8.6,8.9", "--ray", "--remote", str(remote), "--json")
    rows = [(row["model"].rpartition(":")[2], row["target"], row["outcome"]) for row in json.loads(done.stdout)]
    assert rows == [
        ("make", "8.6", "built"),
        ("make", "8.9", "built"),
        ("bad", "8.6", "failed"),
        ("bad", "8.9", "failed"),
    ]
    assert done.exit_code == 1 and len([*remote.iterdir()]) == 2


def wait_for(what: Any, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_killed_between_engines_nothing_is_lost(file: Path, tmp_path: Path) -> None:
    file.write_text(MODEL + "\ndef hangs():\n    import time\n    time.sleep(600)\n")
    store = open_store(Settings.from_env())
    command = [sys.executable, "-m", "trt_dynamo", "build", "--targets", "8.6"]
    child = subprocess.Popen(
        [*command, f"{file}:make", f"{file}:hangs"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(store.entries)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = subprocess.run([*command, f"{file}:make", f"{file}:other", "--json"], capture_output=True, text=True)
    assert [row["outcome"] for row in json.loads(done.stdout)] == ["found", "built"], done.stderr
    assert store.verify() == [] and len(store.entries()) == 2


@pytest.mark.slow
def test_a_cluster_of_ray(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a real cluster, one of which is killed while it builds."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    mark, remote = tmp_path / "first", tmp_path / "remote"
    dying = (
        "\ndef dies_once():\n    import signal\n"
        f"    try:\n        open({str(mark)!r}, 'x').close()\n    except FileExistsError:\n        return make()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    file.write_text(MODEL + dying)
    command = [sys.executable, "-m", "trt_dynamo", "build", f"{file}:dies_once", f"{file}:other", f"{file}:bad"]
    command += ["--targets", "8.6,8.9", "--ray", "--remote", str(remote), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1 and done.stdout, done.stderr
    rows = [(row["model"].rpartition(":")[2], row["outcome"]) for row in json.loads(done.stdout)]
    assert rows == [
        (name, outcome)
        for name, outcome in (("dies_once", "built"), ("other", "built"), ("bad", "failed"))
        for _ in "ab"
    ]
    assert mark.exists() and len([*remote.glob("*.engine")]) == 4
