"""Every size gets an answer, and the engine follows the traffic: ranges, growth, builds in the background."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
import sympy
import torch
from torch import nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo.profiles import Range, dim_range, grown
from trt_dynamo.reports import report
from trt_dynamo.runtime import wait_for_builds

S = sympy.Symbol("s", integer=True, positive=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        return torch.cat([y, y.flip(0)]).reshape(x.shape[0], -1) + x.shape[1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, Range(2, 8, 64)),
        (65, Range(2, 65, 128)),
        (1000, Range(2, 1000, 1000)),
        (1, Range(1, 8, 64)),
        (0, Range(0, 8, 64)),
    ],
)
def test_a_range_grows_geometrically(size: int, expected: Range) -> None:
    assert grown({S: Range(2, 8, 64)}, {S: size}) == {S: expected}


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (2 * S + 1, Range(5, 17, 129)),
        (S // 2, Range(1, 4, 32)),
        (S * S, Range(4, 64, 4096)),
        (sympy.Integer(7) + 0 * S, Range(7, 7, 7)),
    ],
)
def test_a_derived_dim_has_a_derived_range(dim: sympy.Expr, expected: Range) -> None:
    assert dim_range(int(dim) if dim.is_number else dim, {S: Range(2, 8, 64)}) == expected


def test_marked_ranges_are_kept() -> None:
    net = Net()
    fast = compiled(net)
    x = torch.randn(3, 5, 6)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=12)
    with torch.no_grad():
        fast(x)
        for n in (2, 12, 7):
            assert_same(fast(torch.ones(n, 5, 6)), net(torch.ones(n, 5, 6)))
    assert report()["graphs"] == report()["engines_built"] == 1


def test_a_stream_of_sizes_costs_few_graphs_and_few_builds() -> None:
    net = Net()
    fast = compiled(net)
    draw = random.Random(0)
    with torch.no_grad():
        for _ in range(50):
            x = torch.randn(draw.randint(2, 300), draw.randint(2, 500), 6)
            assert_same(fast(x), net(x))
    counts = report()
    assert counts["graphs"] <= 3
    assert counts["engines_built"] <= 2 * (math.ceil(math.log2(500 / 64)) + 2)
    assert counts["eager_calls"] == 0


def test_never_rebuilding_still_answers() -> None:
    net = Net()
    fast = compiled(net, rebuild="never", dynamic=True)
    with torch.no_grad():
        for n in (3, 5, 200, 1, 2000):
            x = torch.randn(n, 3, 6)
            assert_same(fast(x), net(x))
    assert report()["rebuilds"] == 0


def test_background_rebuilds_answer_in_eager_meanwhile() -> None:
    net = Net()
    fast = compiled(net, rebuild="background", dynamic=True)
    with torch.no_grad():
        fast(torch.randn(3, 4, 6))
        big = torch.randn(700, 4, 6)
        assert_same(fast(big), net(big))
        assert wait_for_builds(60)
        before = report()["engine_calls"]
        assert_same(fast(big), net(big))
    assert report()["engine_calls"] == before + 1
    assert report()["rebuild_reasons"] == {"a size outside the profile": 1}


def test_a_first_build_in_the_background() -> None:
    net = Net()
    fast = compiled(net, compile="background")
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        assert_same(fast(x), net(x))
        assert wait_for_builds(60)
        assert_same(fast(x), net(x))
    assert report()["engine_calls"] >= 1


def test_eight_threads_with_sizes_of_their_own() -> None:
    net = Net()
    fast = compiled(net, rebuild="background", dynamic=True)
    with torch.no_grad():
        fast(torch.randn(3, 4, 6))

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with torch.no_grad():
            for _ in range(12):
                x = torch.randn(draw.randint(2, 400), draw.randint(2, 40), 6)
                assert_same(fast(x), net(x))

    in_threads(8, work)
    assert wait_for_builds(60)


def test_the_interpreter_ends_cleanly_during_a_build(tmp_path: object) -> None:
    code = (
        "import torch\n"
        "model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(30)])\n"
        "fast = torch.compile(model, backend='tensorrt', options={'runtime': 'reference', 'compile': 'background'})\n"
        "with torch.no_grad(): fast(torch.randn(2, 64))\n"
        "print('answered')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "answered" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr, done.stderr


def test_sizes_that_no_input_tells_come_in_as_numbers() -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return (x.exp() + n).repeat(n, 1)[: n + 1] * torch.arange(n + 1)[:, None]

    fast = compiled(f, dynamic=True)
    with torch.no_grad():
        for n in (3, 5, 9):
            x = torch.randn(4, 6)
            assert_same(fast(x, n), f(x, n))


def test_odd_sizes_through_a_small_u_net() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 8, 3, 2, 1)
            self.inner = nn.Conv2d(8, 8, 3, 1, 1)
            self.out = nn.Conv2d(11, 2, 3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.inner(torch.relu(self.down(x))))
            y = nn.functional.interpolate(y, size=x.shape[2:], mode="nearest")
            out: torch.Tensor = self.out(torch.cat([x, y], 1))
            return out

    net = UNet().eval()
    fast = compiled(net)
    draw = random.Random(1)
    with torch.no_grad():
        for _ in range(10):
            x = torch.randn(draw.randint(1, 4), 3, draw.randint(7, 90), draw.randint(7, 90))
            assert_same(fast(x), net(x))
