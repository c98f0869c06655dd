"""Forked children: real processes, forked while other threads build and run; each child answers as eager does.

The functions below the tests run in an interpreter of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled
from trt_dynamo import processes, shutdown
from trt_dynamo.reports import report, reset_report
from trt_dynamo.runtime import SegmentRunner, wait_for_builds
from trt_dynamo.runtime.segment_engines import SegmentEngines

ROOT = Path(__file__).parent.parent


def test_a_child_answers_as_eager_does_and_ends() -> None:
    assert run("t.plain(t.exit)") == "child\nparent\n"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "_exit"])
def test_children_answer_as_eager_does_and_end(end: str) -> None:
    children, parents = (run(f"t.every_scene(t.{end})").split().count(word) for word in ("child", "parent"))
    assert children == parents == 12


def test_a_child_never_destroys_what_is_its_parents() -> None:
    """Not when it forgets, not at a collection, not when the interpreter ends."""
    assert run("t.destructors()") == "child\nparent\ndestroyed by parent\n"


def test_a_child_of_a_busy_builder_says_that_it_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cannot_build", [processes.INHERITED])
    network = nn.Linear(3, 3)
    with torch.no_grad(), pytest.raises(Exception, match="forked while another thread of its parent was building"):
        compiled(network)(torch.randn(2, 3))
    fast = compiled(network, strict=False)
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert_same(fast(x), network(x))
    assert [reason for reason in report()["eager_reasons"] if "forked" in reason]


def run(code: str) -> str:
    """Runs code in a new interpreter, with `t` as this module; what it writes."""
    # Without OpenMP's threads: a child lacks them, and torch itself would hang in it.
    code = f"import torch; torch.set_num_threads(1); import tests.test_forks as t; {code}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------


def fork(child: Callable[[], None], end: Callable[[int], Any]) -> None:
    """Runs `child` in a child, which must end well within two minutes, then writes that both did."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child()
        sys.stdout.write("child\n")
        sys.stdout.flush()
        end(0)
    deadline = time.monotonic() + 40
    while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            raise TimeoutError("the child hangs")
        time.sleep(0.01)
    assert status[1] == 0, status
    sys.stdout.write("parent\n")


exit, _exit = sys.exit, os._exit


def every_scene(end: Callable[[int], Any]) -> None:
    for scene in (
        plain, after_many_calls, another_thread_calls, another_thread_builds, a_background_build_waits, a_grandchild,
        weights_change_in_the_child, a_lock_is_held,
    ):  # fmt: skip
        torch._dynamo.reset()
        reset_report()
        scene(end)


def network(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 5)).requires_grad_(False)


def agree(fast: Any, model: Any) -> None:
    x = torch.randn(3, 6)
    assert_same(fast(x), model(x))


def plain(end: Callable[[int], Any]) -> None:
    model = network()
    fast = compiled(model)
    agree(fast, model)

    def child() -> None:
        before = report()
        agree(fast, model)
        agree(fast, model)
        other = network(7)
        agree(compiled(other), other)
        after = report()
        assert after["cache_hits"] == before["cache_hits"] + 1 and after["engines_built"] == 2
        assert after["engine_calls"] == before["engine_calls"] + 3

    fork(child, end)
    agree(fast, model)
    assert report()["engines_built"] == 1


def after_many_calls(end: Callable[[int], Any]) -> None:
    models = [network() for _ in range(6)]
    fast = [compiled(model, max_weight_sets=3) for model in models]

    def check() -> None:
        for _ in range(3):
            for ours, model in zip(fast, models, strict=True):
                agree(ours, model)

    check()
    fork(check, end)
    check()


def another_thread_calls(end: Callable[[int], Any]) -> None:
    """Threads are in the middle of calls, and of the locks that calls take. (None compiles: Dynamo's lock is Dynamo's,
    and torch's random generator has one too.)"""
    model = network()
    fast = compiled(model)
    x = torch.randn(3, 6)
    assert_same(fast(x), model(x))
    stop = threading.Event()
    failures: list[BaseException] = []

    segment, arguments = segment_call(lambda: fast(x))
    expected = segment.respond(arguments)

    def calls() -> None:
        # Of the segment, not through Dynamo: its guards have a lock of their own, which would hang the child.
        try:
            while not stop.is_set():
                assert_same(segment.respond(arguments), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=calls) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    try:
        for _ in range(5):
            fork(lambda: assert_same(fast(x), model(x)), end)
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def segment_call(call: Callable[[], Any]) -> tuple[SegmentRunner, tuple[Any, ...]]:
    """The segment that `call` calls, and with what."""
    seen: list[tuple[SegmentRunner, tuple[Any, ...]]] = []

    def answer(segment: SegmentRunner, args: Any) -> Any:
        seen.append((segment, tuple(args)))
        return true_answer(segment, args)

    true_answer = SegmentRunner.answer
    with mock.patch.object(SegmentRunner, "answer", answer):
        call()
    return seen[-1]


def another_thread_builds(end: Callable[[int], Any]) -> None:
    """The fork comes when TensorRT is at work: its locks stay locked in the child, which runs in eager."""
    model = network()
    fast = compiled(model)
    agree(fast, model)
    large = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(40)]).requires_grad_(False)
    slow = compiled(large, compile="background", strict=False)
    agree(slow, large)
    deadline = time.monotonic() + 60
    while not shutdown.IN_TENSORRT and time.monotonic() < deadline:
        time.sleep(0)
    assert shutdown.IN_TENSORRT

    def child() -> None:
        agree(fast, model)  # from the cache
        other = network(7)
        agree(compiled(other, strict=False), other)
        agree(slow, large)
        assert wait_for_builds(60)
        agree(slow, large)

    fork(child, end)
    assert wait_for_builds(60)
    agree(slow, large)
    assert not report()["eager_reasons"].keys() - {"the engine is being built"}


def a_background_build_waits(end: Callable[[int], Any]) -> None:
    """A build that has not begun: it takes the lock that another holds."""
    model = network()
    fast = compiled(model, compile="background")
    hold, held = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait()

    from trt_dynamo.runtime.background import run_in_background

    run_in_background(wait)
    held.wait()
    agree(fast, model)

    def child() -> None:
        agree(fast, model)
        assert wait_for_builds(60)
        agree(fast, model)
        assert report()["engine_calls"] == 1

    try:
        fork(child, end)
    finally:
        hold.set()
    assert wait_for_builds(60)
    agree(fast, model)
    assert report()["engine_calls"] == 1


def a_grandchild(end: Callable[[int], Any]) -> None:
    model = network()
    fast = compiled(model)
    agree(fast, model)

    def child() -> None:
        agree(fast, model)
        pid = os.fork()
        if pid == 0:
            agree(fast, model)
            end(0)
        assert os.waitpid(pid, 0)[1] == 0
        agree(fast, model)

    fork(child, end)


def weights_change_in_the_child(end: Callable[[int], Any]) -> None:
    model = network()
    fast = compiled(model, rebuild_after=0)
    agree(fast, model)

    def child() -> None:
        for _ in range(3):
            model.get_parameter("0.weight").mul_(1.5)
            agree(fast, model)

    fork(child, end)
    agree(fast, model)


def a_lock_is_held(end: Callable[[int], Any]) -> None:
    """Another thread holds every lock of ours at the fork, and has no counterpart in the child that would free it."""
    from trt_dynamo import reports

    model = network()
    fast = compiled(model)
    agree(fast, model)
    locks: list[Any] = [reports.LOCK, *(m.lock for m in processes.LIVING if isinstance(m, SegmentEngines))]
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        free.wait()
        for lock in reversed(locks):
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child() -> None:
        agree(fast, model)
        model.get_parameter("0.weight").mul_(2)
        agree(fast, model)

    try:
        fork(child, end)
    finally:
        free.set()
    thread.join()
    agree(fast, model)


class Precious:
    """Says who destroyed it."""

    def __del__(self) -> None:
        os.write(1, f"destroyed by {'parent' if os.getpid() == self.owner else 'CHILD'}\n".encode())

    def __init__(self) -> None:
        self.owner = os.getpid()


def destructors() -> None:
    import gc

    model = network()
    fast = compiled(model)
    agree(fast, model)
    (module,) = [m for m in processes.LIVING if isinstance(m, SegmentEngines)]
    (slot,) = module.slots.values()
    assert slot.engine is not None
    slot.engine.owner = [slot.engine.owner, Precious()]

    def child() -> None:
        agree(fast, model)
        gc.collect()
        torch._dynamo.reset()
        gc.collect()

    fork(child, sys.exit)
    del slot, module
    torch._dynamo.reset()
    gc.collect()
