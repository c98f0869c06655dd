"""What TensorRT does not take, compiled by Inductor: the same answers as eager, and eager where Inductor fails.

Most tests have Inductor trace each part as it does and then call the ops one by one, since compiling takes seconds.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls, in_threads
from trt_dynamo import backend, fallback
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings

Function = Callable[..., Any]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Inductor without its compiler: the graphs that it would make code of, which run op by op."""
    graphs: list[GraphModule] = []

    def keep(module: GraphModule, inputs: Sequence[Any], **rest: Any) -> Function:
        graphs.append(module)
        return make_boxed_func(module.forward)

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(module, list(inputs), keep, fallback.OPTIONS)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(fallback, "inductor", inductor)
    return graphs


def fails(error: Exception) -> Function:
    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        raise error

    return inductor


def wide(x: torch.Tensor) -> torch.Tensor:
    """Three kernels that TensorRT has no type for."""
    return x.double().sin().float()


class Between(nn.Module):
    """Two engines with a part between them and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.softmax(self.second(wide(torch.relu(self.first(x)))), -1) + x
        return y, y.double().cos().sum(0)


def use(function: Function) -> Function:
    """`function` between two nodes that go to engines."""
    return lambda x, *rest: function(torch.relu(x) + 1, *rest)


def views(x: torch.Tensor) -> Any:
    y = wide(x) * 2
    return y, y[0], y.t(), y.view(-1), x, x.view(-1), y.expand(2, *y.shape), torch.softmax(y, -1)


def writes(x: torch.Tensor, buffer: torch.Tensor) -> Any:
    y = x.double().sin().cos()
    buffer.add_(y.sum(0).float())
    x.mul_(2)
    return x, buffer[:2], torch.softmax(buffer, 0), y


def random_numbers(x: torch.Tensor) -> Any:
    y = F.dropout(wide(x).cos(), 0.5) * 2
    return wide(torch.softmax(y, -1) + torch.rand_like(x)), torch.randn(3)


def gaps(x: torch.Tensor) -> Any:
    """An engine gives out what is a view with gaps in eager."""
    y = torch.relu(x)[:, :2]
    z = y.double().sin() + 1
    return torch.softmax(z.float(), -1) * 3, z.tan()


def gaps_in_another_order(x: torch.Tensor) -> Any:
    y = (torch.relu(x) + 1)[:, ::2].t()
    return y.double() * 2, torch.softmax(y, -1), y.double().sin() + y.double()


def other_order(x: torch.Tensor) -> Any:
    y = torch.relu(x).t()
    return wide(y), wide(y[1:]).cos(), torch.softmax(y, 0)


def halves(x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.t()
        with torch.autocast("cpu", enabled=False):
            z = (wide(y.float()) @ x).double().tan()
        return torch.softmax(y.float(), -1), z


def complex_numbers(x: torch.Tensor) -> Any:
    return torch.fft.fft(x.double()).abs().sin().float() + torch.relu(x), x.double().sin().tan()


def search(x: torch.Tensor) -> Any:
    places = torch.nonzero(torch.sin(torch.relu(x).double()) > 0.1)
    z = places.double().cos().float() * 2
    return torch.softmax(z, -1), z.double().sin().tan(), places.shape[0] * z.sum()


def own_number(x: torch.Tensor, n: torch.Tensor) -> Any:
    count = n.item()
    torch._check(count >= 0)
    z = torch.relu(x)[:, :3].double().sin() * count + 1
    return torch.softmax(z.float(), -1) * count, (z + count).tan()


CASES: dict[str, tuple[Function, Callable[[int], tuple[Any, ...]]]] = {
    "views": (views, lambda n: (torch.randn(n, 6),)),
    "writes": (writes, lambda n: (torch.randn(n, 6), torch.randn(6))),
    "random_numbers": (random_numbers, lambda n: (torch.randn(n, 6),)),
    "gaps": (gaps, lambda n: (torch.randn(n, 6),)),
    "gaps_in_another_order": (gaps_in_another_order, lambda n: (torch.randn(n, 6),)),
    "other_order": (other_order, lambda n: (torch.randn(n, 6),)),
    "transposed": (other_order, lambda n: (torch.randn(6, n).t(),)),
    "halves": (halves, lambda n: (torch.randn(n, 6),)),
    "complex_numbers": (complex_numbers, lambda n: (torch.randn(n, 6),)),
    "search": (search, lambda n: (torch.randn(n, 6),)),
    "nothing_found": (search, lambda n: (-torch.rand(n, 6),)),
    "own_number": (own_number, lambda n: (torch.randn(n, 6), torch.tensor(n))),
    "in_engines_too": (use(views), lambda n: (torch.randn(n, 6),)),
}


def agree(
    function: Function,
    arguments: Callable[[int], tuple[Any, ...]],
    dynamic: bool,
    fallback: str = "inductor",
    **options: Any,
) -> None:
    """Results, their memory, what is written, and the state of the random numbers are eager's, call by call."""
    fast = compiled(function, dynamic=dynamic, fallback=fallback, strict=True, **options)
    for n in (5, 7, 5):
        torch.manual_seed(n)
        mine = arguments(n)
        its = copy.deepcopy(mine)
        torch.manual_seed(n)
        found, after = fast(*mine), torch.get_rng_state()
        torch.manual_seed(n)
        wanted = function(*its)
        assert torch.equal(after, torch.get_rng_state())
        rtol, atol = (1e-2, 1e-2) if function is halves else (1e-4, 1e-5)
        torch.testing.assert_close((found, mine), (wanted, its), rtol=rtol, atol=atol)
        for each, other in zip(found, wanted, strict=True):
            if each.numel():
                assert each.stride() == other.stride()
            if 0 not in other.stride():
                each.add_(1), other.add_(1)
        torch.testing.assert_close((found, mine), (wanted, its), rtol=rtol, atol=atol)


@pytest.fixture
def captured() -> Iterator[None]:
    """Dynamo keeps in a graph what depends on data."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static", marks=pytest.mark.slow), pytest.param(True, id="dynamic")]
)
@pytest.mark.parametrize("name", CASES)
def test_parts_equal_eager(name: str, dynamic: bool, traced: list[GraphModule]) -> None:
    with torch.no_grad():
        agree(*CASES[name], dynamic)
    assert traced and report()["inductor_parts"] == len(traced) and report()["inductor_refusals"] == 0


@pytest.mark.parametrize("name", ["gaps", "gaps_in_another_order", "other_order", "transposed"])
def test_what_eager_makes_of_views_with_gaps(name: str) -> None:
    with torch.no_grad():
        agree(*CASES[name], True, fallback="eager")


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_parts_equal_eager(name: str, dynamic: bool) -> None:
    with torch.inference_mode():
        agree(*CASES[name], dynamic)
    assert report()["inductor_parts"] > 0 and report()["inductor_refusals"] == 0


def test_parts_compiled_by_inductor() -> None:
    """The real thing: two parts, for all sizes, that read the weights at each call and have names in a profile."""
    model = Between().eval()
    fast = compiled(model, dynamic=True, fallback="inductor", strict=True)
    with torch.no_grad():
        for n in (5, 7, 12):
            x = torch.randn(n, 8)
            assert_same(fast(x), model(x))
        assert report()["inductor_parts"] == 2 and report()["graphs"] == 1
        assert engine_calls() == 6
        with torch.profiler.profile(acc_events=True) as profile:
            fast(x)
        names = {event.name for event in profile.events()}
        assert {"graph_0.part_0 by Inductor", "graph_0.part_1 by Inductor"} <= names


@pytest.mark.parametrize("runtime", ["eager", "reference"])
def test_a_graph_without_engines_is_compiled_whole(runtime: str, traced: list[GraphModule]) -> None:
    def f(x: torch.Tensor, count: torch.Tensor) -> Any:
        count.add_(1)
        y = F.dropout(x.double().sin(), 0.5)
        return y.cos() + count, y[0]

    with torch.no_grad():
        agree(f, lambda n: (torch.randn(n, 6), torch.zeros(6, dtype=torch.float64)), True, runtime=runtime)
    counts = report()
    reason = "the setting runtime=eager" if runtime == "eager" else "TensorRT takes no node of it"
    assert counts["eager_graphs"] == {reason: 1} and counts["inductor_graphs"] == 1 == len(traced)
    assert counts["inductor_parts"] == counts["inductor_refusals"] == 0


def test_a_graph_that_cannot_be_lowered_is_compiled_whole(
    traced: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a planted fault")

    monkeypatch.setattr(backend, "lower", broken)
    x = torch.randn(3, 8)
    model = Between()
    with torch.no_grad():
        assert_same(compiled(model, fallback="inductor", strict=False)(x), model(x))
    assert report()["inductor_graphs"] == 1 and report()["eager_graphs"] == {"ValueError": 1}


def test_neighbours_are_one_part() -> None:
    """Not one part for each node; none for what is too small, random, a search, or a view that the caller gets."""

    def f(x: torch.Tensor) -> Any:
        y = torch.relu(x) + 1
        z = y.double().sin().cos() + y.double().tan()
        w = torch.softmax(z.float(), -1) + 1
        u = w.double().exp() + torch.rand_like(w)
        return torch.tanh(u.float()), z, z[0]

    found = trt_dynamo.explain(f, torch.randn(4, 4), options={"fallback": "inductor", "min_segment_nodes": 1})
    names = {verdict.node: verdict.target.split(".")[1] for verdict in found.eager}
    first, second = [[names[node] for node in nodes] for nodes in found.inductor]
    assert sorted({*first}) == ["_to_copy", "add", "cos", "sin", "tan"] and len(first) == len({*first}) + 2
    assert sorted(second) == ["_to_copy", "_to_copy", "add", "exp"]
    part, small = found.inductor
    assert f"Inductor: {len(part)} of the nodes in eager" in str(found)
    assert found.as_dict()["inductor"] == [list(part), list(small)]
    assert trt_dynamo.explain(f, torch.randn(4, 4), options={"min_segment_nodes": 1}).inductor == ()


def test_nothing_is_compiled_for_views_alone(traced: list[GraphModule]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.double().t().unsqueeze(0).expand(2, -1, -1).float(), -1)

    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same(compiled(f, fallback="inductor", eager_ops="aten.t,aten.permute,aten.expand")(x), f(x))
        assert_same(compiled(lambda x: x.t()[1:], fallback="inductor")(x), x.t()[1:])
    assert report()["inductor_graphs"] == 0


class Doubled(nn.Module):
    """An engine, and a part with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(torch.relu(x).double()).sin().float(), -1) * 2


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda m: [p.mul_(1.5) for p in m.parameters()],
    "through data": lambda m: [p.data.add_(0.5) for p in m.parameters()],
    "other tensors": lambda m: m.load_state_dict(Doubled().state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("runtime", ["eager", "reference"])
def test_weights_are_read_at_each_call(change: str, runtime: str, traced: list[GraphModule]) -> None:
    """Also where the user's own Inductor freezes them, and by a copy of the model."""
    model = Doubled()
    fast, other = compiled(model, fallback="inductor", runtime=runtime), copy.deepcopy(model)
    x = torch.randn(4, 8)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert_same(fast(x), other(x))
        CHANGES[change](model)
        assert_same(fast(x), model(x))
        assert_same(compiled(other, fallback="inductor", runtime=runtime)(x), other(x))
        assert torch._inductor.config.freezing
    assert traced


def test_the_users_configuration_stays(traced: list[GraphModule]) -> None:
    before = torch._inductor.config.get_hash(), torch._functorch.config.get_hash()
    with torch.no_grad():
        compiled(Between(), fallback="inductor")(torch.randn(3, 8))
    assert (torch._inductor.config.get_hash(), torch._functorch.config.get_hash()) == before


def test_the_setting_changes_no_engine() -> None:
    assert Settings(fallback="inductor").engine_fields() == Settings().engine_fields()


# -- what Inductor cannot do -----------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("runtime", ["eager", "reference"])
def test_no_compiler_on_the_machine(runtime: str, caplog: pytest.LogCaptureFixture) -> None:
    """The message names the remedy, once; eager answers."""
    model, x = Between(), torch.randn(3, 8)
    options: dict[str, Any] = {"fallback": "inductor", "runtime": runtime}
    patches = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), torch._inductor.config.patch(patches), uncached:
        assert_same(compiled(model, strict=False, **options)(x), model(x))
        assert report()["inductor_parts"] == report()["inductor_graphs"] == 0
        assert report()["inductor_refusal_reasons"] == {"InvalidCxxCompiler": 2 if runtime == "reference" else 1}
        (message,) = [text for text in warnings_of(caplog) if "Inductor" in text]
        assert "install a C++ compiler" in message and "CXX" in message
        torch._dynamo.reset()
        with pytest.raises(Exception, match="InvalidCxxCompiler"):
            compiled(model, strict=True, **options)(x)


def test_a_part_that_inductor_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fallback, "inductor", fails(ValueError("a planted fault")))
    model, x = Between(), torch.randn(3, 8)
    with torch.no_grad():
        assert_same(compiled(model, fallback="inductor", strict=False)(x), model(x))
        assert report()["inductor_refusal_reasons"] == {"ValueError": 2} and engine_calls() == 2
        assert [text for text in warnings_of(caplog) if "graph_0.part_0 runs in eager" in text and "planted" in text]
        torch._dynamo.reset()
        with pytest.raises(Exception, match="planted"):
            compiled(model, fallback="inductor", strict=True)(x)


def test_code_that_fails_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager answers that call and all others."""
    calls = []

    def run(*args: Any) -> Any:
        calls.append(args)
        raise ValueError("a planted fault")

    monkeypatch.setattr(fallback, "inductor", lambda module, inputs: run)
    model, x = Between(), torch.randn(3, 8)
    fast = compiled(model, fallback="inductor", strict=False)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), model(x))
        assert len(calls) == 2 == report()["inductor_refusals"]
        torch._dynamo.reset()
        with pytest.raises(ValueError, match="planted"):
            compiled(model, fallback="inductor", strict=True)(x)


@pytest.mark.usefixtures("captured")
def test_code_that_cannot_start_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton's launchers of torch 2.11 cannot: eager answers such a call, and Inductor's code the next ones."""

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        def run(*args: Any) -> Any:
            empty = any(isinstance(arg, torch.Tensor) and not arg.numel() for arg in args)
            (failures if empty else runs).append(module)
            if empty:
                raise ZeroDivisionError
            return module.forward(*args)

        return run

    runs: list[GraphModule] = []
    failures: list[GraphModule] = []
    monkeypatch.setattr(fallback, "inductor", inductor)
    fast = compiled(search, dynamic=True, fallback="inductor", strict=True)
    with torch.no_grad():
        for x in (torch.rand(5, 6), -torch.rand(5, 6), torch.rand(7, 6)):
            assert_same(fast(x), search(x))
    assert failures and all(runs.count(module) == 2 for module in failures)
    assert report()["inductor_refusals"] == 0


def test_a_wrong_argument_is_no_fault_of_inductor(traced: list[GraphModule]) -> None:
    def f(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.relu(x).double().sin()[i].cos().float(), -1) * 2

    fast = compiled(f, fallback="inductor", strict=False, eager_ops="aten.index")
    x = torch.randn(3, 8)
    with torch.no_grad():
        for index in (torch.tensor([0, 2]), torch.tensor([0, 5]), torch.tensor([1, 1])):
            if index.max() > 2:
                with pytest.raises(IndexError):
                    fast(x, index)
            else:
                assert_same(fast(x, index), f(x, index))
    assert report()["inductor_refusals"] == 0 and report()["inductor_parts"] == 1


LIES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "another order of dims": (lambda t: t.t().contiguous().t(), 0),
    "gaps": (lambda t: torch.stack([t, t], -1)[..., 0], 0),
    "another type": (lambda t: t.float(), 1),
    "another rank": (lambda t: t[0], 1),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_results_that_lie_otherwise(lie: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others count on the strides that the graph states; what is wrong in kind is not used."""
    change, refusals = LIES[lie]

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        return lambda *args: [change(result) for result in module(*args)]

    monkeypatch.setattr(fallback, "inductor", inductor)

    def f(x: torch.Tensor) -> Any:
        y = torch.relu(x).double().sin().cos()
        return y, torch.softmax(y.float(), -1) * 2

    fast = compiled(f, fallback="inductor", strict=False, dynamic=dynamic)
    with torch.no_grad():
        for n in (4, 7):
            x = torch.randn(n, 6)
            found, wanted = fast(x), f(x)
            assert_same(found, wanted)
            assert [t.stride() for t in found] == [t.stride() for t in wanted]
    graphs = 1 if dynamic else 2
    assert report()["inductor_refusals"] == refusals * graphs


def test_first_calls_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone the first, in which Triton tunes its kernels; then together."""
    together, most = [0], [0]
    calls: list[int] = []

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        def run(*args: Any) -> Any:
            calls.append(len(calls))
            together[0] += 1
            if len(calls) <= 1:
                time.sleep(0.05)
                most[0] = max(most[0], together[0])
            results = module(*args)
            together[0] -= 1
            return results

        return run

    monkeypatch.setattr(fallback, "inductor", inductor)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(wide(torch.relu(x)), -1) * 2

    x = torch.randn(4, 8)
    made: list[fallback.InductorPart] = []
    original = fallback.InductorPart.__init__

    def note(self: fallback.InductorPart, *args: Any) -> None:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(fallback.InductorPart, "__init__", note)
    fast = compiled(f, fallback="inductor")
    with torch.no_grad():
        assert_same(fast(x), f(x))
        made[0].proven = False
        calls.clear()
        found: list[torch.Tensor] = []

        def call(_: int) -> None:
            with torch.no_grad():
                found.append(fast(x))

        in_threads(6, call)
        assert len(found) == 6 and most == [1]
        for result in found:
            assert_same(result, f(x))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["eager", "reference"])
def test_gradients(runtime: str, traced: list[GraphModule]) -> None:
    """Losses, gradients, running statistics and random numbers, forward and backward compiled at once."""
    eager = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3))
    model = copy.deepcopy(eager)
    fast = compiled(model, training="inductor", runtime=runtime)
    for n in (4, 5, 9):
        x = torch.randn(n, 6)
        losses = []
        for each in (fast, eager):
            torch.manual_seed(n)
            loss = each(x).square().sum()
            loss.backward()
            losses.append(loss.detach())
        assert_same(*losses)
        for mine, its in zip(model.parameters(), eager.parameters(), strict=True):
            assert mine.grad is not None
            assert_same(mine.grad, its.grad)
        assert_same([*model.buffers()], [*eager.buffers()])
    assert len(traced) == 2 * report()["inductor_graphs"] == 4


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_that_inductor_refuses(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, with gradients; a backward that cannot be compiled is found out before the forward runs."""

    def refuse(module: GraphModule, inputs: Sequence[Any], **rest: Any) -> Function:
        if bool(rest.get("is_backward")) == (where == "backward"):
            raise ValueError("a planted fault")
        return make_boxed_func(module.forward)

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Function:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(module, list(inputs), refuse)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(fallback, "inductor", inductor)
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    compiled(model, training="inductor", strict=False)(x).sum().backward()
    assert_same(model.bias.grad, torch.full((3,), 2.0))
    assert report()["inductor_refusal_reasons"] == {"ValueError": 1}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="planted"):
        compiled(model, training="inductor", strict=True)(x)


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"halves"}))
def test_parts_on_cuda(name: str, dynamic: bool) -> None:
    """Triton's code; what is made on the CPU in the middle stays in eager."""
    function, arguments = CASES[name]

    def on_cuda(n: int) -> tuple[Any, ...]:
        return tuple(a.cuda() for a in arguments(n))

    def mixed(*args: Any) -> Any:
        scale = torch.full((), 0.5).double().sin()
        return tuple(each * scale.to(each.dtype) if i == 0 else each for i, each in enumerate(function(*args)))

    fast = compiled(mixed, dynamic=dynamic, fallback="inductor", strict=True)
    side = torch.cuda.Stream()
    with torch.inference_mode():
        for n in (5, 7, 5):
            torch.manual_seed(n)
            mine = on_cuda(n)
            its = copy.deepcopy(mine)
            torch.manual_seed(n)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = fast(*mine)
            torch.cuda.current_stream().wait_stream(side)
            torch.manual_seed(n)
            assert_same((found, mine), (mixed(*its), its))
    assert report()["inductor_parts"] > 0 and report()["inductor_refusals"] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # Inductor's advice
def test_training_on_cuda() -> None:
    eager = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3)).cuda()
    model = copy.deepcopy(eager)
    fast = compiled(model, training="inductor")
    x = torch.randn(16, 6, device="cuda")
    for each in (fast, eager):
        torch.manual_seed(0)
        each(x).square().sum().backward()
    for mine, its in zip(model.parameters(), eager.parameters(), strict=True):
        assert mine.grad is not None
        assert_same(mine.grad, its.grad)
    assert report()["inductor_graphs"] == 1
