"""Where and how an engine runs: in threads, on streams, in CUDA graphs, beside eager, in another process.

Each case is a function of a `Trial`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from trt_dynamo.reports import report
from trt_dynamo.runtime.layer_times import layer_times
from trt_dynamo.selftest.models import network, rows
from trt_dynamo.selftest.trial import Trial, case

THREADS = 8


@case("threads.eight")
def eight_threads(t: Trial) -> None:
    """Eight threads call one compiled model at once."""
    model = network().to(t.device)
    compiled = t.same(model, *rows(8))
    wrong: list[str] = []

    def work() -> None:
        try:
            for x in rows(*[8] * 25):
                t.agree(compiled, model, x)
        except Exception as error:  # noqa: BLE001  a thread's error is the case's
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    t.answered()


@case("streams.side")
def side_streams(t: Trial) -> None:
    """Calls on several streams, in the order of each."""
    t.needs_gpu()
    model = network().to(t.device)
    compiled = t.same(model, *rows(8))
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    with torch.no_grad():
        for turn, x in enumerate(t.place(rows(*[8] * 30))):
            stream = streams[turn % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = x * 2  # the engine must wait for this,
                results.append((compiled(y) + 1, x))  # and this for the engine
        torch.cuda.synchronize()
        for result, x in results:
            t.compare(result, model(x * 2) + 1)
    t.answered()


def captured(t: Trial, **options: Any) -> None:
    """A call captured in a CUDA graph of the user's, replayed with other inputs."""
    t.needs_gpu()
    model = network().to(t.device)
    x = torch.randn(8, 32, device=t.device)
    compiled = t.same(model, x, **options)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compiled(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = compiled(x)
        for given in rows(8, 8, 8):
            x.copy_(given)
            graph.replay()
            t.compare(result, model(x))
    t.answered()


@case("cuda_graphs.captured_frozen")
def captured_frozen(t: Trial) -> None:
    """The user captures an engine whose weights are fixed."""
    captured(t, weights="frozen")


@case("cuda_graphs.captured_inputs")
def captured_inputs(t: Trial) -> None:
    """The user captures an engine that takes the weights as inputs."""
    captured(t, weights="inputs")


def own_graphs(t: Trial, mode: str) -> None:
    t.needs_gpu()
    model = network().to(t.device)
    compiled = t.compile(model, dynamic=True, cuda_graphs=mode)
    kept = []
    for count in [8] * 6 + [5] * 6 + [8] * 3:
        (x,) = t.place(rows(count))
        with torch.no_grad():
            kept.append((compiled(x), x))
    for result, x in kept:
        with torch.no_grad():
            t.compare(result, model(x))
    t.answered()
    counts = report()
    assert counts["replays"] >= 6, f"{counts['replays']} of 15 calls were replays of {counts['cuda_graphs']} graphs"


@case("cuda_graphs.auto")
def graphs_auto(t: Trial) -> None:
    """The setting `cuda_graphs=auto`: replays of two shapes, by turns."""
    own_graphs(t, "auto")


@case("cuda_graphs.whole")
def graphs_whole(t: Trial) -> None:
    """The setting `cuda_graphs=whole`: the whole call is one graph."""
    own_graphs(t, "whole")


# -- the rest ---------------------------------------------------------------------------------------------------------


def doubled(x: Tensor) -> Tensor:
    """Two engines, with float64, which TensorRT has not, between them."""
    wide = torch.tanh(x @ x.T).double()
    between = (wide.cos() * wide.exp() + 2 * wide).float()
    return between.relu() * 2 + 1


@case("fallback.eager")
def eager_between(t: Trial) -> None:
    """What TensorRT has no layer for runs in eager, between two engines."""
    t.same(doubled, *rows(8))
    t.answered(engines=2)


@case("fallback.inductor")
def inductor_between(t: Trial) -> None:
    """Inductor compiles what is between two engines."""
    if t.device.type == "cuda" and not has_triton():
        t.skip("Inductor needs Triton")
    if t.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        t.skip("Inductor needs a C++ compiler")
    t.same(doubled, *rows(8), fallback="inductor")
    t.answered(engines=2)
    assert report()["inductor_parts"] == 1, f"{report()['inductor_parts']} parts were compiled by Inductor"


@case("precision.auto")
def precision_auto(t: Trial) -> None:
    """The setting `precision=auto`: eager answers and records the values, then an engine in float16 what bears it."""
    model = network().to(t.device)
    compiled = t.compile(model, precision="auto", calibration_calls=2)
    for x in rows(8, 8, 8, 8):
        t.agree(compiled, model, x, tolerance=(1e-2, 1e-2))
    assert report()["engine_calls"] >= 2, f"no engine answered: {report()['eager_reasons']}"


@case("verify.first")
def verify_first(t: Trial) -> None:
    """The setting `verify`: the engine beside eager, in the model's types and in float16."""
    for precision in ("native", "fp16"):
        model = network().to(t.device)
        compiled = t.compile(model, precision=precision, verify="first")
        for x in rows(8, 8):
            t.agree(compiled, model, x, tolerance=(1e-2, 1e-2))
    assert report()["verified"] == 2, f"{report()['verified']} calls were compared"
    assert report()["breaches"] == 0, f"an engine differs: {report()['breach_reasons']}"


@case("profiling.layers")
def layers(t: Trial) -> None:
    """The engine's own profiler reports its layers."""
    with layer_times() as times:
        t.same(network(), *rows(8), cuda_graphs="off")
    spent = [ms for found in times.layers.values() for runs in found.values() for ms in runs]
    assert spent, "no layer was reported"
    assert all(ms >= 0 for ms in spent), f"a layer took {min(spent)} ms"


@case("recurrent.lstm")
def lstm(t: Trial) -> None:
    """An LSTM as a loop of TensorRT's."""
    with torch._dynamo.config.patch(allow_rnn=True):
        t.same(nn.LSTM(8, 16, num_layers=2, batch_first=True).eval(), torch.randn(2, 11, 8))


@case("cache.second_process")
def second_process(t: Trial) -> None:
    """Another process finds the engine in the cache, and builds nothing."""
    first, second = (in_another_process(t) for _ in range(2))
    assert (first["engines_built"], first["cache_hits"]) == (1, 0), f"the first process: {first}"
    assert (second["engines_built"], second["cache_hits"]) == (0, 1), f"the second process: {second}"
    t.compare(torch.tensor(second["answer"]), torch.tensor(first["answer"]))
    t.figures.engine_calls = 2


def in_another_process(t: Trial) -> dict[str, Any]:
    command = [sys.executable, "-m", "trt_dynamo.selftest.cached", t.runtime, str(t.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
