"""Graphs from AOTAutograd's cache: each answer is eager's, whatever another run has left there."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.compiled import assert_same, compiled
from trt_dynamo import reset_report
from trt_dynamo import trt as tensorrt_module
from trt_dynamo.aten_converters.registry import CONVERTERS
from trt_dynamo.reports import report
from trt_dynamo.warm import salt

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "engines"))
    yield
    torch._dynamo.reset()


class Net(torch.nn.Module):
    """A weight, a buffer that it writes, a literal constant, and ops that are taken apart."""

    count: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return torch.nn.functional.mse_loss(self.layer(x), torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3), reduction="none")


def run(model: Callable[..., Any], *args: Any, gradients: bool = False, **options: Any) -> str:
    """How the cache served a compilation as of a new process: hit, miss, bypass or none. The answer is eager's."""
    torch._dynamo.reset()
    counters["aot_autograd"].clear()
    reset_report()
    with torch.set_grad_enabled(gradients):
        expected = model(*args)
        actual = compiled(model, aot_cache="on", strict=True, **options)(*args)
    assert_same(actual, expected)
    found = [name for name in ("hit", "miss", "bypass") if counters["aot_autograd"][f"autograd_cache_{name}"]]
    return " ".join(found) or "none"


X = torch.rand(3, 4)


def test_a_second_run_traces_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trt_dynamo.warm")
    assert run(Net(), X) == "miss"
    assert report()["cache_misses"] == 1
    assert run(Net(), X) == "hit"
    assert (report()["cache_hits"], report()["engine_calls"]) == (1, 1)
    assert "the lowered graph came from AOTAutograd's cache" in caplog.text


def test_off_takes_no_part() -> None:
    run(Net(), X)
    assert run(Net(), X, fallback="inductor") == "none"
    torch._dynamo.reset()
    counters["aot_autograd"].clear()
    with torch.no_grad():
        compiled(Net())(X)
    assert not counters["aot_autograd"]["autograd_cache_hit"]


def test_other_weights_are_used() -> None:
    run(Net(1), X)
    model = Net(2)
    assert run(model, X) == "hit"
    assert report()["cache_misses"] == 1
    with torch.no_grad():
        model.layer.weight.data.mul_(3)
    assert run(model, X) == "hit"


def test_buffers_are_written() -> None:
    run(Net(), X)
    model = Net()
    assert run(model, X) == "hit"
    assert model.count.item() == 2


def changed_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = sys.modules["trt_dynamo.lowering.decompositions"]
    table = dict(tables.torch_table())
    del table[aten.mse_loss.default]
    monkeypatch.setattr(tables, "torch_table", lambda: table)


def changed_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERTERS, aten.mse_loss.default, CONVERTERS[aten.relu.default])


def setting(module: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *_: value)


def switch(write: Callable[[Any], None], read: Callable[[], Any], value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def change(_: pytest.MonkeyPatch) -> None:
        UNDO.append(functools.partial(write, read()))
        write(value)

    return change


UNDO: list[Callable[[], None]] = []


@pytest.fixture
def undone() -> Iterator[None]:
    yield
    while UNDO:
        UNDO.pop()()


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "decompositions": changed_table,
    "converters": changed_converter,
    "our code": setting(salt, "source_digest", "other"),
    "TensorRT": setting(tensorrt_module, "version", "99.0"),
    "GPU": setting(salt, "device_of", "other"),
    "torch": lambda monkeypatch: monkeypatch.setattr(torch, "__version__", "2.99"),
    "default dtype": switch(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "matmul": switch(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "high"),
    "fast path": switch(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled, False),
    "an op's kernel": lambda monkeypatch: monkeypatch.setattr(
        torch.library, "_impls", torch.library._impls | {"aten/relu/CompositeImplicitAutograd"}
    ),
}


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize("change", CHANGES)
def test_another_state_is_another_entry(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    assert run(torch.nn.ReLU(), X) == "miss"
    CHANGES[change](monkeypatch)
    assert run(torch.nn.ReLU(), X) == "miss"


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"float64": "float32"},
        {"eager_ops": "aten.relu"},
        {"min_segment_nodes": 2},
        {"weights": "inputs"},
        {"profiles": 2},
        {"optimization_level": 1},
    ],
    ids=str,
)
def test_other_settings_are_another_entry(options: dict[str, Any]) -> None:
    assert run(torch.nn.ReLU(), X) == "miss"
    torch._dynamo.reset()
    counters["aot_autograd"].clear()
    with torch.no_grad():
        compiled(torch.nn.ReLU(), aot_cache="on", **options)(X)
    assert counters["aot_autograd"]["autograd_cache_miss"] == 1


@pytest.mark.parametrize(
    "other",
    [torch.rand(4, 4), torch.rand(4, 3).t(), torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 8)[:, ::2]],
    ids=["shape", "strides", "dtype", "gaps"],
)
def test_other_inputs_are_another_entry(other: torch.Tensor) -> None:
    run(torch.nn.Softmax(1), X)
    assert run(torch.nn.Softmax(1), other) == "miss"


def test_literals_are_told_apart() -> None:
    assert run(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), X) == "miss"
    assert run(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 5.0]), X) == "miss"
    assert run(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 5.0]), X) == "hit"


def added(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


def viewed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    return y, y[0]


def attended(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])


def searched(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values, places = torch.topk(x, 2, dim=-1)
    return values, places, *x.max(dim=0)


def masked(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x.masked_fill(x < 0.3, -torch.inf), -1)[:, ::2]


def converted(x: torch.Tensor) -> torch.Tensor:
    return torch.full((3, 4), 2.5, dtype=torch.float64) * x.to(torch.float16) + torch.arange(4)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(x[None, None], 2, stride=1)


def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(part * 2 for part in x.split(2, dim=1))


@pytest.mark.parametrize(
    "function",
    [viewed, attended, torch.fft.rfft, searched, masked, converted, pooled, split],
    ids=lambda each: each.__name__,
)
def test_graphs_come_back_as_they_were(function: Callable[..., Any]) -> None:
    """Their engines are those of the first run."""
    assert run(function, X) == "miss"
    misses = report()["cache_misses"]
    assert run(function, X) == "hit"
    assert (report()["cache_hits"], report()["cache_misses"]) == (misses, 0)


def test_results_share_memory_as_in_eager() -> None:
    for _ in range(2):
        run(viewed, X)
        with torch.no_grad():
            y, first = compiled(viewed, aot_cache="on")(X)
        assert y.data_ptr() == first.data_ptr()


def test_inputs_are_written() -> None:
    for expected in ("miss", "hit"):
        torch._dynamo.reset()
        counters["aot_autograd"].clear()
        x = torch.zeros(4)
        with torch.no_grad():
            y = compiled(added, aot_cache="on", strict=True)(x)
        assert (x == 1).all() and y.data_ptr() == x.data_ptr()
        assert counters["aot_autograd"][f"autograd_cache_{expected}"] == 1


@pytest.mark.parametrize(
    "options",
    [{"compile": "background"}, {"verify": "sample"}, {"weights": "inputs"}, {"cuda_graphs": "whole"}],
    ids=str,
)
def test_what_follows_lowering_is_as_ever(options: dict[str, Any]) -> None:
    assert run(Net(), X, **options) == "miss"
    assert run(Net(), X, **options) == "hit"


def test_engines_that_are_gone_are_built_again(tmp_path: Path) -> None:
    run(Net(), X)
    for entry in (tmp_path / "engines").glob("*/*"):
        if entry.is_dir() and len(entry.name) == 64:
            (entry / "plan").unlink()
    assert run(Net(), X) == "hit"
    assert report()["cache_misses"] == 1


@pytest.mark.parametrize("old", [b'"nodes"', b"aten::", b"float32"])
def test_a_damaged_entry_is_not_used(tmp_path: Path, old: bytes) -> None:
    run(Net(), X)
    (file,) = [path for path in (tmp_path / "torch" / "aotautograd").rglob("*") if path.is_file()]
    data = file.read_bytes()
    place = data.index(old, data.index(b'"nodes"'))
    file.write_bytes(data[: place + 1] + bytes([data[place + 1] ^ 1]) + data[place + 2 :])
    assert run(Net(), X) == "bypass"


def leaky(slope: float) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.library.custom_op("trt_dynamo_tests::warm_leaky", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0.5, x, x * slope)

    op.register_fake(lambda x: torch.empty_like(x))
    return lambda x: torch.ops.trt_dynamo_tests.warm_leaky(x) + 1


HALVES = torch.arange(8.0)
ALONE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "may have been changed by the user": (leaky(0.1), (X,)),
    "inputs share memory": (lambda x, y: x * 2 + y, (HALVES[:4], HALVES[4:])),
    "the graph has a get_attr": (lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), (X,)),
}


@pytest.mark.parametrize("reason", ALONE)
def test_what_may_not_be_told_apart_is_traced_anew(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trt_dynamo.warm")
    function, args = ALONE[reason]
    assert run(function, *args) == "none"
    assert reason in caplog.text


def test_sizes_that_vary_are_traced_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trt_dynamo.warm")
    assert run(torch.nn.ReLU(), X, dynamic=True) == "none"
    assert "an input is not a plain tensor" in caplog.text or "a size varies" in caplog.text


def test_training_is_left_alone() -> None:
    run(Net(), X)
    x = X.clone().requires_grad_()
    for model in (Net(1), Net(2)):
        assert run(model, x, gradients=True) == "none"
        torch.compile(model, backend="tensorrt", options={"runtime": "reference", "aot_cache": "on"})(
            x
        ).sum().backward()
        assert model.layer.weight.grad is not None and x.grad is not None


def test_gradients_inside_are_left_alone() -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x * 2

    x = X.clone().requires_grad_()
    for _ in range(2):
        assert run(inside, x) == "none"


def test_autograd_caches_own_switch_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert run(Net(), X) == "none"


def test_torch_settings_are_as_before() -> None:
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch.compiler import config as compiler

    def state() -> tuple[Any, ...]:
        return (
            functorch.bundled_autograd_cache,
            dict(inductor.unsafe_marked_cacheable_functions),
            compiler.cache_key_tag,
        )

    before = state()
    run(Net(), X)
    assert state() == before


SCRIPT = """
import sys, torch
from torch._dynamo.utils import counters
from tests.test_warm_start import Net
import trt_dynamo
model, x = Net(int(sys.argv[1])).eval(), torch.ones(3, 4)
options = {"runtime": "reference", "min_segment_nodes": 1, "strict": True, "aot_cache": "on"}
with torch.no_grad():
    assert torch.allclose(torch.compile(model, backend="tensorrt", options=options)(x), model(x), atol=1e-5)
print(counters["aot_autograd"]["autograd_cache_hit"], trt_dynamo.report()["cache_hits"])
"""


@pytest.mark.slow
def test_processes_share() -> None:
    """The second process traces and builds nothing; the third has other weights, so another engine."""
    found = []
    for seed in (0, 0, 1):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(seed)],
            cwd=Path(__file__).parent.parent,
            env={**os.environ},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=300,
        )
        found.append(done.stdout.split()[-2:])
    assert found == [["0", "0"], ["1", "1"], ["1", "0"]]
