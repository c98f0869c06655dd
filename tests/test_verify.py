"""The setting `verify`: engines that are wrong are found, named and taken out of use; right ones are left alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.compiled import assert_same, compiled, engine_calls, in_threads
from trt_dynamo import Settings, engine_making
from trt_dynamo.aten_converters import ConvertedNetwork
from trt_dynamo.aten_converters.registry import CONVERTERS, Converter, match_parameters
from trt_dynamo.bisection import Bisection, Finding, Probe
from trt_dynamo.build import build
from trt_dynamo.cli import app
from trt_dynamo.errors import AccuracyError, BuildError
from trt_dynamo.reports import report
from trt_dynamo.runtime.agreement import Accuracy, compare, difference, near
from trt_dynamo.runtime.background import wait_for_builds
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.runtime.guard import DIFFERS, judgements

aten = torch.ops.aten
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def watched(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return compiled(model, **{"verify": "first", "strict": False, "cache": "off", **options})


def gelu_is_erf(net: Any, x: Any, *, approximate: str = "none") -> Any:
    return CONVERTERS[aten.erf.default].function(net, x)


def sine_is_cosine(net: Any, x: Any) -> Any:
    return CONVERTERS[aten.cos.default].function(net, x)


def floor_is_ceil(net: Any, x: Any) -> Any:
    return CONVERTERS[aten.ceil.default].function(net, x)


def nothing_is_nan(net: Any, x: Any) -> Any:
    return CONVERTERS[aten.abs.default].function(net, x)


def plant(monkeypatch: pytest.MonkeyPatch, target: Any, function: Callable[..., Any]) -> None:
    """A wrong converter in the place of the right one."""
    monkeypatch.setitem(CONVERTERS, target, Converter(target, function, match_parameters(target, function)))


@pytest.fixture
def wrong_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, aten.gelu.default, gelu_is_erf)


class Net(nn.Module):
    """The activation is at `block.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.first(x).relu())
        return result


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the guard warned of; another part of ours may have its say, once in a process."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.endswith("runtime.guard")]


def agree(fast: Callable[..., Any], model: Callable[..., Any], *args: Any) -> None:
    with torch.no_grad():
        assert_same(fast(*args), model(*args))


def test_a_wrong_converter_is_found_and_its_engine_taken_out(
    wrong_gelu: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net().eval()
    fast = watched(model)
    for _ in range(3):
        agree(fast, model, X)
    (warning,) = warnings_of(caplog)
    assert "graph_0.segment_0" in warning and "relative error" in warning and "tolerance 0.001, for float32" in warning
    assert "The first bad node is gelu (aten.gelu.default) in block.1" in warning
    told = report()
    assert told["engine_calls"] == 0 and told["verified"] == told["breaches"] == 1
    assert told["eager_reasons"] == {DIFFERS: 3}
    assert [reason.split(":")[0] for reason in told["breach_reasons"]] == ["graph_0.segment_0"]


def test_off_looks_at_nothing(wrong_gelu: None) -> None:
    with torch.no_grad():
        watched(Net(), verify="off")(X)
    assert engine_calls() == 1 and report()["verified"] == 0


def test_strict_raises_at_each_call(wrong_gelu: None) -> None:
    fast = watched(Net(), strict=True)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(AccuracyError, match=r"graph_0\.segment_0.*first bad node is gelu"):
            fast(X)


FAULTS: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any], Tensor, str]] = {
    "the only node": (aten.sin.default, sine_is_cosine, lambda x: x.sin(), X, "sin"),
    "between two graphs' worth": (aten.sin.default, sine_is_cosine, lambda x: ((x * 2).sin() + 1) * 3, X, "sin"),
    "integers": (aten.floor.default, floor_is_ceil, lambda x: (x.floor() + 1).int() + 3, X, "floor"),
    "a comparison": (aten.sin.default, sine_is_cosine, lambda x: x.sin() > 0, X, "sin"),
    "one of two results": (aten.sin.default, sine_is_cosine, lambda x: (x.exp() * 2, x.sin()), X, "sin"),
    "behind a tuple": (aten.sin.default, sine_is_cosine, lambda x: x.sin().max(1), X, "sin"),
    "half": (aten.sin.default, sine_is_cosine, lambda x: x.sin() + 1, X.half(), "sin"),
    "NaN that is lost": (aten.log.default, nothing_is_nan, lambda x: (x * 2).log(), -X.abs(), "log"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_bad_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, function, model, x, node = FAULTS[name]
    plant(monkeypatch, target, function)
    with judgements() as found:
        agree(watched(model), model, x)
    (judgement,) = found
    assert not judgement.agreement.agrees
    assert isinstance(judgement.cause, Finding) and judgement.cause.node == node, judgement.cause
    assert judgement.cause.before < 1e-6 and "test_verify.py:" in judgement.cause.source


class Attending(nn.Module):
    """Scores with a mask of the least float32, which a half type cuts; then the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        x = x + ((y @ y.transpose(-1, -2)) / 3 + mask).softmax(-1) @ y
        x = x + self.down(F.gelu(self.up(x)))
        return x[:, -1], x.argmax(-1)


@pytest.mark.parametrize(("precision", "dynamic"), [("native", True), ("fp16", True), ("bf16", False)])
def test_the_first_bad_node_among_casts_masks_and_sizes(wrong_gelu: None, precision: str, dynamic: bool) -> None:
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    with judgements() as found, torch.no_grad():
        watched(Attending().eval(), precision=precision, dynamic=dynamic)(torch.randn(2, 5, 8), mask)
    assert isinstance(found[0].cause, Finding) and found[0].cause.node == "gelu", found[0].cause
    assert found[0].cause.before < 0.01


def test_tensorrt_builds_what_the_search_asks_for(wrong_gelu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    make = engine_making.stand_in

    def build_too(network: ConvertedNetwork, profiles: Any, *args: Any) -> Engine:
        built.append(len(network.outputs))
        assert build(network, profiles[0], Settings(), label="a part")
        return make(network, profiles, *args)

    monkeypatch.setattr(engine_making, "stand_in", build_too)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    with torch.no_grad():
        watched(Attending().eval(), precision="fp16", dynamic=True)(torch.randn(2, 5, 8), mask)
    whole, again, all_values = built
    assert whole == again < 10 < all_values


def test_prefixes_find_what_an_engine_with_all_values_hides(wrong_gelu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Probe.bad
    asked: list[int] = []

    def fused(self: Probe, nodes: Any) -> Any:
        asked.append(len(nodes))
        if len(nodes) > 1:
            raise BuildError("too many results")
        return bad(self, nodes)

    monkeypatch.setattr(Probe, "bad", fused)
    with judgements() as found:
        model = Net()
        agree(watched(model), model, X)
    assert isinstance(found[0].cause, Finding) and found[0].cause.node == "gelu", found[0].cause
    assert asked.count(1) > 2 and max(asked) > 1


def test_a_search_that_fails_costs_only_itself(
    wrong_gelu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Bisection, "find", fails)
    model = Net()
    agree(watched(model), model, X)
    assert "The search for the first bad node failed: RuntimeError: no memory" in warnings_of(caplog)[0]


class Loud(nn.Module):
    """Its logits pass 65504 where its weight is large."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.last.weight.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * 100) * 100 + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize(("precision", "wrong"), [("native", 0), ("fp16", 1), ("bf16", 0)])
def test_an_overflow_of_float16(precision: str, wrong: int, caplog: pytest.LogCaptureFixture) -> None:
    model = Loud(500)
    fast = watched(model, precision=precision)
    with torch.no_grad():
        for _ in range(2):
            assert torch.linalg.vector_norm(fast(X) - model(X)) <= 0.02 * torch.linalg.vector_norm(model(X))
    assert report()["breaches"] == wrong == len(warnings_of(caplog))
    if wrong:
        assert "NaN or infinite" in warnings_of(caplog)[0] and "for fp16" in warnings_of(caplog)[0]


def test_a_wrong_engine_costs_no_other_set_of_weights(caplog: pytest.LogCaptureFixture) -> None:
    quiet, loud = Loud(), Loud(500)
    fast = watched(lambda model, x: model(x), precision="fp16")
    with torch.no_grad():
        for _ in range(2):
            for model in (quiet, loud):
                assert torch.linalg.vector_norm(fast(model, X) - model(X)) <= 0.01 * torch.linalg.vector_norm(model(X))
    told = report()
    assert told["breaches"] == 1 and told["engine_calls"] >= 2 and told["eager_reasons"][DIFFERS] == 2
    assert len(warnings_of(caplog)) == 1


def test_a_refit_is_verified_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    fast = watched(model)

    def changed() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)

    for _ in range(3):
        agree(fast, model, X)
        agree(fast, model, X)
        changed()
    agree(fast, model, X)
    right = report()
    assert right["refits"] >= 2 and right["verified"] >= 1 + right["refits"] and right["breaches"] == 0
    monkeypatch.setattr(Engine, "replace", lambda *_: None)
    changed()
    for _ in range(3):
        agree(fast, model, X)
    assert report()["breaches"] == 1
    assert "No node is at fault" in warnings_of(caplog)[-1]


@pytest.mark.parametrize(("verify", "found"), [("first", 0), ("sample", 1)])
def test_sample_finds_what_comes_later(verify: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = watched(lambda x: (x * 2).sin(), verify=verify, verify_every=3)
    right = Engine.__call__
    with torch.no_grad():
        for _ in range(6):
            fast(X)
        assert report()["verified"] == (2 if found else 1)
        monkeypatch.setattr(Engine, "__call__", lambda self, args: tuple(r + 1 for r in right(self, args)))
        for _ in range(4):
            fast(X)
    assert report()["breaches"] == found


def test_each_engine_is_verified_for_whatever_sizes(wrong_gelu: None) -> None:
    model = lambda x: (x * 2).tanh() + x.shape[0]  # noqa: E731
    fast = watched(model, dynamic=True)
    for size in (4, 7, 3000, 5, 100000, 9):
        agree(fast, model, torch.randn(size, 3))
    told = report()
    assert told["verified"] == 1 + told["rebuilds"] > 1 and told["breaches"] == 0
    wrong = watched(F.gelu, dynamic=True)
    for size in (4, 7, 3000):
        agree(wrong, F.gelu, torch.randn(size, 3))
    assert report()["breaches"] == 1


def test_a_call_without_elements_proves_nothing(wrong_gelu: None) -> None:
    model = lambda x: F.gelu(x * 2)  # noqa: E731
    fast = watched(model, dynamic=True)
    for size in (0, 5):
        agree(fast, model, torch.randn(size, 3))
    assert report()["breaches"] == 1


def writes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x.mul_(2).add_(F.gelu(y))
    view = x[1:]
    view.sub_(1)
    return view, x.t()


def test_writes_and_views_are_eagers_where_the_engine_is_wrong(wrong_gelu: None) -> None:
    fast = watched(writes)
    for _ in range(2):
        mine, theirs = X.clone(), X.clone()
        with torch.no_grad():
            got, want = fast(mine, X), writes(theirs, X)
            assert_same(got, want)
            got[0].zero_()
            want[0].zero_()
        assert_same(mine, theirs)
        assert got[1].untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
    assert report()["breaches"] == 1


def test_random_numbers_are_those_of_eager(wrong_gelu: None) -> None:
    def model(x: Tensor) -> Tensor:
        return F.gelu(x) + torch.rand_like(x)

    fast = watched(model)
    for seed in range(2):
        with torch.no_grad():
            torch.manual_seed(seed)
            mine = [fast(X), torch.rand(2)]
            torch.manual_seed(seed)
            assert_same(mine, [model(X), torch.rand(2)])
    assert report()["breaches"] == 1


def test_many_threads_get_right_answers_and_one_warning(wrong_gelu: None, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    fast = watched(model, compile="background")
    agree(fast, model, X)  # one graph for all threads, its engine not used yet
    wait_for_builds()

    def run(_: int) -> None:
        for _ in range(5):
            agree(fast, model, X)

    in_threads(6, run)
    assert engine_calls() == 0
    assert len([text for text in warnings_of(caplog) if "not eager's" in text]) == 1


def test_engines_that_are_built_in_the_background(wrong_gelu: None) -> None:
    model = Net()
    fast = watched(model, compile="background")
    agree(fast, model, X)
    wait_for_builds()
    for _ in range(2):
        agree(fast, model, X)
    assert report()["breaches"] == 1 and report()["eager_reasons"][DIFFERS] == 2


def test_weights_as_inputs(wrong_gelu: None) -> None:
    model = Net()
    with judgements() as found:
        agree(watched(model, weights="inputs"), model, X)
    assert isinstance(found[0].cause, Finding) and found[0].cause.node == "gelu", found[0].cause


def test_a_tolerance_of_the_users() -> None:
    model = Net()
    with torch.no_grad():
        watched(model, precision="bf16")(X)
        assert report()["breaches"] == 0
        watched(model, precision="bf16", verify_tolerance="1e-6")(X)
        assert report()["breaches"] == 1


def cancels(x: Tensor) -> Tensor:
    y = x @ torch.ones(8, 8) + 100
    return y - y.mean()


SOUND: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "NaN in, NaN out": (lambda x: (x * 2).sin(), torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])),
    "minus infinity of a mask": (lambda x: (x * 2).masked_fill(x > 0, -torch.inf), X),
    "a difference that cancels": (cancels, torch.ones(4, 8) + 1e-3 * X),
    "zeros": (lambda x: (x * 0).relu() + 0, X),
    "masks of the least number": (
        lambda x: ((x @ x.t()) + torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)).softmax(-1),
        X,
    ),
}


@pytest.mark.parametrize("precision", ["native", "fp16", "bf16"])
@pytest.mark.parametrize("name", SOUND)
def test_what_is_right_or_only_rounded_stays(name: str, precision: str) -> None:
    model, x = SOUND[name]
    with torch.no_grad():
        watched(model, precision=precision)(x)
    assert report()["breaches"] == 0 and engine_calls() == 1


def accuracy(tolerance: float = 1e-3) -> Accuracy:
    return Accuracy("float32", tolerance, 2.0**-20, (True,))


BIG = torch.ones(1000)
NEAR: list[tuple[str, Tensor, Tensor, bool]] = [
    ("equal", X, X, True),
    ("a rounding", X * (1 + 1e-5), X, True),
    ("another scale", X * 1.01, X, False),
    ("one element of many", torch.cat([BIG[1:], torch.zeros(1)]), BIG, False),
    ("another shape", X[:2], X, False),
    ("another dtype", X.double(), X, False),
    ("NaN for a number", torch.tensor([torch.nan]), torch.ones(1), False),
    ("a number for NaN", torch.ones(1), torch.tensor([torch.nan]), False),
    ("the other infinity", torch.tensor([-torch.inf]), torch.tensor([torch.inf]), False),
    ("almost infinite", torch.tensor([65504.0]).half(), torch.tensor([torch.inf]).half(), True),
    ("infinite too early", torch.tensor([torch.inf]), torch.tensor([66000.0]), False),
    ("huge", torch.full((2,), 3e38), torch.full((2,), 3e38), True),
    ("empty", torch.ones(0), torch.ones(0), True),
    ("an integer off by one", torch.tensor([1, 2]), torch.tensor([1, 3]), False),
    ("complex", torch.ones(2) + 0j, torch.ones(2) + 1j, False),
]


@pytest.mark.parametrize(("name", "actual", "expected", "same"), NEAR, ids=[case[0] for case in NEAR])
def test_when_two_tensors_are_near(name: str, actual: Tensor, expected: Tensor, same: bool) -> None:
    assert near(difference(actual, expected), accuracy()) is same
    assert str(difference(actual, expected))


@pytest.mark.parametrize(
    ("decided", "share", "same"), [(True, 0.5e-3, True), (True, 2e-3, False), (False, 5e-4, False)]
)
def test_integers_that_floats_decide_may_differ_in_a_few(decided: bool, share: float, same: bool) -> None:
    expected = torch.zeros(10000, dtype=torch.int64)
    actual = expected.clone()
    actual[: int(share * 10000)] = 1
    told = Accuracy("float32", 1e-3, 2.0**-20, (decided,))
    assert compare([actual], [expected], told, lambda: [expected]).agrees is same


def test_rounding_excuses_what_it_makes_itself() -> None:
    expected, off = torch.zeros(4), torch.full((4,), 1e-6)
    assert compare([off], [expected], accuracy(), lambda: [off]).agrees
    assert not compare([off * 10], [expected], accuracy(), lambda: [off]).agrees
    assert not compare([off], [expected], accuracy(), lambda: [expected]).agrees
    assert not compare([off], [expected], Accuracy("float32", 1e-3, 1.0, (True,), rigid=True), lambda: [off]).agrees


DEBUG = """
import torch

def make():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.ReLU()).eval(), (torch.randn(2, 8),)
"""


def debugged(tmp_path: Path, *arguments: str) -> Any:
    (tmp_path / "model.py").write_text(DEBUG)
    settings = ["--set", "runtime=reference", "--set", "min_segment_nodes=1"]
    return CliRunner().invoke(app, ["debug", f"{tmp_path / 'model.py'}:make", *settings, *arguments])


def test_the_command_names_the_bad_node(wrong_gelu: None, tmp_path: Path) -> None:
    told = debugged(tmp_path)
    assert told.exit_code == 1
    assert "graph_0.segment_0 DIFFERS from eager" in told.stdout
    assert "first bad node: gelu (aten.gelu.default)" in told.stdout
    assert "module:         1" in told.stdout and "before it:      relative error 0" in told.stdout
    torch._dynamo.reset()
    (segment,) = json.loads(debugged(tmp_path, "--json").stdout)["segments"]
    assert segment["agrees"] is False and segment["cause"]["node"] == "gelu"


@pytest.mark.parametrize("precision", ["native", "auto"])
def test_the_command_finds_nothing_wrong(precision: str, tmp_path: Path) -> None:
    told = debugged(tmp_path, "--set", f"precision={precision}")
    assert told.exit_code == 0 and "graph_0.segment_0 agrees with eager" in told.stdout, told.output


def test_the_command_says_why_nothing_can_be_compared(tmp_path: Path) -> None:
    told = debugged(tmp_path, "--set", "runtime=tensorrt") if not torch.cuda.is_available() else None
    assert told is None or (told.exit_code == 1 and "no engine can run here" in told.stderr)


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", ["off", "auto", "whole"])
@pytest.mark.parametrize("wrong", [False, True])
def test_on_a_gpu(graphs: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong:
        plant(monkeypatch, aten.gelu.default, gelu_is_erf)
    model, x = Net().cuda().eval(), X.cuda()
    fast = watched(model, cuda_graphs=graphs, verify="sample", verify_every=4)
    for step in range(20):
        agree(fast, model, x)
        if step == 10:
            with torch.no_grad():
                model.first.weight.add_(0.5)
    told = report()
    assert told["breaches"] == int(wrong)
    assert (told["engine_calls"] == 0) if wrong else (told["verified"] >= 2 and told["engine_calls"] > 0)
    if graphs != "off":
        assert (told["cuda_graphs"] == 0) if wrong else (told["cuda_graphs"] >= 1)
