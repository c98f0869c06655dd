"""What an engine must do besides computing: follow shapes, weights and memory, serve threads and streams, be cached.

Each case is a function of a `Trial`. What it says of TensorRT it says through the same code as a user's model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from trt_dynamo import trt
from trt_dynamo.reports import report
from trt_dynamo.runtime.layer_times import layer_times
from trt_dynamo.selftest.models import Decoder
from trt_dynamo.selftest.trial import Trial, case
from trt_dynamo.settings import FIELDS

THREADS = 8


def network(width: int = 32) -> nn.Module:
    """A small perceptron: two products and what is between them."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 8), nn.Softmax(-1)).eval()


def rows(*counts: int, width: int = 32) -> list[Tensor]:
    return [torch.randn(count, width) for count in counts]


def ids(*sizes: int) -> Tensor:
    return torch.randint(0, 101, sizes)


# -- shapes -----------------------------------------------------------------------------------------------------------


@case("shapes.any_batch")
def any_batch(t: Trial) -> None:
    """One engine for every size of batch."""
    t.same(network(), *rows(8), dynamic=True, also=[rows(n) for n in (2, 3, 17, 64)])
    t.answered(engines=1)


@case("shapes.two_sizes")
def two_sizes(t: Trial) -> None:
    """Batch and length of sequences, both symbolic."""
    sizes = [(2, 9), (5, 33), (3, 16)]
    t.same(Decoder().eval(), ids(4, 12), dynamic=True, also=[[ids(*size)] for size in sizes])
    t.answered(engines=1)


@case("shapes.growth")
def growth(t: Trial) -> None:
    """Sizes beyond the engine's range: an engine for a wider one."""
    model = network().to(t.device)
    compiled = t.compile(model, dynamic=True)
    for count in (4, 300, 3000):
        t.agree(compiled, model, *rows(count))
    t.answered()
    assert report()["rebuilds"] >= 1, "no range grew"


@case("shapes.empty_and_one")
def empty_and_one(t: Trial) -> None:
    """Sizes of 0 and 1."""
    model = network().to(t.device)
    compiled = t.compile(model)
    for count in (0, 1, 2):
        t.agree(compiled, model, *rows(count))


@case("shapes.profiles")
def several_profiles(t: Trial) -> None:
    """An engine with more than one optimization profile."""
    t.same(network(), *rows(8), dynamic=True, profiles=3, also=[rows(n) for n in (8, 8, 2, 60, 60, 8)])


@case("shapes.found_by_the_engine")
def found_by_the_engine(t: Trial) -> None:
    """`nonzero` inside of an engine, which asks for memory when it knows the size."""
    if not trt.has_data_dependent_sizes():
        t.skip("TensorRT for RTX has no NonZero")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        t.same(lambda x: torch.nonzero(x > 0.5) * 2, torch.rand(9, 7), also=[[torch.zeros(9, 7)], [torch.ones(9, 7)]])


# -- memory -----------------------------------------------------------------------------------------------------------


@case("memory.layouts")
def layouts(t: Trial) -> None:
    """Inputs in channels-last, transposed, sliced and not aligned."""
    conv = nn.Conv2d(3, 8, 3, padding=1).eval()
    image = torch.randn(2, 3, 12, 12)
    t.same(conv, image.to(memory_format=torch.channels_last))
    model = network().to(t.device)
    compiled = t.compile(model)
    flat = torch.randn(16 * 32 + 1, device=t.device)
    for x in (torch.randn(32, 16).T, torch.randn(16, 64)[:, ::2], flat[1:].view(16, 32)):
        with torch.no_grad():
            x = x.to(t.device)
            t.compare(compiled(x), model(x))
    t.answered()


@case("memory.results_stay")
def results_stay(t: Trial) -> None:
    """A result is not overwritten by later calls."""
    model = network().to(t.device)
    compiled = t.compile(model)
    inputs = t.place(rows(8, 8, 8, 8))
    with torch.no_grad():
        results = [compiled(x) for x in inputs]
        for result, x in zip(results, inputs, strict=True):
            t.compare(result, model(x))


@case("memory.written_inputs")
def written_inputs(t: Trial) -> None:
    """A model that writes into an argument and a buffer."""

    class Running(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(32))

        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            self.total += x.sum(0)
            out.copy_(x * 2)
            return torch.relu(x) + self.total

    ours, eager = Running().to(t.device), Running().to(t.device)
    compiled = t.compile(ours)
    with torch.no_grad():
        for x in t.place(rows(4, 4, 4)):
            outs = torch.zeros_like(x), torch.zeros_like(x)
            t.compare(compiled(x, outs[0]), eager(x, outs[1]))
            t.compare([outs[0], ours.total], [outs[1], eager.total])
    t.answered()


@case("memory.many_calls")
def many_calls(t: Trial) -> None:
    """A thousand calls of changing shapes keep no memory."""
    t.needs_gpu()
    compiled = t.same(network(), *rows(8), dynamic=True)
    with torch.no_grad():
        for turn in range(1000):
            compiled(torch.randn(2 + turn % 60, 32, device=t.device))
            if turn == 200:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before
    assert grown < 2**20, f"{grown} bytes more are allocated after 800 further calls"


# -- weights ----------------------------------------------------------------------------------------------------------


def change(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@case("weights.refit")
def refit(t: Trial) -> None:
    """Weights that change in place, through `.data`, and by loading: each answer is of the present ones."""
    model, other = network().to(t.device), network()
    (x,) = rows(8)
    compiled = t.compile(model)
    t.agree(compiled, model, x)
    t.answered()
    for write in (
        lambda: change(model, 0.5),
        lambda: change(model, 1.5),
        lambda: [p.data.mul_(0.8) for p in model.parameters()],
        lambda: model.load_state_dict(other.state_dict()),
    ):
        write()
        for _ in range(2):
            t.agree(compiled, model, x)
    counts = report()
    if t.runtime == "reference" or trt.why_no_refit() is None:
        assert counts["refits"] >= 3, f"{counts['refits']} refits: {counts['eager_reasons']}"


@case("weights.inputs")
def weights_as_inputs(t: Trial) -> None:
    """An engine that reads the weights from the model at each call."""
    model = network().to(t.device)
    (x,) = rows(8)
    compiled = t.same(model, x, weights="inputs")
    change(model, 0.5)
    t.agree(compiled, model, x)
    t.answered(engines=1)


@case("weights.two_models")
def two_models(t: Trial) -> None:
    """Two instances of a class share one compiled graph, and not their weights."""
    models = [network().to(t.device) for _ in range(2)]
    compiled = [t.compile(model) for model in models]
    (x,) = rows(8)
    for _ in range(2):
        for ours, eager in zip(compiled, models, strict=True):
            t.agree(ours, eager, x)
    t.answered()


@case("weights.training")
def training(t: Trial) -> None:
    """A model that is trained and evaluated by turns: gradients are eager's, answers those of the trained weights."""
    model = network().to(t.device)
    compiled = t.compile(model, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = t.place(rows(8)[0])
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        t.compare([p.grad for p in model.parameters()], list(wanted))
        optimizer.step()
        t.agree(compiled, model, x)
    assert report()["engine_calls"], "no engine answered the evaluations"


# -- threads, streams, graphs -----------------------------------------------------------------------------------------


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
    if "cuda_graphs" not in FIELDS:
        t.skip("this version has no setting cuda_graphs")
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


@case("cuda_graphs.auto")
def graphs_auto(t: Trial) -> None:
    """The setting `cuda_graphs=auto`: replays of two shapes, by turns."""
    own_graphs(t, "auto")


@case("cuda_graphs.whole")
def graphs_whole(t: Trial) -> None:
    """The setting `cuda_graphs=whole`: the whole call is one graph."""
    own_graphs(t, "whole")


# -- the rest ---------------------------------------------------------------------------------------------------------


@case("fallback.between_engines")
def between_engines(t: Trial) -> None:
    """What TensorRT has no layer for runs in eager, between two engines."""

    def model(x: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(torch.tanh(x @ x.T) + 5 * torch.eye(8, device=x.device))
        return inverse.relu() * 2 + 1

    t.same(model, *rows(8))
    assert report()["engines_built"] == 2, f"{report()['engines_built']} engines"


@case("profiling.layers")
def layers(t: Trial) -> None:
    """The engine's own profiler reports its layers."""
    options: dict[str, Any] = {"cuda_graphs": "off"} if "cuda_graphs" in FIELDS else {}
    with layer_times() as times:
        t.same(network(), *rows(8), **options)
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
