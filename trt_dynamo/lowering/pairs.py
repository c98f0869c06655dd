"""What the rules for complex numbers are written with: `Pair`, and the table of rules by ATen op.

A rule gets the arguments of its op, with a `Pair` for each complex tensor, and gives a `Pair` for a complex result. It
calls plain torch; what it calls becomes nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from trt_dynamo.lowering.recording import REAL_OF

Number = bool | int | float | complex


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Complex numbers as a real tensor with a last dim of 2. `ndim` and `shape` leave that dim out."""

    value: torch.Tensor

    @property
    def re(self) -> torch.Tensor:
        return self.value.select(-1, 0)

    @property
    def im(self) -> torch.Tensor:
        return self.value.select(-1, 1)

    @property
    def ndim(self) -> int:
        return self.value.ndim - 1

    @property
    def shape(self) -> torch.Size:
        return self.value.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype


Operand = Pair | torch.Tensor | Number
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)

RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[R], R]:
    """Registers a function as the rule of ATen ops."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def pair(re: Any, im: Any) -> Pair:
    """A pair of two parts, which broadcast; one of them may be a number."""
    if not isinstance(im, torch.Tensor):
        im = torch.full_like(re, im)
    if not isinstance(re, torch.Tensor):
        re = torch.full_like(im, re)
    return Pair(torch.stack(torch.broadcast_tensors(re, im), -1))


def dtype_of(*operands: Operand) -> torch.dtype:
    """The real dtype that the operands are computed in: that of the pairs with dims, else of the others."""
    tensors = [x for x in operands if isinstance(x, Pair | torch.Tensor) and x.dtype.is_floating_point]
    wide = [x.dtype for x in tensors if x.ndim] or [x.dtype for x in tensors] or [torch.get_default_dtype()]
    dtype = wide[0]
    for other in wide[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def parts(x: Operand, dtype: torch.dtype) -> tuple[Any, Any]:
    """The real and the imaginary part, which of real numbers is a plain 0.0."""
    if isinstance(x, Pair):
        return x.re.to(dtype), x.im.to(dtype)
    if isinstance(x, torch.Tensor):
        return x.to(dtype), 0.0
    return complex(x).real, complex(x).imag


def both(a: Operand, b: Operand) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The parts of two operands, in one dtype."""
    dtype = dtype_of(a, b)
    return parts(a, dtype), parts(b, dtype)


def real_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the parts of a complex dtype; any other as it is."""
    return dtype if dtype is None else REAL_OF.get(dtype, dtype)


def axis(x: Pair, dim: int) -> int:
    """A dim counted from the front: from the back it would count the parts."""
    return dim % x.ndim if x.ndim else 0


def axes(x: Pair, dims: int | Iterable[int] | None) -> list[int]:
    """Dims counted from the front; all of them for None or none."""
    chosen = [dims] if isinstance(dims, int) else list(dims or ())
    return [axis(x, dim) for dim in chosen] if x.ndim and chosen else list(range(x.ndim))
