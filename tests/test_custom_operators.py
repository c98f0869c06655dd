"""Operators and converters of the user's own: registered, overridden, partly refused, missing, or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import ConversionError, Network, Tensor, Unsupported, converter, explain
from trt_dynamo.aten_converters import CONVERTERS
from trt_dynamo.reports import report
from trt_dynamo.testing import check, refused

aten = torch.ops.aten


@torch.library.custom_op("trt_dynamo_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float, offset: float = 0.0, *, negate: bool = False) -> torch.Tensor:
    return (x * factor + offset) * (-1 if negate else 1)


@scaled.register_fake
def scaled_fake(x: torch.Tensor, factor: float, offset: float = 0.0, *, negate: bool = False) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("trt_dynamo_tests::halves", mutates_args=())
def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[: x.shape[0] // 2].clone(), x[x.shape[0] // 2 :].clone()


@halves.register_fake
def halves_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = x.shape[0] // 2
    return x.new_empty(half, *x.shape[1:]), x.new_empty(x.shape[0] - half, *x.shape[1:])


@torch.library.custom_op("trt_dynamo_tests::count_into", mutates_args=("counter",))
def count_into(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    counter.add_(1)
    return x * 2


@count_into.register_fake
def count_into_fake(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def scaled_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return grad * 3.0, None, None


scaled.register_autograd(scaled_backward)
ops = torch.ops.trt_dynamo_tests


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The converters as they were; they belong to the process."""
    before = dict(CONVERTERS)
    yield
    CONVERTERS.clear()
    CONVERTERS.update(before)


def reasons(function: Callable[..., object], x: torch.Tensor) -> dict[str, str]:
    """What `explain` says of the nodes in eager."""
    return {v.target: v.reason for v in explain(function, x).eager if "min_segment_nodes" not in v.reason}


def convert_scaled(net: Network, x: Tensor, factor: float, *, negate: bool = False) -> Tensor:
    if factor > 100:
        raise Unsupported(f"a factor of {factor}")
    return net.elementwise("PROD", x, -factor if negate else factor)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_converter_for_an_operator_of_the_users(dynamic: bool) -> None:
    with refused("no converter"):
        check(lambda x: scaled(x, 2.0), torch.randn(3, 4), dynamic=dynamic)
    converter(ops.scaled.default)(convert_scaled)
    for shape in ((3, 4), (), (0, 2), (1, 2, 3)):
        check(lambda x: scaled(x, 2.0), torch.randn(shape), dynamic=dynamic)
        check(lambda x: scaled(x, 2.0, negate=True), torch.randn(shape), dynamic=dynamic)


def test_several_results() -> None:
    @converter(ops.halves.default)
    def convert_halves(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        upper, lower = net.result_shape(0), net.result_shape(1)
        zero, one = [0] * x.ndim, [1] * x.ndim
        return net.slice(x, zero, upper, one), net.slice(x, [upper[0], *zero[1:]], lower, one)

    for dynamic in (False, True):
        check(halves, torch.randn(5, 3), dynamic=dynamic)
        check(lambda x: halves(x)[1], torch.randn(5, 3), dynamic=dynamic)


def test_an_argument_that_the_converter_does_not_name_must_hold_its_default() -> None:
    converter(ops.scaled.default)(convert_scaled)
    check(lambda x: scaled(x, 2.0, 0.0), torch.randn(3))
    with refused("argument offset=1.0"):
        check(lambda x: scaled(x, 2.0, 1.0), torch.randn(3))


def test_a_converter_that_refuses_some_calls() -> None:
    converter(ops.scaled.default)(convert_scaled)

    def f(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = scaled(scaled(x.exp(), 2.0) + 1, 1000.0)
        z: torch.Tensor = y.sin() + scaled(x, 3.0)
        return z

    x = torch.randn(4, 5)
    assert_same(compiled(f)(x), f(x))
    assert engine_calls() == 2
    assert reasons(f, x) == {"trt_dynamo_tests.scaled.default": "a factor of 1000.0"}


def test_an_operator_without_a_converter_runs_between_engines() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = scaled(x.exp() * 2, 3.0, 1.0)
        return y.tanh() - 1

    x = torch.randn(4, 5)
    assert_same(compiled(f)(x), f(x))
    assert engine_calls() == 2
    assert reasons(f, x) == {"trt_dynamo_tests.scaled.default": "no converter"}


@pytest.mark.parametrize("registered", [False, True])
def test_its_gradients_are_torchs(registered: bool) -> None:
    """Its formula says 3 whatever the factor is: nobody else's gradient would."""
    if registered:
        converter(ops.scaled.default)(convert_scaled)
    layer = nn.Linear(4, 4)
    fast = compiled(lambda x: scaled(layer(x), 2.0).sum())
    fast(torch.ones(2, 4)).backward()
    assert layer.bias.grad is not None
    assert_same(layer.bias.grad, torch.full((4,), 6.0))
    with torch.no_grad():
        assert_same(fast(torch.ones(2, 4)), 2 * layer(torch.ones(2, 4)).sum())


def test_its_mutations_are_kept() -> None:
    def f(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = count_into(x.exp() + 1, counter)
        return y.sin() + counter

    fast, counter = compiled(f), torch.zeros(5)
    for calls in (1, 2):
        x = torch.randn(4, 5)
        assert_same(fast(x, counter), f(x, torch.full((5,), calls - 1.0)))
        assert_same(counter, torch.full((5,), float(calls)))


def test_an_override_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match=r"aten\.relu\.default has a converter already: pass override=True"):
        converter(aten.relu.default)(lambda net, x: x)


def test_an_override_takes_effect_and_shares_no_engine_with_ours() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.relu() + 1

    x = torch.randn(64)
    assert_same(compiled(f)(x), f(x))

    @converter(aten.relu.default, override=True)
    def shifted(net: Network, x: Tensor) -> Tensor:
        return net.elementwise("SUM", net.activation("RELU", x), 10.0)

    built = report()["engines_built"]
    torch._dynamo.reset()
    assert_same(compiled(f)(x), f(x) + 10)
    assert report()["engines_built"] == built + 1


def test_an_operator_that_torch_takes_apart_is_kept_whole_for_its_converter() -> None:
    seen = []

    @converter(aten.hardswish.default, override=aten.hardswish.default in CONVERTERS)
    def hardswish(net: Network, x: Tensor) -> Tensor:
        seen.append(x.shape)
        gate = net.activation("HARD_SIGMOID", x, alpha=1 / 6, beta=0.5)
        return net.elementwise("PROD", x, gate)

    check(lambda x: nn.functional.hardswish(x), 4 * torch.randn(3, 4))
    assert seen


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x, factor: net.cast(x, torch.int32), "its converter made"),
        (lambda net, x, factor: net.reshape(x, (20,)), "its converter made"),
        (lambda net, x, factor: (x, x), "2"),
        (lambda net, x, factor: x.no_such_attribute, "no_such_attribute"),
        (lambda net, x, factor: None, "no tensor but None"),
        (lambda net, x, factor: x.raw, "no tensor but"),
    ],
    ids=["dtype", "shape", "count", "raises", "nothing", "another_tensor"],
)
def test_a_wrong_converter(function: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    converter(ops.scaled.default)(function)  # type: ignore[type-var]
    with pytest.raises(ConversionError, match=message):
        check(lambda x: scaled(x, 2.0), torch.randn(4, 5))
    monkeypatch.delenv("TRT_DYNAMO_STRICT")
    x = torch.randn(4, 5)
    assert_same(compiled(lambda x: scaled(x.exp(), 2.0).sin(), strict=False)(x), scaled(x.exp(), 2.0).sin())


def test_parameters_that_do_not_fit_the_schema() -> None:
    with pytest.raises(ValueError, match="its converter wants 4"):
        converter(ops.scaled.default)(lambda net, a, b, c, d: a)
    with pytest.raises(ValueError, match="has no argument 'other'"):

        @converter(ops.scaled.default)
        def convert(net: Network, x: Tensor, factor: float, *, other: int) -> Tensor:
            return x

    with pytest.raises(ValueError, match="is not an overload"):
        converter(ops.scaled)(convert_scaled)  # type: ignore[arg-type]
