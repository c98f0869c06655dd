"""The evaluator as a whole: which layers it takes, what it reads of weights, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference_networks import F32, Net, close, evaluate, single
from trt_dynamo.errors import ConversionError, EngineError, Unsupported
from trt_dynamo.reference import Evaluator
from trt_dynamo.trt import trt


def test_every_layer_type_is_evaluated_or_refused_with_a_reason() -> None:
    from trt_dynamo.reference.layer import CLASSES, RULES

    structural = {"CONSTANT", "TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT", "CONDITION", "CONDITIONAL_OUTPUT"}
    refused = {"PLUGIN", "PLUGIN_V2", "PLUGIN_V3", "DIST_COLLECTIVE"}
    assert RULES.keys() | structural | refused == set(trt.LayerType.__members__)
    assert CLASSES.keys() >= RULES.keys() | structural
    assert all(hasattr(trt, name) for name in CLASSES.values())


def test_a_layer_without_a_meaning_here_is_refused_by_name() -> None:
    x = torch.randn(4)
    net = Net()
    layer = net.raw.add_dist_collective(
        net.input("x", x), trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM, -1, None
    )
    layer.name = "everyone"
    net.mark(layer.get_output(0))
    with pytest.raises(Unsupported, match=r"'everyone'.*DIST_COLLECTIVE"):
        net.run(x=x)


def test_constants_that_cannot_be_read_back() -> None:
    weights = torch.randn(3).bfloat16()
    net = Net()
    layer = net.raw.add_constant((3,), net.weights(weights))
    layer.name = "weights"
    net.mark(layer.get_output(0))
    with pytest.raises(Unsupported, match=r"'weights' \(CONSTANT\).*BF16 cannot be read back"):
        net.run()
    assert torch.equal(net.run({"weights": weights}), weights)
    assert torch.equal(net.run({"y": weights}), weights)
    with pytest.raises(ConversionError, match="the network has BF16, 3"):
        net.run({"weights": weights.half()})
    with pytest.raises(ConversionError, match="4 elements"):
        net.run({"weights": torch.zeros(4).bfloat16()})


def test_the_network_is_judged_by_its_own_weights_where_they_can_be_read() -> None:
    net = Net()
    layer = net.raw.add_constant((2,), net.weights(torch.tensor([1.0, 2.0])))
    net.mark(layer.get_output(0))
    close(net.run({"y": torch.tensor([8.0, 9.0]), layer.name: torch.tensor([8.0, 9.0])}), [1.0, 2.0])


def test_the_evaluator_bakes_the_weights() -> None:
    weights, low = torch.ones(2), torch.ones(2).bfloat16()
    net = Net()
    array = net.weights(weights)
    first = net.raw.add_constant((2,), array).get_output(0)
    second = net.raw.add_constant((2,), net.weights(low)).get_output(0)
    second.name = "low"
    net.mark(first, net.raw.add_cast(second, F32).get_output(0))
    evaluator = Evaluator(net.raw, {"low": low})
    array[:] = 5
    low.fill_(5)
    for _ in range(2):
        found = evaluator({})
        close(found["y"], [1.0, 1.0])
        close(found["y1"], [1.0, 1.0])
        found["y"].fill_(7)  # a caller's change of a result does not reach the weights


def test_inputs_are_compared_with_the_network() -> None:
    net = Net()
    a, b = net.input("a", torch.zeros(2), (-1,)), net.input("b", torch.zeros(2), (-1,))
    a.set_dimension_name(0, "n")
    b.set_dimension_name(0, "n")
    net.mark(net.raw.add_elementwise(a, b, trt.ElementWiseOperation.SUM).get_output(0))
    two = torch.zeros(2)
    with pytest.raises(EngineError, match="the network's inputs are"):
        net.run(a=two)
    with pytest.raises(EngineError, match="the network's inputs are"):
        net.run(a=two, b=two, c=two)
    with pytest.raises(EngineError, match=r"'a' is torch.float64"):
        net.run(a=two.double(), b=two)
    with pytest.raises(EngineError, match=r"has the shape \(2, 1\)"):
        net.run(a=two[:, None], b=two)
    with pytest.raises(EngineError, match="the dim 'n' is 1, and 2 elsewhere"):
        net.run(a=two, b=two[:1])


def test_intermediates() -> None:
    x = torch.randn(3)
    net = Net()
    hidden = net.raw.add_unary(net.input("x", x), trt.UnaryOperation.EXP).get_output(0)
    hidden.name = "hidden"
    net.mark(net.raw.add_unary(hidden, trt.UnaryOperation.NEG).get_output(0))
    found = evaluate(net.raw, {"x": x}, intermediates=True)
    assert found.keys() == {"x", "hidden", "y"}
    close(found["hidden"], torch.exp(x))
    assert evaluate(net.raw, {"x": x}).keys() == {"y"}


def test_what_is_no_longer_needed_is_let_go() -> None:
    x = torch.randn(3)
    net = Net()
    tensor = net.input("x", x)
    for name in ("a", "b", "c"):
        tensor = net.raw.add_unary(tensor, trt.UnaryOperation.NEG).get_output(0)
        tensor.name = name
    net.mark(net.raw.add_elementwise(tensor, net.raw.get_input(0), trt.ElementWiseOperation.SUM).get_output(0))
    evaluator = Evaluator(net.raw)
    alive: list[set[str]] = []
    evaluator.plan[-1] = Watched(evaluator.plan[-1], alive)
    close(evaluator({"x": x})["y"], torch.zeros(3))
    assert alive == [{"x", "c"}]


class Watched:
    """A step that notes which tensors there are when it runs."""

    def __init__(self, step: Any, alive: list[set[str]]) -> None:
        self.step, self.alive = step, alive

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def execute(self, frame: Any) -> None:
        self.alive.append(set(frame))
        self.step.execute(frame)


def test_a_wrong_meaning_of_a_layer_shows_as_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's own shape inference checks the evaluator, as the evaluator checks values."""
    from trt_dynamo.reference import reduction

    monkeypatch.setitem(reduction.REDUCTIONS, "SUM", lambda x, axes, keep: x)
    x = torch.randn(3, 4)
    net = single(x, lambda net, tensor: net.raw.add_reduce(tensor, trt.ReduceOperation.SUM, 0b10, False))
    with pytest.raises(ConversionError, match=r"gives the shape \(3, 4\); TensorRT infers \(3,\)"):
        net.run(x=x)


def test_a_network_is_left_as_it_was() -> None:
    """The evaluator gives layers the classes of their types for as long as it reads them: `type` means what it did."""
    x = torch.randn(2, 3)
    net = single(x, lambda net, tensor: net.raw.add_activation(tensor, trt.ActivationType.RELU))
    held = net.raw.get_layer(0)
    evaluator = Evaluator(net.raw)
    assert held.type == net.raw.get_layer(0).type == trt.LayerType.ACTIVATION
    close(evaluator({"x": x})["y"], torch.relu(x))
    assert net.raw.get_layer(0).type == trt.LayerType.ACTIVATION
