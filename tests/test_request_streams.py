"""Streams of requests of many sizes, 0 and 1 among them: every answer is eager's, and few engines serve them all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
import torch._dynamo

from benchmarks.streams import STREAMS
from tests.compiled import assert_same, in_threads
from trt_dynamo.reports import report
from trt_dynamo.runtime import wait_for_builds

# Of the streams' largest sizes; `-m slow` takes them whole.
SMALL = 0.3
THREADS = 8


# With allow_rnn, Dynamo 2.11 by itself raises at `pad_packed_sequence`, whatever the backend; newer ones end the graph
# there. Without, it skips the function that calls the layer, so all of it runs in eager.
PACKED_FAILS_IN_DYNAMO = torch.__version__.startswith("2.11.")


def skipped(name: str) -> bool:
    """Whether Dynamo cannot give any part of the model to a backend."""
    return name == "LSTM, packed" and PACKED_FAILS_IN_DYNAMO


def open_limits(name: str) -> Any:
    """Recurrent layers reach the backend, and as many graphs as sizes of 0 and 1 make (not just 8). Holds in the
    thread that enters it.
    """
    return torch._dynamo.config.patch(allow_rnn=not skipped(name), recompile_limit=64)


def capturing(yes: bool) -> Any:
    return torch._dynamo.config.patch(capture_scalar_outputs=yes, capture_dynamic_output_shape_ops=yes)


def compile_it(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """With the defaults, but for what runs the engines."""
    return torch.compile(model, backend="tensorrt", options={"runtime": "reference", **options})


def answer(model: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What the model answers, or the error that it raises."""
    with torch.no_grad():
        try:
            return model(*arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            return error


def compare(actual: Any, expected: Any, sizes: Any) -> None:
    if isinstance(expected, Exception):
        assert isinstance(actual, Exception), f"eager raises for {sizes}: {expected}"
        return
    if isinstance(actual, Exception):
        raise AssertionError(f"eager answers {sizes}") from actual
    try:
        assert_same(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"{sizes}: {error}") from None


def drive(name: str, net: Any, fast: Any, draw: random.Random, requests: int, scale: float) -> None:
    stream = STREAMS[name]
    with open_limits(name):
        for _ in range(requests):
            sizes = stream.sizes(draw, scale=scale)
            arguments = stream.arguments(sizes)
            compare(answer(fast, arguments), answer(net, arguments), sizes)


# Of each kind one that takes seconds; the others take minutes on a small machine.
QUICK = {("MiniLM", "background"), ("U-Net", "sync"), ("detector", "sync"), ("attention", "background")}


def some_quick(names: Iterable[str], rebuilds: Iterable[str], quick: Collection[tuple[str, str]]) -> list[Any]:
    cases = itertools.product(names, rebuilds)
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "rebuild"), some_quick(STREAMS, ["sync", "background"], QUICK))
def test_every_answer_is_eagers(name: str, rebuild: str) -> None:
    net = STREAMS[name].model()
    drive(name, net, compile_it(net, rebuild=rebuild), random.Random(name + rebuild), 8, SMALL)
    assert wait_for_builds(100)
    assert (report()["engine_calls"] > 0) != skipped(name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("captured", [False, True], ids=["graph breaks", "captured"])
@pytest.mark.parametrize("rebuild", ["sync", "background"])
@pytest.mark.parametrize("name", STREAMS)
def test_every_answer_of_a_long_stream_is_eagers(name: str, rebuild: str, captured: bool, seed: int) -> None:
    net = STREAMS[name].model()
    with capturing(captured):
        drive(name, net, compile_it(net, rebuild=rebuild), random.Random(seed), 40, 1.0)
        assert wait_for_builds(100)
    assert (report()["engine_calls"] > 0) != skipped(name)


EIGHT = ["MiniLM", "U-Net", "detector", "LSTM, padded", "LSTM, packed"]


@pytest.mark.parametrize(("name", "rebuild"), some_quick(EIGHT, ["sync", "background"], {("MiniLM", "background")}))
def test_every_answer_to_eight_threads_is_eagers(name: str, rebuild: str) -> None:
    net = STREAMS[name].model()
    fast = compile_it(net, rebuild=rebuild)

    def work(seed: int) -> None:
        drive(name, net, fast, random.Random(f"{name} {seed}"), 2, SMALL)

    in_threads(THREADS, work)
    assert wait_for_builds(100)
    assert (report()["engine_calls"] > 0) != skipped(name)


def test_which_dynamo_takes_packed_sequences() -> None:
    """Without any backend of ours: what `open_limits` goes by."""
    stream = STREAMS["LSTM, packed"]
    net = stream.model()
    arguments = stream.arguments((3, 5))
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        found = answer(torch.compile(net, backend="eager"), arguments)
    assert isinstance(found, RuntimeError) == PACKED_FAILS_IN_DYNAMO
    if PACKED_FAILS_IN_DYNAMO:
        assert "pad_packed_sequence" in str(found)
    else:
        assert_same(found, net(*arguments))


@pytest.mark.parametrize("rebuild", ["sync", "background"])
def test_sizes_that_depend_on_data_inside_a_stream(rebuild: str) -> None:
    def f(x: torch.Tensor, ids: torch.Tensor, count: torch.Tensor) -> Any:
        n = count.item()
        torch._check(n >= 0)
        torch._check(n <= x.shape[0])
        found = x[x.sum(1) > 0]
        names, places = torch.unique(ids, return_inverse=True)
        sums = torch.zeros(names.shape[0], x.shape[1]).index_add(0, places, x)
        weights = (found @ sums.t()).softmax(-1)
        return weights @ sums, x[:n].exp().sum(0), names * 2, (x > 0).nonzero().shape[0] * x.mean()

    fast = compile_it(f, rebuild=rebuild)
    draw = random.Random(0)
    with capturing(True):
        for _ in range(16):
            rows, width = int(300 ** draw.random()), int(40 ** draw.random())
            x = torch.randn(rows, width) + draw.choice([-5.0, 0.0, 0.0, 5.0])
            arguments = (x, torch.randint(0, 9, (rows,)), torch.tensor(draw.randint(0, rows)))
            compare(answer(fast, arguments), answer(f, arguments), (rows, width))
        assert wait_for_builds(100)
    assert report()["engine_calls"] > 0


# -- how many graphs and engines ---------------------------------------------------------------------------------------


def pairs_of(draw: random.Random, count: int, batch: int, length: int) -> list[tuple[int, int]]:
    """Different pairs, none with a size in common with the one before: Dynamo makes a symbol of what has changed."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        pair = (draw.randint(2, batch), draw.randint(16, length))
        if pair not in found and not (found and {*zip(pair, found[-1], strict=True)} & {(n, n) for n in pair}):
            found.append(pair)
    return found


# On the CPU torch's convolutions ask whether a batch has 16 images or more, so there each side has a graph of its own.
LIMITED: dict[str, tuple[str, int, int, Callable[[int, int], tuple[int, ...]]]] = {
    "MiniLM": ("MiniLM", 12, 100, lambda batch, length: (batch, length)),
    "CNN": ("CNN", 15, 200, lambda batch, length: (batch, length, length + 7)),
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("rebuild", ["sync", pytest.param("background", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LIMITED)
def test_fifty_sizes_cost_two_graphs_and_few_engines(name: str, rebuild: str, seed: int) -> None:
    key, batch, length, sizes_of = LIMITED[name]
    stream = STREAMS[key]
    net = stream.model()
    fast = compile_it(net, rebuild=rebuild)
    pairs = pairs_of(random.Random(seed), 50, batch, length)
    with torch.no_grad():
        for pair in pairs:
            fast(*stream.arguments(sizes_of(*pair)))
        arguments = stream.arguments(sizes_of(*pairs[0]))
        assert wait_for_builds(100)
        compare(fast(*arguments), net(*arguments), pairs[0])
    counts = report()
    assert counts["graphs"] <= 2
    built: dict[str, int] = {}
    for build in counts["builds"]:
        assert build["error"] is None
        built[build["segment"]] = built.get(build["segment"], 0) + 1
    ratio = max(batch, (length + 7) / 16)
    assert max(built.values()) <= math.ceil(math.log2(ratio)) + 2, counts["builds"]
    assert sum(built.values()) == counts["engines_built"] + counts["cache_hits"]
    reasons = [build["reason"] for build in counts["builds"]]
    assert reasons.count("new graph") == counts["graphs"]
    assert {*reasons} <= {"new graph", "a size outside the profile"}
