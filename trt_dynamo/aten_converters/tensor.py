"""`Tensor`, a tensor of a network under construction, and the types that travel as another inside it."""

from __future__ import annotations

import dataclasses
import math

import sympy
import torch

from trt_dynamo.profiles import Dim
from trt_dynamo.trt import trt

# TensorRT computes with none of these: they travel as int32 inside a network, and wrap after arithmetic as torch's do.
CARRIED = {torch.uint8: torch.int32, torch.int8: torch.int32}
WRAP = {torch.uint8: (0, 256), torch.int8: (128, 256)}

HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor of the network: `dtype` as torch sees it, `shape` as ints and expressions over the graph's symbols."""

    raw: trt.ITensor
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    value: torch.Tensor | None = None  # what it holds, where it is a constant
    transposed: Tensor | None = None  # the tensor of which it is the transpose in its last two dims

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point


Operand = Tensor | bool | int | float


def holds(dtype: torch.dtype, x: Operand | sympy.Expr) -> bool:
    """Whether a number keeps its value in the half type, up to rounding: 1e9 and 1e-8 do not. A tensor has its type."""
    if isinstance(x, sympy.Expr):
        return False
    if isinstance(x, Tensor):
        return True
    limits = torch.finfo(dtype)
    return x == 0 or not math.isfinite(x) or limits.tiny <= abs(x) <= limits.max
