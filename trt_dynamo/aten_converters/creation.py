"""Ops that make tensors from numbers and sizes: fills and ranges. `zeros`, `ones` and their kin come in as `full`."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import is_static
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
