"""What training scripts put around a model, and how they copy, store and load it."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.reports import report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def agree(fast: Any, model: Any, times: int = 2) -> None:
    """Both answer alike without gradients, for new arguments."""
    with torch.no_grad():
        for _ in range(times):
            x = torch.randn(4, 6)
            assert_same(fast(x), model(x))


def ways() -> list[Any]:
    """A plain model in eval mode, and the ways to compile it."""

    def in_place(model: nn.Module) -> nn.Module:
        options = {"runtime": "reference", "min_segment_nodes": 1, "rebuild": "sync"}
        model.compile(backend="tensorrt", options=options)
        return model

    return [pytest.param(compiled, id="torch.compile"), pytest.param(in_place, id="model.compile")]


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("called", [False, True])
def test_state_dicts_are_plain_and_load(way: Any, called: bool) -> None:
    model, other = Net().eval(), Net().eval()
    plain = copy.deepcopy(model)
    fast = way(model)
    if called:
        agree(fast, plain)
    state = (fast if fast is model else model).state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert [key.removeprefix("_orig_mod.") for key in fast.state_dict()] == list(state)
    model.load_state_dict(other.state_dict())
    agree(fast, other)
    fast.load_state_dict(dict(zip(fast.state_dict(), plain.state_dict().values(), strict=True)))
    agree(fast, plain)
    assert engine_calls() > 0


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("called", [False, True])
def test_copies_are_independent(way: Any, called: bool) -> None:
    model = Net().eval()
    plain = copy.deepcopy(model)
    fast = way(model)
    if called:
        agree(fast, plain)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        model.head.weight.mul_(2)
    agree(twin, plain)
    agree(fast, model)
    assert not torch.equal(fast(torch.ones(4, 6)), twin(torch.ones(4, 6)))


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("called", [False, True])
def test_models_are_stored_whole(way: Any, called: bool) -> None:
    """As torch stores them: the compiled model is a plain one, or an `OptimizedModule` that compiles anew."""
    model = Net().eval()
    fast = way(model)
    if called:
        agree(fast, copy.deepcopy(model))
    for part in (model, fast):
        file = io.BytesIO()
        torch.save(part, file)
        file.seek(0)
        agree(torch.load(file, weights_only=False), model)
    agree(pickle.loads(pickle.dumps(model)), model)


class Features(Dataset[Tensor]):
    """Rows that a compiled model makes, in whichever process asks for them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows = torch.linspace(-1, 1, 8 * 6).view(8, 6)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(self.rows[index : index + 1])[0]
            return out


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(context: str) -> None:
    model = Net().eval()
    plain = copy.deepcopy(model)
    data = Features(compiled(model))
    expected = torch.stack([Features(plain)[i] for i in range(len(data))])
    assert_same(torch.stack([data[i] for i in range(len(data))]), expected)
    with contextlib.ExitStack() as stack:
        if sys.version_info >= (3, 12) and context == "fork":
            stack.enter_context(pytest.warns(DeprecationWarning, match="fork"))
        loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=context, timeout=200)
        assert_same(torch.cat(list(loader)), expected)
    assert_same(torch.stack([data[i] for i in range(len(data))]), expected)


# -- torch.nn.DataParallel --------------------------------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `replicate` and `parallel_apply` on the CPU: only what asks for a device is replaced."""
    # The modules are hidden behind functions of the same names.
    apply, replicate = sys.modules["torch.nn.parallel.parallel_apply"], sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(apply, "_get_device_index", lambda *_: 0)
    monkeypatch.setattr(replicate, "_get_device_index", lambda *_: 0)
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t.clone() for t in tensors] for _ in devices],
    )
    accelerator = types.SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda: torch.device("cpu"),
        current_stream=lambda *_: contextlib.nullcontext(),
        device_index=lambda *_: contextlib.nullcontext(),
    )
    # Only for this module: Dynamo asks torch.accelerator too.
    monkeypatch.setattr(apply, "torch", types.SimpleNamespace(**{**vars(torch), "accelerator": accelerator}))


def data_parallel(model: nn.Module, x: Tensor) -> Tensor:
    """What `DataParallel.forward` does with two devices."""
    parts = x.chunk(2)
    replicas = nn.parallel.replicate(model, [0, 1])
    return torch.cat(nn.parallel.parallel_apply(replicas, parts))


def inside(strict: bool) -> Any:
    """A model whose `forward` is compiled. (torch's own `replicate` takes an `OptimizedModule` apart.)"""

    class Compiled(Net):
        forward = compiled(Net.forward, strict=strict)

    return Compiled().eval()


@pytest.mark.usefixtures("two_devices")
def test_data_parallel_runs_in_eager_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    fast = inside(strict=False)
    model = Net().eval()
    model.load_state_dict(fast.state_dict())
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, 6)
            assert_same(data_parallel(fast, x), model(x))
    assert sum("DistributedDataParallel" in record.getMessage() for record in caplog.records) == 1
    counts = report()
    assert set(counts["eager_graphs"]) == {"torch.nn.DataParallel"}
    assert counts["engines_built"] == counts["engine_calls"] == 0


@pytest.mark.usefixtures("two_devices")
def test_data_parallel_is_an_error_with_strict() -> None:
    fast = inside(strict=True)
    with torch.no_grad(), pytest.raises(Exception, match="DataParallel makes new copies"):
        data_parallel(fast, torch.randn(4, 6))


def test_data_parallel_without_devices_is_the_model() -> None:
    model = Net().eval()
    agree(nn.DataParallel(compiled(model)), model)
    agree(compiled(nn.DataParallel(model)), model)
    assert engine_calls() == 4


# -- DistributedDataParallel ------------------------------------------------------------------------------------------


def distributed(rank: int, size: int, file: str, order: str) -> None:
    """Two steps of training and evaluations between them, beside the same without the backend."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    eager = nn.parallel.DistributedDataParallel(Net())
    torch.manual_seed(0)
    net = Net()
    model: Any
    if order == "wrap, compile":
        model = compiled(nn.parallel.DistributedDataParallel(net), rebuild_after=0)
    else:
        model = nn.parallel.DistributedDataParallel(compiled(net, rebuild_after=0))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, net)]
    torch.manual_seed(rank)
    for _ in range(2):
        x = torch.randn(8, 6)
        for module, optimizer in zip((eager, model), optimizers, strict=True):
            module.train()
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        for ours, its in zip(net.state_dict().values(), eager.module.state_dict().values(), strict=True):
            assert_same(ours, its)
        eager.eval()
        model.eval()
        agree(model, eager)
    assert engine_calls() >= 2, report()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["wrap, compile", "compile, wrap"])
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_distributed_data_parallel(order: str, size: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=distributed, args=(r, size, f"{tmp_path}/store", order)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0] * size
