"""Python numbers and 0-D tensors among the arguments, which Dynamo makes symbolic: as sizes, as numbers, as both."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.compiled import assert_same, compiled
from trt_dynamo.reports import report
from trt_dynamo.runtime import engine as engines


@contextlib.contextmanager
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets nobody read a tensor's elements on the host, but what stands in for the GPU."""

    def refused(name: str) -> Callable[..., Any]:
        whole = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **keywords: Any) -> Any:
            frame = sys._getframe(1)
            caller = frame.f_globals["__name__"]
            # What an engine gets for a size is a tensor on the host, made of an int.
            own = caller == engines.__name__ and getattr(frame.f_locals.get("port"), "size", False)
            assert own or caller.startswith("trt_dynamo.reference"), f"{caller} reads a tensor with {name}"
            return whole(self, *args, **keywords)

        return read

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__int__", "__index__", "__bool__", "__float__"):
            patch.setattr(torch.Tensor, name, refused(name))
        yield


@pytest.fixture
def sizes_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What engines get for the sizes that no tensor tells them: what is on the host before the call."""
    found: list[Any] = []
    whole = engines.Engine.__call__

    def call(self: engines.Engine, args: Sequence[Any]) -> Any:
        found.extend(args[port.position] for port in self.inputs if port.size)
        return whole(self, args)

    monkeypatch.setattr(engines.Engine, "__call__", call)
    yield found
    assert all(type(size) is int for size in found)


X = torch.linspace(-2, 3, 40).reshape(8, 5)

INTS: dict[str, tuple[Callable[[torch.Tensor, int], Any], Sequence[int]]] = {
    "a size": (lambda x, n: x.exp()[:n] * 2, (3, 5, 8, 2, 1, 0)),
    "a size of a new tensor": (lambda x, n: torch.ones(n, 5) + x.sum(0), (3, 7, 100, 2, 1, 0)),
    "a repeat": (lambda x, n: x.exp().repeat(n, 1), (2, 3, 9, 1)),
    "a range": (lambda x, n: torch.arange(n) * x.sum(), (4, 6, 90)),
    "a shape": (lambda x, n: (x + 1).reshape(n, -1), (2, 4, 8, 5, 1)),
    "a length": (lambda x, n: x.exp().narrow(0, 1, n), (2, 4, 7)),
    "an offset": (lambda x, n: x.exp()[n:], (2, 4, 7, 3)),
    "an offset from the end": (lambda x, n: x.exp()[n:], (-2, -4, -7, -3)),
    "an index": (lambda x, n: x.exp()[n] * 2, (2, 4, 7, -1, -8)),
    "a number": (lambda x, n: x.exp() * n + n, (3, 5, -4, 10**6, 1, 0)),
    "a negative number": (lambda x, n: x.exp() - n, (-3, -5, -1000, 4)),
    "an exponent": (lambda x, n: x.abs() ** n + 1, (2, 3, 5, -2)),
    "a divisor": (lambda x, n: (x * 100).int() // n + x % n, (2, 3, 7, -5)),
    "a bound": (lambda x, n: x.clamp(max=n) * 2, (1, 2, -1, 3)),
    "a shift": (lambda x, n: x.exp().roll(n, 0), (1, 2, 3, -2)),
    "a distance from the diagonal": (lambda x, n: x.exp().tril(n), (0, 1, 2, -3)),
    "a size and a number": (lambda x, n: x.exp()[:n] * n + torch.arange(n)[:, None], (3, 5, 8, 2, 1)),
    "its square": (lambda x, n: torch.ones(n * n) * n + x.sum(), (3, 5, 9)),
    "a part": (lambda x, n: (x + 1)[: n // 2] * (n % 3), (4, 6, 9, 15)),
    "a sum with a size": (lambda x, n: x.exp().sum() + torch.arange(x.shape[0] + n), (4, 6, 9, -3)),
    "a condition": (lambda x, n: x.exp() + 1 if n > 4 else x.exp() - n, (3, 2, 5, 9)),
    "a kernel": (lambda x, n: torch.nn.functional.avg_pool1d(x[None], n), (2, 3, 5)),
    "a padding": (lambda x, n: torch.nn.functional.pad(x.exp(), (n, 1), value=2.0), (1, 2, 7, 0, -2)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", INTS)
def test_an_int(name: str, dynamic: bool | None, sizes_given: list[Any]) -> None:
    f, numbers = INTS[name]
    fast = compiled(f, dynamic=dynamic)
    with torch.no_grad():
        for n in numbers:
            assert_same(fast(X, n), f(X, n))


def test_many_ints_cost_few_graphs_and_builds(sizes_given: list[Any]) -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return (x.exp() + n).repeat(n, 1)[: n + 1] * torch.arange(n + 1)[:, None]

    fast = compiled(f)
    with torch.no_grad():
        for n in (3, 5, 17, 40, 64, 2, 33, 100, 128, 90, 300):
            assert_same(fast(X, n), f(X, n))
    counts = report()
    assert counts["graphs"] == 2 and counts["engines_built"] <= 5 and counts["eager_calls"] == 0
    assert set(sizes_given) >= {5, 17, 300}


def test_ints_that_only_count_never_rebuild() -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.exp() * n - n

    fast = compiled(f)
    with torch.no_grad():
        for n in (3, -5, 7, -1000, 10**9, -(2**40), 0, 1):
            assert_same(fast(X, n), f(X, n))
    counts = report()
    assert counts["engines_built"] == counts["graphs"] <= 4 and counts["eager_calls"] == 0


FLOATS: dict[str, Callable[[torch.Tensor, float], Any]] = {
    "a factor": lambda x, s: x.exp() * s,
    "of whole numbers": lambda x, s: (x * 10).int() * s,
    "a divisor": lambda x, s: x.exp() / (s + 10),
    "an exponent": lambda x, s: (x.abs() + 1) ** s,
    "a bound": lambda x, s: x.clamp(min=s) + 1,
    "used twice": lambda x, s: (x * s).softmax(1) + s,
    "beside a size": lambda x, s: x.exp() * (s / x.shape[0]),
    "its root": lambda x, s: x.exp() * abs(s) ** 0.5,
    "a scale of sizes": lambda x, s: torch.nn.functional.interpolate(x[None, None], scale_factor=abs(s) + 1),
}


@pytest.mark.parametrize("name", FLOATS)
def test_a_float(name: str) -> None:
    f = FLOATS[name]
    fast = compiled(f)
    with torch.no_grad():
        for s in (0.5, 0.25, -1.5, 2.0, 0.0):
            assert_same(fast(X, s), f(X, s))


def test_floats_that_change_make_two_graphs() -> None:
    fast = compiled(FLOATS["used twice"])
    with torch.no_grad():
        for s in (0.5, 0.25, -1.5, 2.0, 1e30, float("inf")):
            assert_same(fast(X, s), FLOATS["used twice"](X, s))
    counts = report()
    assert counts["graphs"] == counts["engines_built"] == 2 and counts["eager_calls"] == 0


@pytest.mark.parametrize("options", [{}, {"fallback": "inductor"}, {"runtime": "eager"}], ids=str)
def test_numbers_of_pythons_random(options: dict[str, Any]) -> None:
    """Dynamo traces such a float as a float32 and hands in a float64."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale = random.uniform(1, 2)
        return x * scale, torch.erfinv(x / 100) * scale, x.sum() * scale, x.half() + scale, x.int() * scale

    fast = compiled(f, eager_ops="aten.erfinv", **options)
    with torch.no_grad():
        for seed in range(3):
            random.seed(seed)
            found, after = fast(X), random.random()
            random.seed(seed)
            assert_same(found, f(X))
            assert after == random.random()
    assert report()["graphs"] == (options != {"runtime": "eager"})


def test_a_bool_is_a_graph_each() -> None:
    def f(x: torch.Tensor, double: bool, sign: bool) -> torch.Tensor:
        y = x.exp() * (2 if double else 1) * sign
        return y.flip(0) if sign else y

    fast = compiled(f)
    with torch.no_grad():
        for double, sign in ((True, True), (False, True), (True, False), (False, False), (True, True)):
            assert_same(fast(X, double, sign), f(X, double, sign))
    assert report()["graphs"] == 4 and report()["eager_calls"] == 0


ZERO_D: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], torch.dtype]] = {
    "a factor": (lambda x, s: x.exp() * s + s, torch.float32),
    "an integer": (lambda x, s: x.exp() * s - s, torch.int64),
    "a condition": (lambda x, s: torch.where(s, x.exp(), x + 1), torch.bool),
    "an index": (lambda x, s: x.exp().index_select(0, s[None]), torch.int64),
    "a comparison": (lambda x, s: (x > s).sum(1) + 1, torch.float32),
}


@pytest.mark.parametrize("name", ZERO_D)
def test_a_tensor_without_dims_stays_on_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, dtype = ZERO_D[name]
    fast = compiled(f)
    tensors = [torch.tensor(s, dtype=dtype) for s in (3, 1, 0, 5)]
    with torch.no_grad():
        expected = [f(X, s) for s in tensors]
        fast(X, tensors[0])
        with no_reads(monkeypatch):
            found = [fast(X, s) for s in tensors]
    assert_same(found, expected)
    counts = report()
    assert counts["graphs"] == counts["engines_built"] == 1
    assert counts["engine_calls"] == 5 and counts["eager_calls"] == 0


def test_sizes_are_told_by_the_host_alone(sizes_given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of tensors, a size that only the host knows, and an int: no element of any tensor is read for them."""

    def f(x: torch.Tensor, y: torch.Tensor, n: int) -> torch.Tensor:
        return (x.exp() + y.shape[0]).reshape(-1)[: x.shape[0] * n].view(n, -1) * n

    fast = compiled(f, dynamic=True)
    with torch.no_grad():
        calls = [(torch.randn(4, 6), torch.randn(3), 2), (torch.randn(5, 9), torch.randn(7), 3)]
        expected = [f(*args) for args in calls]
        for args in calls:
            fast(*args)
        with no_reads(monkeypatch):
            found = [fast(*args) for args in calls]
    assert_same(found, expected)
    assert report()["engine_calls"] == 4 and report()["eager_calls"] == 0 and sizes_given
