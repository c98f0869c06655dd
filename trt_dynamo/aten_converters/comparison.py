"""Comparisons, logic and the bits of integers: what of `IElementWiseLayer` gives bools, and bits made of arithmetic."""

from __future__ import annotations

from typing import TypeAlias

import sympy
import torch
from torch._ops import OpOverload

from trt_dynamo.aten_converters.network import CARRIED, Network, Operand, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import is_static, product
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten

Number: TypeAlias = Operand | sympy.Expr


# -- comparisons: TensorRT has three; NaN compares as unequal to everything --------------------------------------------


@converter(aten.eq.Tensor, aten.eq.Scalar)
def eq(net: Network, a: Number, b: Number) -> Tensor:
    return net.elementwise("EQUAL", a, b)


@converter(aten.ne.Tensor, aten.ne.Scalar)
def ne(net: Network, a: Number, b: Number) -> Tensor:
    return net.logical_not(net.elementwise("EQUAL", a, b))


@converter(aten.gt.Tensor, aten.gt.Scalar)
def gt(net: Network, a: Number, b: Number) -> Tensor:
    return net.elementwise("GREATER", a, b)


@converter(aten.lt.Tensor, aten.lt.Scalar)
def lt(net: Network, a: Number, b: Number) -> Tensor:
    return net.elementwise("LESS", a, b)


@converter(aten.ge.Tensor, aten.ge.Scalar)
def ge(net: Network, a: Number, b: Number) -> Tensor:
    return or_equal(net, "GREATER", "LESS", a, b)


@converter(aten.le.Tensor, aten.le.Scalar)
def le(net: Network, a: Number, b: Number) -> Tensor:
    return or_equal(net, "LESS", "GREATER", a, b)


def or_equal(net: Network, op: str, opposite: str, a: Number, b: Number) -> Tensor:
    """Of integers, what the opposite does not hold of; of floats not so, because of NaN."""
    if not net.promoted_dtype(a, b).is_floating_point:
        return net.logical_not(net.elementwise(opposite, a, b))
    return net.elementwise("OR", net.elementwise(op, a, b), net.elementwise("EQUAL", a, b))


# -- logic -------------------------------------------------------------------------------------------------------------


@converter(aten.logical_not.default)
def logical_not(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("EQUAL", x, 0) if x.dtype is not torch.bool else net.logical_not(x)


def truth(net: Network, x: Number) -> Tensor:
    """Whether an element is not zero; NaN is not."""
    if isinstance(x, Tensor) and x.is_float:
        return net.logical_not(net.elementwise("EQUAL", x, 0))
    return net.operand(x, torch.bool)


def register_logic(op: str, target: OpOverload) -> None:
    @converter(target)
    def logic(net: Network, a: Tensor, b: Tensor) -> Tensor:
        return net.elementwise(op, truth(net, a), truth(net, b))


for op, target in (("AND", aten.logical_and), ("OR", aten.logical_or), ("XOR", aten.logical_xor)):
    register_logic(op, target.default)


# -- bits --------------------------------------------------------------------------------------------------------------

WIDTH = {torch.uint8: 8, torch.int8: 8, torch.int32: 32, torch.int64: 64}

# The bits of a tensor of more elements than this would fill the memory; of a constant there are as many as it has runs.
MOST_BITS = 2**22


def both(net: Network, a: Number, b: Number) -> Tensor:
    """`a & b` of integers of one dtype."""
    if isinstance(a, int):
        a, b = b, a
    if isinstance(a, Tensor) and isinstance(b, int):
        return masked(net, a, b)
    left, right = net.promote(a, b)
    shape = net.broadcast(left.shape, right.shape)
    if not is_static(shape) or int(product(shape)) * WIDTH[left.dtype] > MOST_BITS:
        raise Unsupported("bitwise logic of integer tensors of any size: TensorRT has none of integers")
    return of_bits(net, net.elementwise("PROD", bits(net, left), bits(net, right)), left.dtype)


def masked(net: Network, x: Tensor, mask: int) -> Tensor:
    """`x & mask`: for each run of ones in the mask, `x` modulo its upper end less `x` modulo its lower end."""
    width = WIDTH[x.dtype]
    inverted = bool(mask >> (width - 1) & 1)
    ones = (~mask if inverted else mask) & ((1 << width) - 1)
    result: Tensor | None = None
    place = 0
    while ones >> place:
        start = place + trailing(ones >> place, 0)
        place = start + trailing(ones >> start, 1)
        run = modulo(net, x, place)
        run = net.elementwise("SUB", run, modulo(net, x, start)) if start else run
        result = run if result is None else net.elementwise("SUM", result, run)
    if result is None:
        return x if inverted else net.elementwise("PROD", x, 0)
    return net.elementwise("SUB", x, result) if inverted else result


def trailing(number: int, bit: int) -> int:
    """How many of the lowest bits are `bit`; the number is not all of them."""
    count = 0
    while number >> count & 1 == bit:
        count += 1
    return count


def modulo(net: Network, x: Tensor, bits: int) -> Tensor:
    """`x` modulo a power of two, which is what its lowest bits say."""
    if bits == WIDTH[x.dtype] - 1 and CARRIED.get(x.dtype) is None:
        # 2**bits is no number of the type: what is negative has just its highest bit too many.
        lowest = torch.iinfo(x.dtype).min
        return net.where(net.elementwise("LESS", x, 0), net.elementwise("SUB", x, lowest), x)
    wide = net.cast(x, CARRIED.get(x.dtype, x.dtype))
    turns = net.elementwise("PROD", net.elementwise("FLOOR_DIV", wide, 1 << bits), 1 << bits)
    return net.cast(net.elementwise("SUB", wide, turns), x.dtype)


def bits(net: Network, x: Tensor) -> Tensor:
    """The bits of each element along one more dim, the lowest first, as numbers of the carrying type."""
    width, carrier = WIDTH[x.dtype], CARRIED.get(x.dtype, x.dtype)
    wide = net.unsqueeze(net.cast(x, carrier), [x.ndim])
    signed = width > 8
    powers = torch.tensor([1 << i for i in range(width - signed)], dtype=carrier)
    digits = net.elementwise("FLOOR_DIV", wide, net.unsqueeze_to(net.constant(powers), wide.ndim))
    low = net.elementwise("SUB", digits, net.elementwise("PROD", net.elementwise("FLOOR_DIV", digits, 2), 2))
    if not signed:
        return low
    return net.cat([low, net.cast(net.elementwise("LESS", wide, 0), carrier)], x.ndim)


def of_bits(net: Network, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers whose bits lie along the last dim."""
    width = WIDTH[dtype]
    limits = torch.iinfo(x.dtype)
    weights = torch.tensor([1 << i if i < limits.bits - 1 else limits.min for i in range(width)], dtype=x.dtype)
    total = net.reduce("SUM", net.elementwise("PROD", x, net.unsqueeze_to(net.constant(weights), x.ndim)), [-1])
    return net.cast(total, dtype)


def operands(net: Network, a: Number, b: Number) -> tuple[Number, Number, torch.dtype]:
    """Both in the dtype that torch computes them in; a number stays one."""
    dtype = net.promoted_dtype(a, b)
    left, right = (
        net.cast(x, dtype) if isinstance(x, Tensor) else x if isinstance(x, int) else net.operand(x, dtype)
        for x in (a, b)
    )
    return left, right, dtype


@converter(aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.bitwise_and.Scalar_Tensor)
def bitwise_and(net: Network, a: Number, b: Number) -> Tensor:
    left, right, dtype = operands(net, a, b)
    return net.elementwise("AND", left, right) if dtype is torch.bool else both(net, left, right)


@converter(aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.bitwise_or.Scalar_Tensor)
def bitwise_or(net: Network, a: Number, b: Number) -> Tensor:
    """`a + b - (a & b)`."""
    left, right, dtype = operands(net, a, b)
    if dtype is torch.bool:
        return net.elementwise("OR", left, right)
    return net.elementwise("SUB", net.elementwise("SUM", left, right), both(net, left, right))


@converter(aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.bitwise_xor.Scalar_Tensor)
def bitwise_xor(net: Network, a: Number, b: Number) -> Tensor:
    """`a + b - 2 * (a & b)`."""
    left, right, dtype = operands(net, a, b)
    if dtype is torch.bool:
        return net.elementwise("XOR", left, right)
    shared = both(net, left, right)
    return net.elementwise("SUB", net.elementwise("SUM", left, right), net.elementwise("SUM", shared, shared))


@converter(aten.bitwise_not.default)
def bitwise_not(net: Network, x: Tensor) -> Tensor:
    return net.logical_not(x) if x.dtype is torch.bool else net.elementwise("SUB", -1, x)


LEFT = (
    aten.bitwise_left_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_left_shift.Scalar_Tensor,
    aten.__lshift__.Tensor, aten.__lshift__.Scalar,
)  # fmt: skip
RIGHT = (
    aten.bitwise_right_shift.Tensor, aten.bitwise_right_shift.Tensor_Scalar, aten.bitwise_right_shift.Scalar_Tensor,
    aten.__rshift__.Tensor, aten.__rshift__.Scalar,
)  # fmt: skip


@converter(*LEFT)
def left_shift(net: Network, x: Number, places: Number) -> Tensor:
    """All bits are gone at a shift by the width or more, and torch takes a negative one for such."""
    x, places, inside = shifted(net, x, places)
    return net.where(inside, net.cast(net.elementwise("PROD", x, two_to(net, places)), net.result_dtype()), 0)


@converter(*RIGHT)
def right_shift(net: Network, x: Number, places: Number) -> Tensor:
    """The sign is left at a shift by the width or more; a shift by one less leaves it too, and 2**63 is no number."""
    x, places, inside = shifted(net, x, places, signs=int(net.result_dtype() is not torch.uint8))
    quotient = net.elementwise("FLOOR_DIV", x, two_to(net, places))
    sign = net.where(net.elementwise("LESS", x, 0), -1, net.elementwise("PROD", x, 0))
    return net.cast(net.where(inside, quotient, sign), net.result_dtype())


def shifted(net: Network, x: Number, places: Number, *, signs: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Both as int64, and where the shift is one by fewer bits than the type has besides its sign."""
    dtype = net.result_dtype()
    if dtype not in WIDTH:
        raise Unsupported(f"a shift of {str(dtype).removeprefix('torch.')}")
    value, count = net.align(net.operand(x, torch.int64), net.operand(places, torch.int64))
    inside = net.elementwise(
        "AND", net.elementwise("GREATER", count, -1), net.elementwise("LESS", count, WIDTH[dtype] - signs)
    )
    return value, net.where(inside, count, 0), inside


def two_to(net: Network, places: Tensor) -> Tensor:
    """2 to powers from 0 to 63 (which wraps to the lowest number), looked up."""
    table = [1 << i for i in range(63)] + [-(1 << 63)]
    return net.gather(net.constant(torch.tensor(table)), places, 0)
