"""Strides: an engine reads and writes dense row-major memory, so a tensor of other strides is permuted at the
border.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from trt_dynamo.profiles import dim_of, shape_env_of


def numbers(sizes: Any, env: Any) -> list[int] | None:
    """Sizes or strides as the numbers seen while tracing (no guard is added), or None where nothing was seen."""
    result = []
    for size in sizes:
        dim = dim_of(size)
        if isinstance(dim, sympy.Expr):
            dim = dim.xreplace(
                {s: sympy.Integer(env.backed_var_to_val[s]) for s in dim.free_symbols if s in env.backed_var_to_val}
            )
            if not dim.is_number:
                return None
        result.append(int(dim))
    return result


def memory_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """The order of dims in which `value.permute(order)` is dense and row-major; None if there is no such order.

    `value` may be a fake tensor with symbolic sizes.
    """
    env = shape_env_of([value, *value.stride()])
    sizes, strides = numbers(value.shape, env), numbers(value.stride(), env)
    if sizes is None or strides is None:
        return tuple(range(value.ndim))
    return dense_order(sizes, strides)


def engine_order(value: torch.Tensor) -> tuple[int, ...]:
    """The order of dims in which an engine reads or writes the tensor; row by row, where its memory has none."""
    return memory_order(value) or tuple(range(value.ndim))


def dense_order(sizes: list[int], strides: list[int]) -> tuple[int, ...] | None:
    """`memory_order` of a tensor with these sizes and strides."""
    natural = tuple(range(len(sizes)))
    if 0 in sizes or is_dense(sizes, strides, natural):
        return natural
    order = sorted(natural, key=lambda axis: (-strides[axis], axis))
    # A dim of size 1 may have any stride: it stays where it was.
    wide = [axis for axis in order if sizes[axis] != 1]
    if not is_dense(sizes, strides, tuple(wide)):
        return None
    return tuple([axis for axis in natural if sizes[axis] == 1] + wide)


def is_dense(sizes: list[int], strides: list[int], order: tuple[int, ...]) -> bool:
    expected = 1
    for axis in reversed(order):
        if sizes[axis] != 1 and strides[axis] != expected:
            return False
        expected *= sizes[axis]
    return True
