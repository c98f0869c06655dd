"""What a profiler, a log and a trace see of a compiled model: names, reasons, layers' times; and nothing, unasked."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import tracing
from trt_dynamo.cli import app
from trt_dynamo.errors import EngineError, TrtDynamoError
from trt_dynamo.layer_profile import LayerProfile, profile_layers
from trt_dynamo.reports import report
from trt_dynamo.runtime import layer_times, profiling
from trt_dynamo.runtime.engine import Engine

# The engines are those of `first @ x` and of what comes after float64, which stays in eager.
SPLIT = [torch.randn(4, 4)]


def split(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ x).double().cumsum(0).float() * 2 + x


def names_in(prof: profile) -> list[str]:
    """Our records, in order, with the depth of each among ours: `  x` is inside of what comes before."""
    events = [event for event in prof.events() or () if event.name.startswith("graph_")]
    ours = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    inside = [
        sum(o is not e and o.time_range.start <= e.time_range.start < o.time_range.end for o in ours) for e in ours
    ]
    return ["  " * depth + event.name for depth, event in zip(inside, ours, strict=True)]


def recorded(function: Any, *args: Any) -> list[str]:
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as prof:
        function(*args)
    return names_in(prof)


def test_each_segment_is_a_record_with_its_name() -> None:
    model = compiled(split)
    with torch.no_grad():
        assert_same(model(*SPLIT), split(*SPLIT))
    assert recorded(model, *SPLIT) == ["graph_0.segment_0", "graph_0.segment_1"]


def test_a_record_names_the_reason_where_eager_answers() -> None:
    model = compiled(lambda x: torch.relu(x @ x.T) + 1, dynamic=True, rebuild="never")
    with torch.no_grad():
        model(torch.randn(4, 8))
    # Larger than any that the engine takes.
    assert recorded(model, torch.randn(1200, 8)) == [
        "graph_0.segment_0",
        "  graph_0.segment_0 in eager: outside the profile",
    ]


def test_a_broken_segment_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Engine, args: Any) -> Any:
        raise EngineError("the GPU\nis on fire " + "x" * 500)

    model = compiled(lambda x: torch.relu(x) * 2 + x, strict=False)
    with torch.no_grad():
        model(*SPLIT)
        monkeypatch.setattr(Engine, "__call__", fails)
        outer, inner = recorded(model, *SPLIT)
    assert outer == "graph_0.segment_0"
    assert inner.strip() == "graph_0.segment_0 in eager: the engine failed"
    assert "the GPU is on fire" in recorded(model, *SPLIT)[1]
    assert all(len(name) < 200 and "\n" not in name for name in recorded(model, *SPLIT))


def test_an_error_of_the_engine_closes_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(lambda x: torch.relu(x) * 2 + x)
    with torch.no_grad():
        model(*SPLIT)
        monkeypatch.setattr(Engine, "__call__", lambda self, args: 1 / 0)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as prof:
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    model(*SPLIT)
    assert names_in(prof) == ["graph_0.segment_0"] * 2


def test_nothing_is_recorded_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(split)

    def never(*args: Any) -> Any:
        raise AssertionError("a record was made that nobody reads")

    with torch.no_grad():
        model(*SPLIT)
        monkeypatch.setattr(torch.autograd.profiler, "record_function", never)
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", never)
        assert_same(model(*SPLIT), split(*SPLIT))
        with (
            profile(activities=[ProfilerActivity.CPU], acc_events=True),
            pytest.raises(AssertionError, match="nobody reads"),
        ):
            model(*SPLIT)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An NVTX that notes its ranges: `+name` where one begins, `-` where it ends."""
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: ranges.append(f"+{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: ranges.append("-"))
    profiling.why_no_nvtx.cache_clear()
    yield ranges
    profiling.why_no_nvtx.cache_clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_nvtx_ranges_come_by_the_setting_alone(wanted: bool, nvtx: list[str]) -> None:
    model = compiled(split, nvtx=wanted)
    with torch.no_grad():
        assert_same(model(*SPLIT), split(*SPLIT))
    assert nvtx == (["+graph_0.segment_0", "-", "+graph_0.segment_1", "-"] if wanted else [])


def test_an_nvtx_range_ends_also_after_an_error(nvtx: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(lambda x: torch.relu(x) * 2 + x, nvtx=True)
    monkeypatch.setattr(Engine, "__call__", lambda self, args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(*SPLIT)
    assert nvtx == ["+graph_0.segment_0", "-"]


def test_a_torch_without_nvtx_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(name: str) -> None:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "mark", missing)
    profiling.why_no_nvtx.cache_clear()
    model = compiled(split, nvtx=True)
    with torch.no_grad():
        assert_same(model(*SPLIT), split(*SPLIT))
    profiling.why_no_nvtx.cache_clear()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "nvtx=1, but no ranges can be made: NVTX functions not installed"
    ]


@pytest.mark.cuda
def test_emit_nvtx_takes_the_same_names() -> None:
    x = torch.randn(4, 4, device="cuda")
    model = compiled(split, nvtx=True)
    with torch.no_grad():
        model(x)
        with torch.autograd.profiler.emit_nvtx():
            assert profiling.wanted()
            assert_same(model(x), split(x))
    assert not profiling.wanted()


@pytest.mark.cuda
def test_a_call_that_is_one_cuda_graph_has_a_record() -> None:
    x = torch.randn(4, 4, device="cuda")
    model = compiled(lambda x: torch.relu(x @ x).cumsum(0) * 2, cuda_graphs="whole")
    with torch.no_grad():
        for _ in range(8):
            model(x)
    assert report()["replays"]
    assert recorded(model, x) == ["graph_0 by CUDA graph"]


# -- layers -----------------------------------------------------------------------------------------------------------


def test_the_layers_of_each_segment_are_timed() -> None:
    calls = 4
    found = profile_layers(split, SPLIT, {}, options={"runtime": "reference", "min_segment_nodes": 1}, calls=calls)
    assert list(found.segments) == ["graph_0.segment_0", "graph_0.segment_1"]
    first, second = found.segments.values()
    assert {"mm", "relu"} <= {name.split(".")[0] for name in first}
    assert {"mul", "add"} <= {name.split(".")[0] for name in second}
    assert not {"mm", "relu"} & {name.split(".")[0] for name in second}
    assert all(0 < spent < 10_000 for spent in [*first.values(), *second.values()])
    assert (found.runtime, found.calls, found.eager) == ("reference", calls, {})
    assert json.loads(json.dumps(found.as_dict()))["segments"] == found.segments


def test_a_slow_layer_takes_the_time() -> None:
    x, y = torch.randn(600, 600), torch.randn(4, 4)
    options = {"runtime": "reference", "min_segment_nodes": 1}
    (layers,) = profile_layers(lambda x, y: (x @ x, y + 1), (x, y), {}, options=options).segments.values()
    assert max(layers, key=lambda name: layers[name]).startswith("mm")


def test_only_the_calls_after_the_warm_up_count(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    note = layer_times.LayerTimes.note

    def noted(self: layer_times.LayerTimes, segment: str, layer: str, milliseconds: float) -> None:
        runs.append(layer)
        note(self, segment, layer, 6.0)

    monkeypatch.setattr(layer_times.LayerTimes, "note", noted)
    options = {"runtime": "reference", "min_segment_nodes": 1}
    (layers,) = profile_layers(lambda x: torch.relu(x) + 1, SPLIT, {}, options=options, calls=2).segments.values()
    assert len(runs) == (2 + 3) * len(layers)
    assert set(layers.values()) == {6.0}


def test_threads_are_timed_under_their_own_segments() -> None:
    models = [compiled(lambda x: torch.relu(x @ x) + 1), compiled(lambda x: torch.tanh(x * 3))]
    with layer_times.layer_times() as times, torch.no_grad():
        for model in models:
            model(*SPLIT)
        times.forget()

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    models[number](*SPLIT)

        in_threads(2, work)
    first, second = (times.layers[f"graph_{i}.segment_0"] for i in range(2))
    assert {len(runs) for runs in [*first.values(), *second.values()]} == {20}
    assert any(name.startswith("mm") for name in first) and not any(name.startswith("mm") for name in second)
    assert any(name.startswith("tanh") for name in second)


def test_engines_report_nothing_after_the_collection() -> None:
    model = compiled(lambda x: torch.relu(x) + 1)
    with layer_times.layer_times() as times, torch.no_grad():
        model(*SPLIT)
    before = {name: len(runs) for name, runs in times.layers["graph_0.segment_0"].items()}
    with torch.no_grad():
        assert_same(model(*SPLIT), torch.relu(SPLIT[0]) + 1)
    assert {name: len(runs) for name, runs in times.layers["graph_0.segment_0"].items()} == before


def test_a_model_without_an_engine_says_why() -> None:
    with pytest.raises(TrtDynamoError, match=r"no engine answered: no part of the model"):
        profile_layers(lambda x: x + 1, SPLIT, {}, options={"runtime": "reference", "strict": False})


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\n"
        "def make():\n"
        "    layers = [torch.nn.Linear(8, 8) for _ in range(12)]\n"
        "    return torch.nn.Sequential(*layers, torch.nn.ReLU()).eval(), (torch.randn(2, 8),)\n"
    )
    return file


def test_explain_profile_shows_the_slowest_layers(model_file: Path) -> None:
    command = ["explain", "--profile", f"{model_file}:make", "--set", "runtime=reference"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    explained, table = result.stdout.split("\n\n", 1)
    assert "in 1 TensorRT engine" in explained
    heading, columns, *rows = table.splitlines()
    total, layers = re.fullmatch(
        r"graph_0\.segment_0: ([\d.]+) ms in (\d+) layers, a mean of 10 calls", heading
    ).groups()  # type: ignore[union-attr]
    shown = [float(row.split()[0]) for row in rows if "addmm" in row or "relu" in row]
    assert columns.split() == ["MS", "SHARE", "LAYER"]
    assert shown == sorted(shown, reverse=True) and len(shown) == 20
    rest = re.search(r"([\d.]+) ms in (\d+) further layers; --json has all", table)
    assert rest is not None and int(rest[2]) == int(layers) - 20
    assert float(rest[1]) + sum(shown) == pytest.approx(float(total), abs=0.02)
    assert table.rstrip().endswith("which say nothing about the speed of an engine.")

    facts = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert len(facts["segments"]) == 1
    assert [len(found) for found in facts["profile"]["segments"].values()] == [int(layers)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="engines may run here")
def test_explain_profile_says_where_no_engine_can_run(model_file: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "--profile", f"{model_file}:make"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no engine can run here, so no layer can be timed: torch sees no CUDA GPU")
    assert "--set runtime=reference" in result.stderr


# -- logs and traces --------------------------------------------------------------------------------------------------

PROGRAM = """
import torch
def split(x): return torch.relu(x @ x).double().cumsum(0).float() * 2 + x
def whole(x): return torch.tanh(x) * 3
options = {"runtime": "reference", "min_segment_nodes": 1}
with torch.no_grad():
    torch.compile(split, backend="tensorrt", options=options)(torch.randn(4, 4))
    torch.compile(whole, backend="tensorrt", options={"runtime": "eager"})(torch.randn(4, 4))
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done


def artifacts(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Ours in the trace: its record and its payload, by name."""
    (file,) = folder.glob("*.log")
    found = {}
    for line in re.split(r"\n(?=V)", file.read_text()):
        head, _, payload = line.partition("\n")
        record = json.loads(head.split("] ", 1)[1])
        name = record.get("artifact", {}).get("name", "")
        if name.startswith("trt_dynamo."):
            found[name.removeprefix("trt_dynamo.")] = (record, re.sub(r"^\t", "", payload, flags=re.MULTILINE))
    return found


def test_a_trace_has_the_graph_the_partition_each_engine_and_the_reasons(tmp_path: Path) -> None:
    logged = run(TORCH_TRACE=str(tmp_path / "trace"), TORCH_LOGS="+trt_dynamo").stderr
    found = artifacts(tmp_path / "trace")
    assert set(found) == {
        "lowered", "partition", "partitioned", "graph_0.segment_0", "graph_0.segment_1", "why.eager_graphs",
    }  # fmt: skip
    text = {name: payload for name, (_, payload) in found.items()}
    assert "torch.ops.aten.cumsum.default" in text["lowered"]
    assert "self.segment_0(" in text["partitioned"] and "class segment_1" in text["partitioned"]
    assert re.search(r"^segment_0: mm, relu; weights: -$", text["partition"], re.MULTILINE)
    assert re.search(r"^cumsum \(aten\.cumsum\.default\): .*float64", text["partition"], re.MULTILINE)
    built = json.loads(text["graph_0.segment_1"])
    assert (built["segment"], built["reason"], built["error"]) == ("graph_0.segment_1", "new graph", None)
    assert text["why.eager_graphs"] == "the setting runtime=eager"
    assert [found[name][0]["frame_id"] for name in ("lowered", "why.eager_graphs")] == [0, 1]
    for words in ("lowered:", "segment_0: mm, relu", "graph_0.segment_1: built in", "the setting runtime=eager"):
        assert words in logged


@pytest.mark.slow
def test_torch_logs_takes_the_name_of_a_part() -> None:
    logged = run(TORCH_LOGS="+trt_dynamo.partition").stderr
    assert "segment_0: mm, relu" in logged and "class segment_1" in logged
    assert "lowered:" not in logged and "built in" not in logged


def test_texts_are_made_only_where_somebody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> str:
        raise AssertionError("a text that nobody reads")

    log = logging.getLogger("trt_dynamo.test")
    log.setLevel(logging.INFO)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    tracing.trace(log, "name", never)
    tracing.trace_data("name", never)  # type: ignore[arg-type]
    log.setLevel(logging.DEBUG)
    with pytest.raises(AssertionError, match="nobody reads"):
        tracing.trace(log, "name", never)


def test_a_reason_is_told_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trt_dynamo.reports")
    model = compiled(lambda x: torch.relu(x @ x.T) + 1, dynamic=True, rebuild="never")
    with torch.no_grad():
        model(torch.randn(4, 8))
        for _ in range(3):
            model(torch.randn(1200, 8))
    assert report()["eager_reasons"] == {"outside the profile": 3}
    assert [r.getMessage() for r in caplog.records if "why." in r.getMessage()] == [
        "why.eager_calls:\noutside the profile"
    ]


def test_a_profile_is_plain_data() -> None:
    found = LayerProfile("reference", 1, {"a": {"b": 1.5}}, {"why": 2})
    assert found.as_dict() == {"runtime": "reference", "calls": 1, "segments": {"a": {"b": 1.5}}, "eager": {"why": 2}}
