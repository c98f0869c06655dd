"""Threads of a moment: results, errors, what is left of them."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trt_dynamo import side_threads
from trt_dynamo.cache import digest, digests
from trt_dynamo.cache.disk import READ_AT_ONCE, Damaged, read_hashed
from trt_dynamo.side_threads import BYTES_PER_THREAD, Behind, shared

MUCH = 8 * BYTES_PER_THREAD


@pytest.fixture(autouse=True, params=[1, 2, 8])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(side_threads, "processors", lambda: request.param)
    before = threading.active_count()
    yield request.param
    assert threading.active_count() == before


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


class Odd(BaseException):
    pass


def run_behind(*functions: Callable[[], object]) -> None:
    with Behind(MUCH) as behind:
        for function in functions:
            behind.run(function)


def test_results_are_in_order(processors: int) -> None:
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return item * item

    assert shared(work, range(10), [MUCH] * 10) == [item * item for item in range(10)]
    assert len(threads) == min(processors, side_threads.MOST_THREADS)


def test_the_largest_come_first() -> None:
    order: list[int] = []
    shared(order.append, [1, 3, 2], [MUCH, 3 * MUCH, 2 * MUCH])
    assert order[0] == 3 or side_threads.processors() == 1


@pytest.mark.parametrize("sizes", [[], [1], [MUCH], [1] * 5])
def test_little_needs_no_thread(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    assert shared(str, range(len(sizes)), sizes) == [str(i) for i in range(len(sizes))]


def test_the_first_error_comes_out() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.02)
        raise Odd(item)

    with pytest.raises(Odd):
        shared(work, range(100), [MUCH] * 100)
    assert len(begun) <= side_threads.MOST_THREADS


@pytest.mark.usefixtures("no_threads")
def test_without_threads_the_caller_does_it() -> None:
    assert shared(str, [1, 2], [MUCH, MUCH]) == ["1", "2"]
    done: list[int] = []
    with Behind(MUCH) as behind:
        behind.run(lambda: done.append(1))
    assert done == [1]


def test_behind_keeps_the_order_and_waits() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.005)
        done.append(number)

    with Behind(MUCH) as behind:
        for number in range(5):
            behind.run(functools.partial(work, number))
    assert done == [0, 1, 2, 3, 4]


def test_behind_tells_its_error_and_begins_nothing_after_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise Odd

    with pytest.raises(Odd):
        run_behind(fail, lambda: done.append(1))
    assert not done


def test_behind_leaves_the_callers_error_alone() -> None:
    def fail() -> None:
        with Behind(MUCH) as behind:
            behind.run(lambda: time.sleep(0.01))
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_digests_are_those_of_each() -> None:
    tensors = [torch.rand(n) for n in (3, 2**20, 0, 2**19, 2**21)] + [torch.rand(2048, 1024).t()]
    with torch.device("meta"), torch.inference_mode():
        assert digests(tensors) == [digest(tensor) for tensor in tensors]


@pytest.mark.parametrize("size", [0, 1, READ_AT_ONCE, 3 * READ_AT_ONCE + 7])
def test_what_is_read_is_hashed(size: int, tmp_path: Path) -> None:
    content = os.urandom(size)
    (tmp_path / "plan").write_bytes(content)
    (tmp_path / "plan").chmod(0o600)
    data, sha256 = read_hashed(tmp_path / "plan", size)
    assert type(data) is bytes and data == content
    assert sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(Damaged, match="bytes, not"):
        read_hashed(tmp_path / "plan", size + 1)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan"
    path.write_bytes(bytes(3 * READ_AT_ONCE))
    path.chmod(0o600)
    run = Behind.run

    def shrink(self: Behind, function: object) -> None:
        os.truncate(path, 2 * READ_AT_ONCE)
        run(self, function)  # type: ignore[arg-type]

    monkeypatch.setattr(Behind, "run", shrink)
    with pytest.raises(Damaged, match=f"{2 * READ_AT_ONCE} bytes, not {3 * READ_AT_ONCE}"):
        read_hashed(path, 3 * READ_AT_ONCE)
