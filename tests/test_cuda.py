"""The backend on a CUDA device, with the stand-in engine: memory, streams, threads, weights. Run by hand: make
test-cuda.
"""

from __future__ import annotations

import copy
import gc
import resource
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.models import MODELS
from tests.compiled import assert_same, compiled, engine_calls, in_threads
from tests.test_models import SMALL, relative_error
from trt_dynamo.reports import report

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", SMALL)
def test_models_equal_eager(name: str) -> None:
    model, args = MODELS[name](**SMALL[name])
    model, args = model.cuda(), tuple(arg.cuda() for arg in args)
    fast = compiled(model)
    with torch.no_grad():
        assert relative_error(fast(*args), model(*args)) < 1e-3
        assert relative_error(fast(*args), model(*args)) < 1e-3
    assert report()["eager_calls"] == 0 and report()["engine_calls"] == 2


def test_unaligned_and_strided_inputs() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.exp() + 1, x.transpose(0, 1) * 2

    buffer = torch.randn(1000, device="cuda")
    inputs = [
        buffer[1:25].view(4, 6),
        torch.randn(6, 4, device="cuda").t(),
        torch.randn(6, 8, device="cuda")[:, ::2],
        torch.randn(1, 4, device="cuda").expand(6, 4),
    ]
    with torch.no_grad():
        for x in inputs:
            torch._dynamo.reset()
            assert_same(compiled(f)(x), f(x))


def test_side_streams_and_the_default_stream() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    fast = compiled(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.no_grad():
        x = torch.randn(64, 256, device="cuda")
        fast(x)
        for round_ in range(20):
            torch.cuda.synchronize()
            results = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    y = x * (round_ + 1)
                    results.append((fast(y), model(y)))
            results.append((fast(x + round_), model(x + round_)))
            torch.cuda.synchronize()
            for ours, eager in results:
                assert_same(ours, eager)


def test_results_outlive_their_stream_and_memory_is_not_reused_early() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).exp().log()

    fast = compiled(f)
    with torch.no_grad():
        expected, ours = [], []
        for i in range(50):
            x = torch.full((1000, 1000), float(i % 7), device="cuda")
            ours.append(fast(x)[0, 0])
            expected.append(2.0 * (i % 7) + 1)
            del x
        assert_same(torch.stack(ours).cpu(), torch.tensor(expected))


def test_threads_share_an_engine() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).cuda()
    fast = compiled(model)
    with torch.no_grad():
        fast(torch.randn(8, 64, device="cuda"))

    def work(_: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                x = torch.randn(8, 64, device="cuda")
                assert_same(fast(x), model(x))

    in_threads(8, work)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_weights_that_change_on_the_device(options: dict[str, Any]) -> None:
    eager = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
    model = copy.deepcopy(eager)
    fast = compiled(model, rebuild_after=2)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, **options) for m in (model, eager)]
    for _ in range(3):
        x = torch.randn(8, 16, device="cuda")
        runs: tuple[Callable[..., Any], ...] = (fast, eager)
        for run, optimizer in zip(runs, optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            for _ in range(4):
                assert_same(fast(x), eager(x))
    assert report()["engine_calls"] > 0


def test_mutations_and_aliases() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.mul_(2)
        y = x.exp() + 1
        return y, y[0]

    x = torch.randn(4, 5, device="cuda")
    z = x.clone()
    with torch.no_grad():
        ours, eager = compiled(f)(x), f(z)
        assert_same(ours, eager)
        assert_same(x, z)
        ours[0].zero_()
    assert_same(ours[1], torch.zeros(5, device="cuda"))


def test_a_scalar_on_the_cpu_beside_tensors_on_the_device() -> None:
    def f(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x * s + torch.tensor(2.0)

    x, s = torch.randn(4, device="cuda"), torch.tensor(3.0)
    with torch.no_grad():
        assert_same(compiled(f)(x, s), f(x, s))


def test_dynamic_sizes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).cuda().eval()
    fast = compiled(model)
    with torch.no_grad():
        for batch, size in ((4, 16), (3, 17), (9, 40), (70, 33), (2, 21)):
            x = torch.randn(batch, 3, size, size, device="cuda")
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)


def test_no_call_synchronizes_the_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).cuda()
    fast = compiled(model)
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode is a prototype, says torch
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_results_on_the_cpu_stay_there() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.sin() * 2
        return (
            y.relu() + 1,
            y.cpu() + torch.ones(3),
            y.mean().cpu(),
            torch.zeros_like(y, device="cpu"),
            y * y.sum().cpu(),
        )

    x = torch.randn(5, 3, device="cuda")
    with torch.no_grad():
        for mine, its in zip(compiled(f)(x), f(x), strict=True):
            assert mine.device == its.device
            assert_same(mine, its)
    assert engine_calls() > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Callable[..., nn.Module]) -> None:
    model = kind(8, 16, 2, bidirectional=True, batch_first=True).cuda().eval()
    # cuDNN's recurrent layers compute in TF32 by default.
    exact = torch.backends.cudnn.flags(allow_tf32=False)
    with exact, torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        fast = compiled(model)
        for shape in ((3, 5, 8), (3, 9, 8), (4, 12, 8)):
            x = torch.randn(shape, device="cuda")
            assert_same(fast(x)[0], model(x)[0])
    assert engine_calls() > 0


def test_ten_thousand_calls_of_changing_shapes_leave_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
    fast = compiled(model, dynamic=True, weights="frozen")
    sizes = torch.randint(2, 60, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    buffer = torch.randn(64, 32, device="cuda")

    def calls(count: int) -> None:
        with torch.no_grad():
            for size in sizes[:count]:
                fast(buffer[:size])

    calls(1000)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    objects, resident = len(gc.get_objects()), resident_bytes()
    calls(10_000)
    torch.cuda.synchronize()
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert len(gc.get_objects()) < objects + 1000
    assert resident_bytes() < resident + 32 * 2**20
    assert report()["eager_calls"] == 0


def resident_bytes() -> int:
    """Bytes of the process's resident memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_scratch_memory_is_shared_and_goes_back() -> None:
    models = [nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).cuda() for _ in range(4)]
    fast = [compiled(model, weights="frozen") for model in models]
    x = torch.randn(4096, 256, device="cuda")
    with torch.no_grad():
        for each in fast:
            each(x)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for each in fast:
            each(x)
        torch.cuda.synchronize()
        one = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() == before
        torch.cuda.reset_peak_memory_stats()
        fast[0](x)
        assert one <= torch.cuda.max_memory_allocated() - before + 2**20


def test_contexts_of_many_streams_stay_bounded() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).cuda()
    fast = compiled(model, max_contexts=2)
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        fast(x)
        torch.cuda.synchronize()
        for turn in range(40):
            with torch.cuda.stream(torch.cuda.Stream()):
                y = x + turn
                assert_same(fast(y), model(y))
            assert_same(fast(x), model(x))


def test_a_stream_of_another_library_may_end_before_the_engine() -> None:
    from cuda.bindings import driver

    first = nn.Linear(16, 32)
    model = nn.Sequential(first, nn.GELU(), nn.Linear(32, 4)).cuda()
    fast = compiled(model)
    x = torch.randn(8, 16, device="cuda")
    with torch.no_grad():
        assert_same(fast(x), model(x))
        for _ in range(3):
            _, handle = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            stream = torch.cuda.ExternalStream(int(handle))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ours, eager = fast(x), model(x)
            stream.synchronize()
            assert_same(ours, eager)
            driver.cuStreamDestroy(handle)
            first.weight.data.mul_(1.1)  # the refit comes after that stream's last call
            assert_same(fast(x), model(x))
