"""Engines built ahead of time: what the build machine stores is what a machine with a GPU looks up, and no other."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cache_cases import key
from tests.compiled import assert_same, compiled
from trt_dynamo import build as build_module
from trt_dynamo import engine_making, identity
from trt_dynamo import trt as tensorrt_module
from trt_dynamo.ahead_of_time import PORTABLE, VALUES_ASKED, Ahead, build_ahead, settings_for
from trt_dynamo.as_if_on_cuda import CUDA, Twins, layout_of_cudnn, moved
from trt_dynamo.cache import Plan, get_or_build, open_store
from trt_dynamo.cache.remote import open_remote
from trt_dynamo.errors import BuildError, SettingsError, Unsupported
from trt_dynamo.reports import report, reset_report
from trt_dynamo.settings import Settings

CPU = torch.device("cpu")


class Tied(nn.Module):
    """A weight used twice, a buffer, a device constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        y = torch.relu(self.second(self.first(x)) * self.scale + torch.arange(8, device=x.device))
        return y * 2 if twice else y


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x))
        torch._dynamo.graph_break()
        result: Tensor = torch.sigmoid(self.layer(x + torch.ones(8, device=x.device)))
        return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).sum(-1)


class Asks(nn.Module):
    """A graph, a question about values, a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x))
        if x.sum() > 0:
            x = torch.tanh(x)
        result: Tensor = torch.sigmoid(self.layer(x))
        return result


class Writes(nn.Module):
    """It writes to a buffer, so that this one is no weight of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return torch.relu(self.layer(x)) * self.count


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))


def last(value: Any) -> Any:
    return value.to(memory_format=torch.channels_last)


@dataclasses.dataclass
class Case:
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dynamic: bool | None = None


CASES = {
    "tied": Case(Tied, (torch.ones(3, 8),)),
    "keywords": Case(Tied, (torch.ones(3, 8),), {"twice": True}),
    "dynamic": Case(Tied, (torch.ones(3, 8),), dynamic=True),
    "half": Case(lambda: Tied().half(), (torch.ones(3, 8, dtype=torch.float16),)),
    "fp16": Case(Tied, (torch.ones(3, 8),), options={"precision": "fp16"}),
    "weights are inputs": Case(Tied, (torch.ones(3, 8),), options={"weights": "inputs"}),
    "two profiles": Case(Tied, (torch.ones(3, 8),), options={"profiles": 2}, dynamic=True),
    "for CUDA graphs": Case(Tied, (torch.ones(3, 8),), options={"cuda_graphs": "auto"}),
    "broken": Case(Broken, (torch.ones(3, 8),)),
    "attention": Case(Attention, (torch.ones(2, 5, 16),)),
    "a buffer is written": Case(Writes, (torch.ones(2, 8),)),
    "convolutions": Case(convolutions, (torch.ones(2, 4, 8, 8),)),
    "channels last": Case(lambda: last(convolutions()), (last(torch.ones(2, 4, 8, 8)),)),
    "channels last, dynamic": Case(lambda: last(convolutions()), (last(torch.ones(2, 4, 8, 8)),), dynamic=True),
}


def made(case: Case) -> nn.Module:
    torch.manual_seed(7)
    return case.make().eval()


def ahead(model: Callable[..., Any], case: Case, device: torch.device, target: str = PORTABLE) -> Ahead:
    settings = settings_for(target, Settings.from_env().merge({"min_segment_nodes": 1, **case.options}))
    return build_ahead(model, case.args, case.kwargs, settings, dynamic=case.dynamic, device=device)


def stored() -> set[str]:
    return {entry.key for entry in open_store(Settings.from_env()).entries()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_stored_is_what_a_run_looks_up(case: Case) -> None:
    """On the CPU, where both can be done here: the real tensors of a run, and the fake ones of a build."""
    found = ahead(made(case), case, CPU)
    assert found.problems == [] and set(found.keys) == stored() != set()
    reset_report()
    with torch.no_grad():
        compiled(made(case), dynamic=case.dynamic, **case.options)(*case.args, **case.kwargs)
    assert (report()["cache_hits"], report()["engines_built"]) == (len(found.engines), 0)
    assert stored() == set(found.keys)


def test_the_cpus_convolutions_limit_no_size() -> None:
    """torch would choose one by the batch, and so guard it."""
    case = CASES["channels last, dynamic"]
    assert ahead(made(case), case, CUDA).problems == []
    assert (2, 2, 64) in report()["builds"][-1]["ranges"].values()


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_stored_is_what_a_gpu_looks_up(case: Case) -> None:
    found = ahead(made(case), case, CUDA)
    assert found.problems == [] and set(found.keys) == stored() != set()
    args = [arg.cuda() for arg in case.args]
    with torch.no_grad():
        compiled(made(case).cuda(), dynamic=case.dynamic, **case.options)(*args, **case.kwargs)
    assert stored() == set(found.keys)


@pytest.mark.parametrize("name", ["tied", "dynamic", "fp16", "broken", "attention", "channels last"])
def test_the_graph_is_that_of_a_gpu_and_the_same_each_time(name: str) -> None:
    case = CASES[name]
    on_cpu, on_cuda = ahead(made(case), case, CPU), ahead(made(case), case, CUDA)
    assert on_cuda.problems == [] and on_cuda.keys and not {*on_cpu.keys} & {*on_cuda.keys}
    again = ahead(made(case), case, CUDA)
    assert again.keys == on_cuda.keys and all(engine.hit for engine in again.engines)


@pytest.mark.parametrize(("gpu", "found"), [("8.9", True), ("8.6", True), ("12.0", False), (None, False)], ids=str)
def test_a_gpu_gets_the_engine_for_its_target_and_no_other(
    gpu: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with this GPU, and no setting: it asks for the portable engine, then for that of its own target."""
    case = CASES["tied"]
    built = [ahead(made(case), case, CUDA, target).keys for target in ("8.6", "8.9")]
    assert len({*built[0], *built[1]}) == 2
    monkeypatch.setattr(identity, "target_of", lambda device: gpu)
    monkeypatch.setattr(engine_making, "loading", lambda: True)
    reset_report()
    asked: list[str] = []
    known = get_or_build

    def get(key: str, build: Any, settings: Settings, others: Any) -> Any:
        asked.extend(others())
        return known(key, build, settings, others)

    monkeypatch.setattr(engine_making, "get_or_build", get)
    ahead(made(case), case, CUDA)
    assert (report()["cache_hits"], report()["engines_built"]) == ((1, 0) if found else (0, 1))
    assert asked == ({"8.6": built[0], "8.9": built[1]}.get(gpu or "", asked[:1] if gpu else []))


def test_a_machine_with_a_gpu_builds_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "target_of", lambda device: "8.9")
    case = CASES["tied"]
    first = ahead(made(case), case, CUDA, "8.9")
    second = ahead(made(case), case, CUDA, "8.6")
    assert [engine.hit for engine in (*first.engines, *second.engines)] == [False, False]


@pytest.mark.parametrize(
    ("device", "there", "rtx", "expected"),
    [
        ("cuda:1", True, True, "8.9"),
        ("cpu", True, True, None),
        ("cuda:0", False, True, None),
        ("cuda:0", True, False, None),
    ],
)
def test_the_target_of_a_gpu(
    device: str, there: bool, rtx: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9) if device.index == 1 else (8, 6))
    monkeypatch.setattr(tensorrt_module, "is_rtx", lambda: rtx)
    assert identity.target_of(torch.device(device)) == expected


def plan(number: int) -> Plan:
    return Plan(bytes([number]) * 1000, {"inputs": [], "outputs": []})


@pytest.mark.parametrize("place", ["folder", "remote"])
@pytest.mark.parametrize("mode", ["on", "readonly", "refresh"])
def test_which_entries_serve(place: str, mode: Any, tmp_path: Path) -> None:
    remote = str(tmp_path / "remote")
    there = Settings(cache_dir=tmp_path / "there", cache_remote=remote)
    for number in (2, 3):
        get_or_build(key(number), functools.partial(plan, number), there)
    uploads = open_remote(there)
    assert uploads is not None and uploads.finish()
    folder = tmp_path / "there" if place == "folder" else tmp_path / "here"
    here = Settings(cache_dir=folder, cache_remote=None if place == "folder" else remote, cache=mode)
    served, hit = get_or_build(key(1), lambda: plan(9), here, lambda: [key(4), key(3), key(2)])
    assert (served, hit) == ((plan(9), False) if mode == "refresh" else (plan(3), True))


def test_others_are_asked_for_only_where_the_first_is_missing(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path)
    get_or_build(key(1), lambda: plan(1), settings)
    assert get_or_build(key(1), lambda: plan(9), settings, lambda: pytest.fail("asked")) == (plan(1), True)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("7.5", {}, "no machine would use an engine for 7.5"),
        ("9.0", {}, "does not support compute capability 9.0"),
        ("new", {}, "not of the form"),
        ("8.9", {"cache": "off"}, "cache=off"),
        ("8.9", {"cache": "readonly"}, "cache=readonly"),
    ],
)
def test_what_cannot_be_built_for(target: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_for(target, Settings(**options))


def test_tensorrt_itself_builds_for_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_module, "is_rtx", lambda: False)
    with pytest.raises(SettingsError, match="TensorRT builds for the GPU that it runs on"):
        settings_for("8.9", Settings())


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match="chmod 700"):
        settings_for("8.9", Settings(cache_dir=tmp_path))


def raises(x: Tensor) -> Tensor:
    raise ValueError("too small")


PROBLEMS: dict[str, tuple[Callable[[], Callable[..., Any]], dict[str, Any], str, int]] = {
    "asks for values": (Asks, {}, VALUES_ASKED, 1),
    "raises": (lambda: raises, {}, "ValueError: too small", 0),
    "nothing to build": (lambda: lambda x: x.double().cumsum(0), {}, "no part of it goes to TensorRT", 0),
    "values not recorded": (Tied, {"precision": "auto"}, "calibrate the model", 0),
    "trains": (lambda: torch.enable_grad()(Tied().requires_grad_().train()), {}, "", 1),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_keeps_engines_out_is_said(name: str) -> None:
    make, options, words, engines = PROBLEMS[name]
    case = Case(Tied, (torch.ones(3, 8),), options=options)
    found = ahead(make(), case, CUDA)
    assert len(found.engines) == engines and words in "; ".join(found.problems), found.problems


def test_a_build_that_fails_costs_its_engine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known, calls = build_module.build, []

    def build(*args: Any, **kwargs: Any) -> bytes:
        calls.append(1)
        if len(calls) == 1:
            raise BuildError("no memory")
        return known(*args, **kwargs)

    monkeypatch.setattr(engine_making, "build", build)
    case = CASES["broken"]
    found = ahead(made(case), case, CUDA)
    assert len(found.engines) == 1 and len(found.problems) == 1 and "no memory" in found.problems[0]


def test_the_model_is_what_it_was() -> None:
    model: Any = nn.Sequential(Tied(), nn.LSTM(8, 4))
    model[0].note = "mine"
    held, flat = {**dict(model.named_parameters()), **dict(model.named_buffers())}, list(model[1]._flat_weights)

    def fails() -> None:
        with moved(model, Twins(CUDA)):
            assert {tensor.device for tensor in model.state_dict().values()} == {CUDA}
            assert all(each.is_cuda for each in model[1]._flat_weights)
            model[0].extra = 1
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == held.keys() and all(now[name] is held[name] for name in held)
    assert all(a is b for a, b in zip(model[1]._flat_weights, flat, strict=True))
    assert model[0].note == "mine" and not hasattr(model[0], "extra")
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)[0]
        ahead(model.eval(), Case(Tied, (x,)), CUDA)
        assert_same(model(x)[0], before)


def test_twins_share_memory_as_the_tensors_do() -> None:
    twins, whole = Twins(CUDA), torch.zeros(4, 6)
    a, b, other = twins.twin(whole), twins.twin(whole[1:, ::2]), twins.twin(torch.zeros(4, 6))
    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert (b.shape, b.stride(), b.storage_offset(), b.device) == ((3, 3), (6, 2), 6, CUDA)
    assert twins.twin(whole) is a and twins.real(a) is whole and twins.real(5) == 5


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj(), torch.eye(2).to_mkldnn()]
)
def test_tensors_that_have_no_twin(tensor: Tensor) -> None:
    with pytest.raises(Unsupported, match="cannot be taken for one on a GPU"):
        Twins().twin(tensor)


def test_marked_sizes_vary() -> None:
    x = torch.ones(3, 8)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=40)
    found = ahead(Tied().eval(), Case(Tied, (x,)), CUDA)
    assert [(span.min, span.max) for each in found.engines for span in each.built_for.values()] == [(2, 40)]


def test_recorded_sizes_vary(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps({"x": [{"min": 2, "opt": 16, "max": 32}, 8]}))
    case = Case(Tied, (torch.ones(3, 8),), options={"profiles": str(file)})
    found = ahead(made(case), case, CPU)
    assert [(s.min, s.opt, s.max) for each in found.engines for s in each.built_for.values()] == [(2, 16, 32)]
    reset_report()
    run = compiled(made(case), **case.options)
    with torch.no_grad():
        for rows in (2, 7, 32):
            run(torch.ones(rows, 8))
    assert (report()["cache_hits"], report()["engines_built"], report()["rebuilds"]) == (1, 0, 0)


def test_a_function_around_a_module() -> None:
    torch.manual_seed(7)
    model = Tied().eval()

    def outer(x: Tensor) -> Any:
        return model(x), x

    case = Case(Tied, (torch.ones(3, 8),))
    for each in (outer, model.forward):
        assert ahead(each, case, CUDA).problems == []
        assert next(model.parameters()).device == CPU
    assert len(stored()) == 1


def test_nothing_is_held_after_a_build() -> None:
    model = Tied().eval()
    ahead(model, CASES["tied"], CUDA)
    weight = weakref.ref(model)
    del model
    gc.collect()
    assert weight() is None


def nchw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [
        (nchw(2, 4, 5, 5), nchw(8, 4, 3, 3), torch.contiguous_format),
        (last(nchw(2, 4, 5, 5)), nchw(8, 4, 3, 3), torch.channels_last),
        (nchw(2, 4, 5, 5), last(nchw(8, 4, 3, 3)), torch.channels_last),
        (last(nchw(2, 4, 5, 5).double()), nchw(8, 4, 3, 3).double(), torch.contiguous_format),
        (last(nchw(2, 4, 5, 5).bfloat16()), nchw(8, 4, 3, 3).bfloat16(), torch.channels_last),
        (nchw(2, 4, 5), nchw(8, 4, 3), torch.contiguous_format),
        (
            nchw(2, 4, 5, 5, 5).to(memory_format=torch.channels_last_3d),
            nchw(8, 4, 3, 3, 3),
            torch.channels_last_3d,
        ),
    ],
)
def test_layouts_that_cudnn_gives(x: Tensor, weight: Tensor, expected: torch.memory_format) -> None:
    assert layout_of_cudnn(x, weight) is expected
