"""Ops that make tensors from numbers and sizes: fills, ranges, tables of cosines and sines. `zeros`, `ones` and their
kin come in as `full`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import is_static
from trt_dynamo.errors import Unsupported
from trt_dynamo.operators.fourier import LONGEST_VARYING, POWERS, too_long
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

# A range of up to so many elements is a constant, torch's own numbers; a longer one is computed.
LARGEST_CONSTANT = 65536


@converter(aten.full.default, aten.full_like.default)
def full(net: Network, like: object, value: Dim | float, *, dtype: torch.dtype | None = None) -> Tensor:
    return net.full(net.result_shape(), value, net.result_dtype())


@converter(aten.empty.memory_format)
def empty(net: Network, size: Sequence[Dim], *, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh memory may hold anything: here, zeros."""
    return net.full(net.result_shape(), 0, net.result_dtype())


@converter(aten.empty_strided.default, aten.empty_permuted.default)
def empty_strided(net: Network, size: Sequence[Dim], strides: object, *, dtype: torch.dtype | None = None) -> Tensor:
    return net.full(net.result_shape(), 0, net.result_dtype())


@converter(aten.scalar_tensor.default, torch.ops.prims.scalar_tensor.default)
def scalar_tensor(net: Network, value: Dim | float, *, dtype: torch.dtype | None = None) -> Tensor:
    return net.operand(value, net.result_dtype())


@converter(aten.arange.start_step)
def arange(
    net: Network, start: Dim | float, end: Dim | float, step: Dim | float = 1, *, dtype: torch.dtype | None = None
) -> Tensor:
    shape, result = net.result_shape(), net.result_dtype()
    numbers = [number for number in (start, end, step) if not isinstance(number, sympy.Expr)]
    if len(numbers) == 3 and is_static(shape) and int(shape[0]) <= LARGEST_CONSTANT:
        return net.constant(torch.arange(*numbers, dtype=result))
    return net.cast(
        net.linspace(shape, start, [step], torch.float32 if result.is_floating_point else torch.int64), result
    )


@converter(aten.tril_indices.default)
def tril_indices(net: Network, rows: int, columns: int, offset: int = 0, *, dtype: torch.dtype | None = None) -> Tensor:
    return net.constant(torch.tril_indices(rows, columns, offset, dtype=net.result_dtype()))


@converter(aten.triu_indices.default)
def triu_indices(net: Network, rows: int, columns: int, offset: int = 0, *, dtype: torch.dtype | None = None) -> Tensor:
    return net.constant(torch.triu_indices(rows, columns, offset, dtype=net.result_dtype()))


@converter(torch.ops.trt_dynamo.fourier_table.default)
def fourier_table(net: Network, n: Dim, count: Dim, sign: int, normalization: int) -> Tensor:
    """Whole numbers tell the nearest quarter of the circle and how far off it an angle lies: by an eighth at most,
    which float32 holds well.
    """
    if net.most(n) > LONGEST_VARYING:
        raise Unsupported(too_long(net.most(n)))
    rows, columns = net.linspace((n, 1), 0, (1, 0), torch.int32), net.linspace((1, count), 0, (0, 1), torch.int32)
    turn = rest(net, net.elementwise("PROD", rows, columns), n)
    quarter = net.elementwise("FLOOR_DIV", net.elementwise("SUM", net.elementwise("PROD", turn, 8), n), 2 * n)
    off = net.elementwise("SUB", net.elementwise("PROD", turn, 4), net.elementwise("PROD", quarter, n))
    length = net.size_tensor(n, torch.float32)
    angle = net.elementwise("PROD", net.elementwise("DIV", net.cast(off, torch.float32), length), math.pi / 2)
    cosine, sine = net.unary("COS", angle), net.unary("SIN", angle)
    odd = net.elementwise("EQUAL", rest(net, quarter, 2), 1)
    # Of the quarters 0 to 4, the real part is less than 0 at 1 and 2, the imaginary one at 2 and 3.
    real = negated(net, net.where(odd, sine, cosine), net.elementwise("SUM", quarter, 1))
    imag = negated(net, net.where(odd, cosine, sine), quarter)
    imag = imag if sign > 0 else net.unary("NEG", imag)
    table = net.cat([net.unsqueeze(part, [2]) for part in (real, imag)], 2)
    power = POWERS[normalization]
    return table if power == 0 else net.elementwise("DIV", table, length if power == -1 else net.unary("SQRT", length))


def negated(net: Network, x: Tensor, number: Tensor) -> Tensor:
    """`x` with its sign turned where the number is 2 or 3."""
    return net.where(net.elementwise("EQUAL", net.elementwise("FLOOR_DIV", number, 2), 1), net.unary("NEG", x), x)


def rest(net: Network, x: Tensor, n: Dim) -> Tensor:
    """`x % n` of whole numbers of at least 0."""
    return net.elementwise("SUB", x, net.elementwise("PROD", net.elementwise("FLOOR_DIV", x, n), n))
