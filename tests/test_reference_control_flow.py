"""Loops, conditionals, assertions and random fills, as NVIDIA's operator pages describe them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference_networks import F32, RANDOM, Net, close, evaluate, single
from trt_dynamo.errors import EngineError
from trt_dynamo.trt import trt


def test_loop_ends_when_its_condition_turns_false() -> None:
    """x doubles while it is below 100, but at most 20 times."""
    x = torch.tensor(3.0)
    net = Net()
    loop = net.raw.add_loop()
    state = loop.add_recurrence(net.input("x", x))
    value = state.get_output(0)
    below = net.raw.add_elementwise(value, net.constant(100.0), trt.ElementWiseOperation.LESS).get_output(0)
    limit = net.constant(torch.tensor(20, dtype=torch.int32))
    loop.add_trip_limit(limit, trt.TripLimit.COUNT)
    loop.add_trip_limit(below, trt.TripLimit.WHILE)
    doubled = net.raw.add_elementwise(value, value, trt.ElementWiseOperation.SUM).get_output(0)
    state.set_input(1, doubled)
    every = loop.add_loop_output(doubled, trt.LoopOutput.CONCATENATE, 0)
    every.set_input(1, limit)
    net.mark(loop.add_loop_output(value, trt.LoopOutput.LAST_VALUE).get_output(0), every.get_output(0))
    found = evaluate(net.raw, {"x": x})
    assert float(found["y"]) == 192
    assert found["y1"][:6].tolist() == [6, 12, 24, 48, 96, 192]
    # not one iteration: the last value is the first
    assert float(evaluate(net.raw, {"x": torch.tensor(500.0)})["y"]) == 500


def test_loop_in_reverse_and_loop_in_a_loop() -> None:
    """The outer loop takes the rows from the last to the first; the inner one sums up each row's products with it."""
    x = torch.randn(3, 4)
    net = Net()
    tensor, rows, columns = net.input("x", x), *(net.constant(torch.tensor(n, dtype=torch.int32)) for n in (3, 4))
    outer = net.raw.add_loop()
    outer.add_trip_limit(rows, trt.TripLimit.COUNT)
    row = outer.add_iterator(tensor, 0, True).get_output(0)
    inner = net.raw.add_loop()
    inner.add_trip_limit(columns, trt.TripLimit.COUNT)
    element = inner.add_iterator(row, 0, False).get_output(0)
    total = inner.add_recurrence(net.constant(0.0))
    square = net.raw.add_elementwise(element, element, trt.ElementWiseOperation.PROD).get_output(0)
    added = net.raw.add_elementwise(total.get_output(0), square, trt.ElementWiseOperation.SUM).get_output(0)
    total.set_input(1, added)
    squares = inner.add_loop_output(total.get_output(0), trt.LoopOutput.LAST_VALUE).get_output(0)
    forward = outer.add_loop_output(squares, trt.LoopOutput.CONCATENATE, 0)
    backward = outer.add_loop_output(squares, trt.LoopOutput.REVERSE, 0)
    for layer in (forward, backward):
        layer.set_input(1, rows)
    net.mark(forward.get_output(0), backward.get_output(0))
    found = evaluate(net.raw, {"x": x})
    close(found["y"], (x * x).sum(1).flip(0))
    close(found["y1"], (x * x).sum(1))


def conditional(net: Net, condition: Any, value: Any, taken: Any, other: Any) -> Any:
    """if condition: taken(value) else: other(value)"""
    layer = net.raw.add_if_conditional()
    layer.set_condition(condition)
    inside = layer.add_input(value).get_output(0)
    return layer.add_output(taken(inside), other(inside)).get_output(0)


def negated(net: Net) -> Any:
    return lambda tensor: net.raw.add_unary(tensor, trt.UnaryOperation.NEG).get_output(0)


def test_conditional_evaluates_only_the_branch_taken() -> None:
    x = torch.tensor([2.0, -3.0])

    def picky(tensor: Any) -> Any:
        """Fails if it runs: an index far outside, which STRICT_BOUNDS refuses."""
        start = net.raw.add_elementwise(number, number, trt.ElementWiseOperation.PROD).get_output(0)
        layer = net.raw.add_slice(tensor, (0,), (2,), (1,))
        layer.set_input(1, start)
        return layer.get_output(0)

    net = Net()
    number = net.input("n", torch.tensor([9]))
    flag = net.input("c", torch.tensor(True))
    net.mark(conditional(net, flag, net.input("x", x), negated(net), picky))
    inputs = {"x": x, "n": torch.tensor([9])}
    close(evaluate(net.raw, {"c": torch.tensor(True), **inputs})["y"], -x)
    with pytest.raises(EngineError, match="outside of the bounds"):
        evaluate(net.raw, {"c": torch.tensor(False), **inputs})


def test_conditional_inside_a_loop() -> None:
    """Each row is negated or kept, as its flag says."""
    x, flags = torch.randn(4, 3), torch.tensor([True, False, False, True])
    net = Net()
    loop = net.raw.add_loop()
    count = net.constant(torch.tensor(4, dtype=torch.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    row = loop.add_iterator(net.input("x", x)).get_output(0)
    flag = loop.add_iterator(net.input("f", flags)).get_output(0)
    keep = lambda tensor: net.raw.add_identity(tensor).get_output(0)  # noqa: E731
    result = conditional(net, flag, row, negated(net), keep)
    output = loop.add_loop_output(result, trt.LoopOutput.CONCATENATE, 0)
    output.set_input(1, count)
    net.mark(output.get_output(0))
    close(net.run(x=x, f=flags), torch.where(flags[:, None], -x, x))


def test_conditional_in_a_loop_whose_branches_do_not_change() -> None:
    """Only the condition differs from iteration to iteration, and it makes the result differ."""
    x, flags = torch.randn(3), torch.tensor([True, False, True])
    net = Net()
    loop = net.raw.add_loop()
    count = net.constant(torch.tensor(3, dtype=torch.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    flag = loop.add_iterator(net.input("f", flags)).get_output(0)
    keep = lambda tensor: net.raw.add_identity(tensor).get_output(0)  # noqa: E731
    result = conditional(net, flag, net.input("x", x), negated(net), keep)
    output = loop.add_loop_output(result, trt.LoopOutput.CONCATENATE, 0)
    output.set_input(1, count)
    net.mark(output.get_output(0))
    close(net.run(x=x, f=flags), torch.stack([-x, x, -x]))


def test_failed_assertion() -> None:
    x = torch.randn(4)
    net = Net()
    tensor = net.input("x", x, (-1,))
    size = net.raw.add_shape(tensor).get_output(0)
    four = net.raw.add_elementwise(size, net.constant([4]), trt.ElementWiseOperation.EQUAL).get_output(0)
    net.raw.add_assertion(four, "four, please")
    net.mark(net.raw.add_identity(tensor).get_output(0))
    close(net.run(x=x), x)
    with pytest.raises(EngineError, match="four, please"):
        net.run(x=torch.randn(5))


def test_random_fill_stays_in_its_range() -> None:
    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_fill((50, 40), trt.FillOperation.RANDOM_UNIFORM, F32)
        layer.alpha, layer.beta = -2.0, 3.0
        net.kept.append(tensor)
        return layer

    net = single(torch.zeros(1), add)
    net.raw.name = RANDOM
    have = net.run(x=torch.zeros(1))
    assert -2 <= float(have.min()) < -1.9
    assert 2.9 < float(have.max()) <= 3
    assert not torch.equal(have, net.run(x=torch.zeros(1)))


def test_normal_fill_has_its_mean_and_deviation() -> None:
    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_fill((100, 100), trt.FillOperation.RANDOM_NORMAL, F32)
        layer.alpha, layer.beta = 5.0, 2.0
        net.kept.append(tensor)
        return layer

    net = single(torch.zeros(1), add)
    net.raw.name = RANDOM
    have = net.run(x=torch.zeros(1))
    assert abs(float(have.mean()) - 5) < 0.2
    assert abs(float(have.std()) - 2) < 0.2
