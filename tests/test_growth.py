"""Builds beside the calls: whatever happens to one, calls are answered and the program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import engine_making, explain, shutdown
from trt_dynamo.build import build
from trt_dynamo.cache import open_store
from trt_dynamo.errors import BuildError
from trt_dynamo.reports import report
from trt_dynamo.runtime import background, wait_for_builds
from trt_dynamo.settings import Settings

ROOT = Path(__file__).parent.parent

# A model whose build takes a second or two, unless it is called off, and an event that tells that a build has begun.
PRELUDE = """
import atexit, os, signal, sys, threading, time
import torch
from trt_dynamo import explain, engine_making, shutdown
from trt_dynamo.runtime import background, wait_for_builds

build = engine_making.build
begun = threading.Event()

def told(*args, **keywords):
    begun.set()
    return build(*args, **keywords)

engine_making.build = told
deep = torch.nn.Sequential(*[layer for _ in range(60) for layer in (torch.nn.Linear(256, 256), torch.nn.Softmax(-1))])
x = torch.randn(2, 256)
torch.set_grad_enabled(False)

def fast(model=deep, **options):
    return torch.compile(model, backend="tensorrt", dynamic=True, options={"runtime": "reference", **options})

def call_until_the_builds_are_over():
    # Ended behind our own end, which is registered last and so runs first: torch alone aborts the process if a daemon
    # is in one of its ops when Python is gone.
    over = threading.Event()

    @torch.no_grad()
    def call():
        while not over.is_set():
            for n in range(2, 40):
                model(torch.randn(n, 256))

    caller = threading.Thread(target=call, daemon=True)
    atexit.register(lambda: (over.set(), caller.join()))
    background.prepare_for_the_end()
    caller.start()
"""


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "TRT_DYNAMO_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-u", "-c", PRELUDE + code]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 100) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def whole(cache: Path) -> bool:
    """Whether every entry of the cache is whole."""
    return not cache.exists() or open_store(Settings(cache_dir=cache)).verify() == []


ENDS: dict[str, tuple[str, int]] = {
    "returns": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "from a function at exit": ("import atexit; atexit.register(lambda: print('last', flush=True))", 0),
    "while another thread calls": ("call_until_the_builds_are_over()", 0),
}


@pytest.mark.parametrize("way", [w if w == "returns" else pytest.param(w, marks=pytest.mark.slow) for w in ENDS])
def test_the_program_ends_during_a_build(way: str, tmp_path: Path) -> None:
    code, expected = ENDS[way]
    process = start(
        f"model = fast(compile='background'); model(x); begun.wait(); print('answered', time.time()); {code}", tmp_path
    )
    status, out, err = finish(process)
    assert status == expected, err
    assert time.time() - float(out.split()[1]) < 15
    assert "Traceback" not in err and "Fatal" not in err and "terminate" not in err, err
    assert "in eager from now on" not in err, err
    assert whole(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hangs", ["threading.Event().wait()", "time.sleep(10**6)"])
def test_the_program_ends_though_a_build_hangs(hangs: str, tmp_path: Path) -> None:
    process = start(
        f"engine_making.build = lambda *a, **k: ({hangs}, b'')[1]\n"
        "model = fast(torch.nn.Tanh(), compile='background', min_segment_nodes=1)\n"
        "model(x); model(x); print('answered', flush=True)",
        tmp_path,
    )
    started = time.monotonic()
    status, out, err = finish(process)
    assert (status, out.strip()) == (0, "answered"), err
    assert time.monotonic() - started < 60
    assert "Traceback" not in err and "Fatal" not in err, err


@pytest.mark.slow
def test_the_program_waits_for_a_step_that_cannot_be_called_off(tmp_path: Path) -> None:
    process = start(
        "def slow(*args, **keywords):\n"
        "    with shutdown.in_tensorrt(): time.sleep(7)\n"
        "    print('left')\n"
        "    raise SystemExit\n"
        "engine_making.build = slow\n"
        "fast(torch.nn.Tanh(), compile='background', min_segment_nodes=1)(x)",
        tmp_path,
    )
    status, out, err = finish(process)
    assert (status, out.strip()) == (0, "left"), err
    assert "cannot be called off" in err and "Fatal" not in err, err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["background", "sync"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_build_ends_the_program(number: signal.Signals, where: str, tmp_path: Path) -> None:
    """SIGTERM at once; SIGINT as KeyboardInterrupt, which TensorRT must not swallow."""
    process = start(
        "def tell():\n    begun.wait(); time.sleep(0.1); print('begun', flush=True)\n"
        "threading.Thread(target=tell, daemon=True).start()\n"
        f"fast(compile={where!r})(x)\n"
        "time.sleep(100)",
        tmp_path,
    )
    assert process.stdout is not None
    process.stdout.readline()
    sent = time.monotonic()
    process.send_signal(number)
    status, _, err = finish(process)
    assert time.monotonic() - sent < 15
    assert status == -number, err
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert "Fatal" not in err and "in eager from now on" not in err, err
    assert whole(tmp_path)
    again, _, err = finish(start("model = fast(torch.nn.Tanh(), min_segment_nodes=1); model(x)", tmp_path))
    assert again == 0, err


def test_after_an_interrupt_the_model_works(tmp_path: Path) -> None:
    process = start(
        "def press():\n    begun.wait(); time.sleep(0.1); os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=press).start()\n"
        "model = fast()\n"
        "try:\n    model(x)\n    print('not interrupted')\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "torch.testing.assert_close(model(x), deep(x))\n"
        "from trt_dynamo import report\n"
        "print(report()['engine_calls'])",
        tmp_path,
    )
    status, out, err = finish(process, 300)
    assert status == 0 and out.split() == ["interrupted", "1"], (out, err)


def test_what_a_signal_handler_raises_is_kept() -> None:
    calls: list[int] = []

    def handler(number: int, frame: Any) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise TimeoutError("too late")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        kept = shutdown.signals_kept()
        raised = kept.__enter__()
        signal.raise_signal(signal.SIGUSR1)
        assert not raised
        signal.raise_signal(signal.SIGUSR1)
        assert len(raised) == 1
        with pytest.raises(TimeoutError, match="too late"):
            kept.__exit__(None, None, None)
        assert signal.getsignal(signal.SIGUSR1) is handler
        with shutdown.signals_kept():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a handler may put another in its place
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_builds_run_in_order_one_at_a_time_and_leave_no_thread() -> None:
    done: list[int] = []
    together: list[bool] = []
    busy = threading.Lock()

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            together.append(not busy.acquire(blocking=False))
            time.sleep(0.01)
            done.append(number)
            busy.release()
            if number == 3:
                raise MemoryError("the others are built all the same")

        return run

    for number in range(6):
        background.run_in_background(work(number))
    assert not wait_for_builds(0)
    assert wait_for_builds(60)
    assert done == [0, 1, 2, 3, 4, 5] and not any(together)
    assert not any(t.name == "trt_dynamo-build" and t.is_alive() for t in threading.enumerate()) or wait_for_builds(1)


def test_a_fork_does_not_wait_for_its_parents_builds(tmp_path: Path) -> None:
    """As the workers of a DataLoader do."""
    process = start(
        "model = fast(compile='background')\nmodel(x); begun.wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n    assert wait_for_builds(0); print('child', flush=True); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])",
        tmp_path,
    )
    status, out, err = finish(process)
    assert status == 0 and out.split() == ["child", "0"], (out, err)


# -- builds that fail, and slow ones -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + x.shape[0]


def test_no_thread_to_be_had_disturbs_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has too many, or ends. The build is done with the next one that is asked for."""

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "trt_dynamo-build":
            raise RuntimeError("can't start new thread")
        start(thread)

    first, second, x = Net().eval(), nn.Tanh(), torch.randn(5, 6)
    fast, other = (compiled(net, compile="background") for net in (first, second))
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert_same(fast(x), first(x))
        assert wait_for_builds(0) and report()["builds"] == []
        other(x)
        assert wait_for_builds(100) and len(report()["builds"]) == 2
        assert_same(fast(x), first(x))
    assert report()["engine_calls"] == 1


def too_wide(profile: Any, limit: int = 100) -> bool:
    return any(max(largest, default=0) > limit for _, _, largest in profile.values())


def call(model: Callable[..., Any], size: int) -> Any:
    with torch.no_grad():
        return model(torch.arange(size * 18.0).reshape(size, 3, 6) / 1000)


ERRORS: list[Exception] = [BuildError("no"), MemoryError("no memory"), RuntimeError("a bug"), KeyError("a bug")]


@pytest.mark.parametrize("rebuild", ["sync", "background"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_wider_engine_that_cannot_be_built(error: Exception, rebuild: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow one goes on, and nobody asks again at each call."""
    asked: list[int] = []

    def narrow(converted: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
        if too_wide(profile):
            asked.append(1)
            raise error
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", narrow)
    net = Net()
    fast = compiled(net, dynamic=True, rebuild=rebuild, strict=False)
    for size in (5, 50, 200, 7, 300, 60):
        assert_same(call(fast, size), call(net, size))
        assert wait_for_builds(60)
    counts = report()
    assert (counts["engine_calls"], counts["eager_calls"], len(asked)) == (4, 2, 1)
    assert [b["error"] is None for b in counts["builds"]] == [True, False]
    assert type(error).__name__ in counts["builds"][1]["error"]


def test_one_size_that_cannot_grow_leaves_the_others_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def no_long_rows(converted: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
        if any(largest[1] > 100 for _, _, largest in profile.values()):
            asked.append(1)
            raise BuildError("too long")
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", no_long_rows)
    net = Net()
    fast = compiled(net, dynamic=True)
    with torch.no_grad():
        for rows, length in [(5, 4), (5, 200), (300, 9), (299, 8), (6, 300), (7, 200), (1000, 5), (9, 210)]:
            x = torch.randn(rows, length, 6)
            assert_same(fast(x), net(x))
    assert report()["eager_calls"] == 4 and report()["engine_calls"] == 4
    assert len(asked) == 1


@pytest.mark.parametrize("compile", ["sync", "background"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_first_engine_that_cannot_be_built(error: Exception, compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **keywords: Any) -> bytes:
        raise error

    monkeypatch.setattr(engine_making, "build", fails)
    net = Net()
    fast = compiled(net, compile=compile, strict=False)
    for _ in range(3):
        assert_same(call(fast, 5), call(net, 5))
        assert wait_for_builds(60)
    assert report()["engine_calls"] == 0
    assert len(report()["builds"]) == 1


def test_an_interrupt_during_a_rebuild_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = [KeyboardInterrupt()]

    def interrupted(converted: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
        if too_wide(profile) and interrupts:
            raise interrupts.pop()
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", interrupted)
    net = Net()
    fast = compiled(net, dynamic=True)
    assert_same(call(fast, 5), call(net, 5))
    with pytest.raises(KeyboardInterrupt):
        call(fast, 200)
    assert_same(call(fast, 7), call(net, 7))
    assert_same(call(fast, 200), call(net, 200))
    assert report()["eager_calls"] == 0 and report()["engine_calls"] == 3


@pytest.mark.parametrize("threads", [1, 8])
def test_a_slow_build_never_holds_up_a_call(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls inside the ranges go to the engine meanwhile, others to eager; then one engine takes all."""
    go = threading.Event()

    def slow(converted: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
        assert not too_wide(profile) or go.wait(60)
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", slow)
    net = Net()
    fast = compiled(net, dynamic=True, rebuild="background")
    call(fast, 5)
    call(fast, 6)
    waits: list[float] = []

    def work(seed: int) -> None:
        for size in (7 + seed, 200 + seed, 9, 300 + seed):
            started = time.monotonic()
            assert_same(call(fast, size), call(net, size))
            waits.append(time.monotonic() - started)

    in_threads(threads, work)
    assert max(waits) < 20
    meanwhile = report()
    assert meanwhile["engine_calls"] == 2 + 2 * threads and meanwhile["eager_calls"] == 2 * threads
    go.set()
    assert wait_for_builds(60)
    for size in (200, 300, 5):
        assert_same(call(fast, size), call(net, size))
    assert wait_for_builds(60)
    assert_same(call(fast, 300 + threads), call(net, 300 + threads))
    assert report()["engine_calls"] >= meanwhile["engine_calls"] + 3
    assert report()["engines_built"] <= 3


@pytest.mark.parametrize("rebuild", ["sync", "background", "never"])
@pytest.mark.parametrize("compile", ["sync", "background"])
def test_every_value_of_rebuild_and_compile(rebuild: str, compile: str) -> None:
    net = Net()
    fast = compiled(net, dynamic=True, rebuild=rebuild, compile=compile)
    sizes = [5, 7, 90, 200, 5, 1000, 999, 63]
    for size in sizes:
        assert_same(call(fast, size), call(net, size))
        assert wait_for_builds(60)
    counts = report()
    first = int(compile == "background")
    grown = {"sync": 0, "background": 3, "never": 4}[rebuild]  # 90, 200 and 1000 grow; 999 needs it too
    assert counts["eager_calls"] == first + grown
    assert counts["engines_built"] == (1 if rebuild == "never" else 4)
    assert [b["reason"] for b in counts["builds"]] == ["new graph"] + ["a size outside the profile"] * (
        counts["engines_built"] - 1
    )
    assert all(
        b["background"] == ((compile if i == 0 else rebuild) == "background") for i, b in enumerate(counts["builds"])
    )


def test_n_sizes_cost_log_n_builds() -> None:
    net = Net()
    fast = compiled(net, dynamic=True)
    for size in range(2, 1200, 7):
        call(fast, size)
    assert report()["eager_calls"] == 0
    assert report()["engines_built"] <= 1 + 5  # from 64 on: 128, 256, 512, 1024, 2048


def test_explain_and_the_log_say_why_each_engine_was_built(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    fast = compiled(net, dynamic=True, rebuild_after=0)
    with caplog.at_level("INFO", "trt_dynamo.reports"):
        call(fast, 5)
        call(fast, 200)
        with torch.no_grad():
            net.linear.weight.mul_(2)
        call(fast, 5)
        call(fast, 5)
    reasons = [build["reason"] for build in report()["builds"]]
    assert reasons[:2] == ["new graph", "a size outside the profile"]
    assert reasons[2:] in ([], ["the weights changed"])  # a refit needs no further engine
    told = [line for line in caplog.messages if ": built in" in line or ": loaded" in line]
    assert len(told) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, told, strict=True))
    assert "of shape (200, 3, 6) is outside the profile" in told[1]
    explanation = explain(net, torch.randn(2, 3, 6))
    assert [build.reason for build in explanation.builds] == reasons
    assert all(line in str(explanation) for line in told)
    assert [build["reason"] for build in explanation.as_dict()["builds"]] == reasons
