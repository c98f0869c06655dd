"""The reference evaluator against NVIDIA's own arithmetic, element by element and without a GPU.

TensorRT folds constants of up to 64 elements on the CPU when it is asked for a shape. So each expression here becomes
the dims of Fill layers, and reading those dims gives TensorRT's answer; the evaluator runs the same network.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trt_dynamo.log import collected, logger
from trt_dynamo.reference import evaluate
from trt_dynamo.trt import to_trt, trt

NAN, INF = math.nan, math.inf
TINY = 1.2e-38  # TensorRT flushes what is smaller to zero
HIGH = 2**31  # dims are read in two halves, so that all of int64 can be


class Expressions:
    """A network of constants, and TensorRT's values of what is computed from them."""

    def __init__(self) -> None:
        self.builder = trt.Builder(logger())
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.kept: list[Any] = []

    def constant(self, value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        weights: Any = numpy.array(tensor.numpy()) if tensor.numel() else trt.Weights(to_trt(tensor.dtype))
        self.kept.append(weights)
        return self.network.add_constant(tuple(tensor.shape), weights).get_output(0)

    def elementwise(self, a: Any, b: Any, kind: str) -> Any:
        return self.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, kind)).get_output(0)

    def unary(self, a: Any, kind: str) -> Any:
        return self.network.add_unary(a, getattr(trt.UnaryOperation, kind)).get_output(0)

    def cast(self, a: Any, dtype: str) -> Any:
        return self.network.add_cast(a, getattr(trt.DataType, dtype)).get_output(0)

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        return self.network.add_select(condition, a, b).get_output(0)

    def dims(self, values: Any, count: int) -> list[int]:
        """The elements of an INT64 vector, none negative, as dims of tensors."""
        found = []
        for index in range(count):
            size = self.network.add_slice(values, (index,), (1,), (1,)).get_output(0)
            layer = self.network.add_fill((1,), trt.FillOperation.LINSPACE, trt.DataType.FLOAT)
            for position, tensor in enumerate((size, self.constant(0.0), self.constant([1.0]))):
                layer.set_input(position, tensor)
            with collected() as errors:
                try:
                    found.append(int(layer.get_output(0).shape[0]))
                except (RuntimeError, ValueError):
                    raise AssertionError(f"TensorRT does not fold this: {errors}") from None
        return found

    def integers(self, values: Any, count: int) -> list[int]:
        high = self.elementwise(values, self.constant([HIGH]), "FLOOR_DIV")
        low = self.elementwise(values, self.elementwise(high, self.constant([HIGH]), "PROD"), "SUB")
        positive = self.elementwise(high, self.constant([4 * HIGH]), "SUM")
        pairs = zip(self.dims(positive, count), self.dims(low, count), strict=True)
        return [(big - 4 * HIGH) * HIGH + small for big, small in pairs]

    def floats(self, values: Any, like: Sequence[float]) -> list[float]:
        """The elements of a FLOAT vector, exactly: scaled by powers of two (chosen by what is expected) to integers."""
        count = len(like)
        nan, infinite = self.unary(values, "ISNAN"), self.unary(values, "ISINF")
        zeros = self.constant(torch.zeros(count))
        finite = self.select(self.elementwise(nan, infinite, "OR"), zeros, values)
        powers = [40 - math.frexp(x)[1] if x and math.isfinite(x) else 20 for x in like]
        powers = [min(power, 140) for power in powers]
        for part in ([2.0 ** (p // 2) for p in powers], [2.0 ** (p - p // 2) for p in powers]):
            finite = self.elementwise(finite, self.constant(part), "PROD")
        whole = self.integers(self.cast(finite, "INT64"), count)
        sign = self.integers(self.cast(self.unary(self.select(nan, zeros, values), "SIGN"), "INT64"), count)
        is_nan, is_infinite = (self.integers(self.cast(flag, "INT64"), count) for flag in (nan, infinite))
        exact = [math.ldexp(x, -p) for x, p in zip(whole, powers, strict=True)]
        odd = [NAN if n else math.copysign(INF, s) for n, s in zip(is_nan, sign, strict=True)]
        return [o if n or i else x for n, i, o, x in zip(is_nan, is_infinite, odd, exact, strict=True)]


def check(build: Callable[..., Any], *arguments: Any, tolerance: float = 2e-6) -> Sequence[float]:
    """Builds `build(net, *arguments)` and compares TensorRT's values with the evaluator's; returns them."""
    net = Expressions()
    layer = net.network.add_shuffle(build(net, *arguments))
    layer.reshape_dims = (-1,)
    flat = layer.get_output(0)
    if flat.dtype.name not in ("FLOAT", "INT64"):
        flat = net.cast(flat, "INT64")
    flat.name = "result"
    net.network.mark_output(flat)
    want = evaluate(net.network, {})["result"].tolist()
    is_float = flat.dtype.name == "FLOAT"
    have: Sequence[float] = net.floats(flat, want) if is_float else net.integers(flat, len(want))
    wrong = [
        (theirs, ours)
        for theirs, ours in zip(have, want, strict=True)
        if not (
            theirs == ours
            or (theirs != theirs and ours != ours)
            or abs(theirs - ours) <= tolerance * abs(theirs) + TINY
        )
    ]
    assert not wrong, f"(TensorRT, evaluator): {wrong}"
    return have


FLOATS = [NAN, INF, -INF, -50.0, -3.0, -2.5, -1.5, -1.0, -0.99, -0.5, -0.25, 0.0]
FLOATS += [0.25, 0.5, 0.99, 1.0, 1.5, 2.5, 3.0, 3.7, 7.5, 50.0]
INTEGERS = [-(2**40), -7, -5, -3, -2, -1, 0, 1, 2, 3, 5, 7, 2**31, 2**40]
SMALL = [value for value in INTEGERS if abs(value) < 2**31]
PAIRS = [
    (-7, 2),
    (-7, -2),
    (7, 2),
    (7, -2),
    (0, 3),
    (5, 5),
    (-5, 5),
    (2, -1),
    (3, 4),
    (-2, 3),
    (-1, -3),
    (-1, -2),
    (1, -9),
]
COMPARISONS = ["EQUAL", "GREATER", "LESS"]
ARITHMETIC = ["SUM", "PROD", "MAX", "MIN", "SUB", "DIV", "POW", "FLOOR_DIV"]


@pytest.mark.parametrize("kind", [kind for kind in trt.UnaryOperation.__members__ if kind != "NOT"])
def test_unary(kind: str) -> None:
    # tan near its poles multiplies what float32 rounds off
    check(lambda net: net.unary(net.constant(FLOATS), kind), tolerance=1e-5 if kind == "TAN" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["ABS", "NEG", "SIGN"])
def test_unary_of_integers(kind: str, dtype: torch.dtype) -> None:
    values = torch.tensor(INTEGERS if dtype == torch.int64 else SMALL, dtype=dtype)
    check(lambda net: net.unary(net.constant(values), kind))


def test_not() -> None:
    assert check(lambda net: net.unary(net.constant([True, False]), "NOT")) == [0, 1]


def elementwise(net: Expressions, a: Any, b: Any, kind: str) -> Any:
    return net.elementwise(net.constant(a), net.constant(b), kind)


@pytest.mark.parametrize("kind", ARITHMETIC + COMPARISONS)
def test_elementwise_of_floats(kind: str) -> None:
    pairs = [(a, b) for a in FLOATS for b in FLOATS]
    random.Random(kind).shuffle(pairs)
    for start in range(0, 192, 64):
        a, b = zip(*pairs[start : start + 64], strict=True)
        check(elementwise, list(a), list(b), kind)


@pytest.mark.parametrize("kind", ["MAX", "MIN"])
def test_max_and_min_drop_a_nan_that_comes_second(kind: str) -> None:
    first, second = check(elementwise, [NAN, 1.0], [1.0, NAN], kind)
    assert math.isnan(first)
    assert second == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ARITHMETIC + COMPARISONS)
def test_elementwise_of_integers(kind: str, dtype: torch.dtype) -> None:
    pairs = PAIRS + ([(2**40, 3), (-(2**62), 2)] if dtype == torch.int64 and kind != "POW" else [])
    a, b = (torch.tensor(side, dtype=dtype) for side in zip(*pairs, strict=True))
    check(elementwise, a, b, kind)


@pytest.mark.parametrize("kind", ["AND", "OR", "XOR", "EQUAL"])
def test_elementwise_of_booleans(kind: str) -> None:
    check(elementwise, [False, False, True, True], [False, True, False, True], kind)


def test_elementwise_broadcasts() -> None:
    check(elementwise, [[1], [2], [3]], [[10, 20]], "SUB")


@pytest.mark.parametrize("parameters", [None, (0.3, 0.7), (1.5, 0.5), (-1.0, 2.0), (2.0, 1.0)])
@pytest.mark.parametrize("kind", list(trt.ActivationType.__members__))
def test_activation(kind: str, parameters: tuple[float, float] | None) -> None:
    def build(net: Expressions) -> Any:
        layer = net.network.add_activation(net.constant(FLOATS), getattr(trt.ActivationType, kind))
        if parameters is not None:
            layer.alpha, layer.beta = parameters
        return layer.get_output(0)

    check(build, tolerance=1e-5 if kind == "SOFTPLUS" else 2e-6)


def reduce(net: Expressions, rows: Any, kind: str, axes: int, keep: bool) -> Any:
    return net.network.add_reduce(net.constant(rows), getattr(trt.ReduceOperation, kind), axes, keep).get_output(0)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["SUM", "PROD", "MAX", "MIN", "AVG"])
def test_reduce(kind: str, dtype: torch.dtype, axes: int) -> None:
    rows = torch.tensor([[1, -8, 3], [-2, 5, 7], [4, -7, 2]], dtype=dtype)
    check(reduce, rows, kind, axes, True)
    check(reduce, rows, kind, axes, False)


@pytest.mark.parametrize("kind", ["SUM", "PROD", "MAX", "MIN", "AVG"])
def test_reduce_of_a_nan(kind: str) -> None:
    for axes in (1, 2, 3):
        check(reduce, [[1.0, NAN, 3.0], [-2.0, 5.0, NAN], [NAN, -7.0, 2.5]], kind, axes, True)


@pytest.mark.parametrize("dtype", ["INT32", "INT64", "BOOL", "HALF", "BF16", "FLOAT"])
def test_cast_of_floats(dtype: str) -> None:
    values = [1e10, -1e10, 3e38, -3e38, 2.7, -2.7, 0.5, -0.5, INF, -INF, 2147483520.0, 2147483648.0, -2147483648.0]
    values += [9.3e18, -9.3e18, 9.2e18, 0.0, 1.0004, 2049.0, 65519.0, 65520.0, 1e-8, -1e-7, 0.1, 3.14159]
    check(lambda net: net.cast(net.cast(net.constant(values), dtype), "INT64" if dtype == "BOOL" else dtype))
    if dtype in ("HALF", "BF16"):
        check(lambda net: net.cast(net.cast(net.constant(values), dtype), "FLOAT"))


@pytest.mark.parametrize("dtype", ["INT32", "INT64", "BOOL", "FLOAT", "HALF"])
def test_cast_of_integers(dtype: str) -> None:
    values = [*INTEGERS, -(2**31) - 1, 2**40 + 3, 300, -129, 2**24 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]
    check(lambda net: net.cast(net.constant(values), dtype))


@pytest.mark.parametrize("dtype", ["INT32", "INT64", "FLOAT"])
def test_cast_of_booleans(dtype: str) -> None:
    check(lambda net: net.cast(net.constant([True, False]), dtype))


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [1.5, NAN, 3.0, -INF], [True, False, True, True]])
def test_select(values: list[Any]) -> None:
    condition = [True, False, False, True]
    check(lambda net: net.select(net.constant(condition), net.constant(values), net.constant(values[::-1])))
    check(lambda net: net.select(net.constant(condition), net.constant(values), net.constant(values[1:2])))


SLICES = [
    ((0, 0), (3, 4), (1, 1)),
    ((1, 1), (2, 2), (1, 2)),
    ((2, 3), (3, 4), (-1, -1)),
    ((1, 2), (4, 3), (0, 0)),
    ((0, 0), (0, 4), (1, 1)),
    ((-5, -3), (8, 8), (1, 1)),
    ((-4, 6), (8, 8), (2, -3)),
    ((7, 9), (3, 2), (1, 1)),
    ((0, 0), (2, 4), (-1, 5)),
]
GRID = torch.arange(12).reshape(3, 4) * 7 - 20


def windowed(net: Expressions, values: Any, window: Any, mode: str) -> Any:
    layer = net.network.add_slice(net.constant(values), *window)
    layer.mode = getattr(trt.SampleMode, mode)
    return layer.get_output(0)


@pytest.mark.parametrize("mode", ["STRICT_BOUNDS", "WRAP", "CLAMP", "FILL", "REFLECT"])
def test_slice(mode: str) -> None:
    for start, size, stride in SLICES[: 5 if mode == "STRICT_BOUNDS" else None]:
        for values in (GRID, GRID.int(), GRID > 0):
            check(windowed, values, (start, size, stride), mode)


@pytest.mark.parametrize("mode", ["WRAP", "CLAMP", "REFLECT"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_slice_far_outside(mode: str, length: int) -> None:
    check(windowed, list(range(length)), ((-13,), (40,), (1,)), mode)


def test_slice_by_tensors() -> None:
    def build(net: Expressions) -> Any:
        layer = net.network.add_slice(net.constant(GRID), (0, 0), (0, 0), (1, 1))
        for index, value in ((1, [2, 0]), (2, [2, 2]), (3, [-1, 3])):
            layer.set_input(index, net.constant(value))
        return layer.get_output(0)

    check(build)


def gather(net: Expressions, values: Any, index: Any, mode: str, axis: int = 0, batch: int = 0) -> Any:
    layer = net.network.add_gather_v2(net.constant(values), net.constant(index), getattr(trt.GatherMode, mode))
    if mode != "ND":
        layer.axis = axis
    layer.num_elementwise_dims = batch
    return layer.get_output(0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gather(dtype: torch.dtype) -> None:
    for index in ([2, 0, -1, 2], 1, -3, [[0, -2], [1, 1]], []):
        wanted = torch.tensor(index, dtype=dtype)
        for axis in (0, 1):
            check(gather, GRID, wanted, "DEFAULT", axis)
    check(gather, GRID.float(), torch.tensor([0, 2], dtype=dtype), "DEFAULT")


def test_gather_elements() -> None:
    check(gather, GRID, [[0, -1, 2, 1], [2, 2, 0, 0]], "ELEMENT")
    check(gather, GRID, [[3, -4], [0, 1], [2, -1]], "ELEMENT", 1)


def test_gather_nd() -> None:
    check(gather, GRID, [[0, 1], [2, -1], [-3, 0]], "ND")
    check(gather, GRID, [[1], [0]], "ND")
    check(gather, GRID, [[1], [0], [-1]], "ND", 0, 1)


@pytest.mark.parametrize("dtype", ["INT64", "INT32", "FLOAT"])
def test_fill(dtype: str) -> None:
    def by_attributes(net: Expressions) -> Any:
        layer = net.network.add_fill((7,), trt.FillOperation.LINSPACE, getattr(trt.DataType, dtype))
        layer.alpha, layer.beta = (-5, 3) if dtype == "INT64" else (-5.0, 3.0)
        return layer.get_output(0)

    def by_tensors(net: Expressions) -> Any:
        layer = net.network.add_fill((0, 0, 0), trt.FillOperation.LINSPACE, getattr(trt.DataType, dtype))
        kind = {"INT64": torch.int64, "INT32": torch.int32, "FLOAT": torch.float32}[dtype]
        parameters = (torch.tensor([2, 3, 4]), torch.tensor(-9, dtype=kind), torch.tensor([100, -7, 3], dtype=kind))
        for index, value in enumerate(parameters):
            layer.set_input(index, net.constant(value))
        return layer.get_output(0)

    check(by_attributes)
    check(by_tensors)


def test_shuffle() -> None:
    def build(net: Expressions, first: Any, dims: Any, second: Any, by_tensor: bool) -> Any:
        layer = net.network.add_shuffle(net.constant(torch.arange(24).reshape(2, 3, 4)))
        layer.first_transpose = first
        if by_tensor:
            layer.set_input(1, net.constant(list(dims)))
        else:
            layer.reshape_dims = dims
        layer.second_transpose = second
        return layer.get_output(0)

    for first, dims, second in (
        ((0, 1, 2), (4, 6), (1, 0)),
        ((2, 0, 1), (0, -1), (0, 1)),
        ((1, 2, 0), (2, 0, 3), (2, 1, 0)),
        ((0, 2, 1), (-1,), (0,)),
    ):
        for by_tensor in (False, True):
            check(build, first, dims, second, by_tensor)


def test_concatenation() -> None:
    def build(net: Expressions, axis: int, parts: list[Tensor]) -> Any:
        layer = net.network.add_concatenation([net.constant(part) for part in parts])
        layer.axis = axis
        return layer.get_output(0)

    check(build, 0, [GRID, GRID[:1], GRID[:0]])
    check(build, 1, [GRID, GRID[:, :2].clone()])
    check(build, 0, [torch.tensor([True]), torch.tensor([False, True])])


def test_squeeze_and_unsqueeze() -> None:
    column = GRID.reshape(3, 1, 4, 1)
    check(lambda net: net.network.add_squeeze(net.constant(column), net.constant([-1, 1])).get_output(0))
    check(lambda net: net.network.add_unsqueeze(net.constant(GRID), net.constant([-1, 0])).get_output(0))
    if hasattr(trt, "EngineStat"):
        check(lambda net: net.network.add_squeeze(net.constant(column)).get_output(0))


def test_shape() -> None:
    assert check(lambda net: net.network.add_shape(net.constant(torch.zeros(2, 0, 5))).get_output(0)) == [2, 0, 5]


@pytest.mark.parametrize(
    "operations", [("NONE", "NONE"), ("TRANSPOSE", "NONE"), ("NONE", "TRANSPOSE"), ("NONE", "VECTOR")]
)
def test_matrix_multiply(operations: tuple[str, str]) -> None:
    def build(net: Expressions) -> Any:
        a, b = torch.arange(9.0).reshape(3, 3) - 4, torch.arange(9.0).reshape(3, 3) * 0.5
        b = b[0] if operations[1] == "VECTOR" else b
        first, second = (getattr(trt.MatrixOperation, name) for name in operations)
        return net.network.add_matrix_multiply(net.constant(a), first, net.constant(b), second).get_output(0)

    check(build)


@pytest.mark.parametrize("mode", ["UNIFORM", "CHANNEL", "ELEMENTWISE"])
def test_scale(mode: str) -> None:
    def build(net: Expressions) -> Any:
        values = torch.arange(12.0).reshape(1, 3, 2, 2) + 1
        count = {"UNIFORM": 1, "CHANNEL": 3, "ELEMENTWISE": 12}[mode]
        weights = [numpy.linspace(low, low + 1, count, dtype=numpy.float32) for low in (0.5, 1.0, 2.0)]
        net.kept += weights
        shift, scale, power = weights
        kind = getattr(trt.ScaleMode, mode)
        return net.network.add_scale_nd(net.constant(values), kind, shift, scale, power, 1).get_output(0)

    check(build)


def test_one_hot() -> None:
    def build(net: Expressions, axis: int) -> Any:
        index, values = net.constant([[0, 2, -1], [1, -3, 2]]), net.constant([-5, 9])
        depth = net.constant(torch.tensor(3, dtype=torch.int32))
        return net.network.add_one_hot(net.cast(index, "INT32"), values, depth, axis).get_output(0)

    for axis in (0, 1, -1):
        check(build, axis)


@pytest.mark.parametrize("taken", [True, False])
def test_conditional(taken: bool) -> None:
    def build(net: Expressions) -> Any:
        conditional = net.network.add_if_conditional()
        conditional.set_condition(net.constant(taken))
        value = conditional.add_input(net.constant([3, -4, 5])).get_output(0)
        doubled, negated = net.elementwise(value, value, "SUM"), net.unary(value, "NEG")
        return conditional.add_output(doubled, negated).get_output(0)

    assert check(build) == ([6, -8, 10] if taken else [-3, 4, -5])


def test_random_integer_expressions() -> None:
    """Chains of ten operations on small integers, where no step can overflow or divide by zero."""
    for seed in range(30):

        def build(net: Expressions, chance: random.Random) -> Any:
            value = net.constant([chance.randint(-50, 50) for _ in range(12)])
            for _ in range(10):
                other = net.constant([chance.choice([-7, -3, -2, -1, 1, 2, 3, 5]) for _ in range(12)])
                value = net.elementwise(value, other, chance.choice(["SUM", "SUB", "DIV", "FLOOR_DIV", "MAX", "MIN"]))
                if chance.random() < 0.3:
                    value = net.elementwise(value, net.constant([chance.randint(-9, 9)]), "PROD")
            return value

        check(build, random.Random(seed))
