"""The layers of `Network` that compute, with torch's promotion, casts and broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes

from trt_dynamo.aten_converters.arrangement import Arrangement
from trt_dynamo.aten_converters.tensor import CARRIED, HALVES, WRAP, Operand, Tensor, holds
from trt_dynamo.errors import Unsupported
from trt_dynamo.trt import TYPES, to_trt, trt

# The bool forms of arithmetic, which TensorRT has only for numbers.
LOGICAL = {"SUM": "OR", "PROD": "AND", "MAX": "OR", "MIN": "AND"}

# torch computes these with a Python number as float32, also where the tensor is of a half type.
ARITHMETIC = frozenset({"SUM", "SUB", "PROD", "DIV", "POW"})


def kind_of(x: Operand | sympy.Expr) -> tuple[torch.dtype, bool] | type:
    """What torch's promotion asks of an operand: dtype and whether it has dims, or the type of a number."""
    if isinstance(x, Tensor):
        return x.dtype, x.ndim > 0
    return int if isinstance(x, sympy.Expr) else type(x)


@functools.cache
def common_dtype(
    operands: tuple[tuple[torch.dtype, bool] | type, ...], kind: Kind, default: torch.dtype
) -> torch.dtype:
    """The dtype that torch computes such operands in, each described by `kind_of`, where `default` is its default."""
    samples = [
        torch.empty((1,) * each[1], dtype=each[0], device="meta") if isinstance(each, tuple) else each(1)
        for each in operands
    ]
    found: torch.dtype = elementwise_dtypes(*samples, type_promotion_kind=kind)[1]
    return found


class Arithmetic(Arrangement):
    """See `Network`, which this is a part of."""

    if TYPE_CHECKING:
        wide_products: bool

        def raw_out(self, layer: Any, index: int = 0, name: str | None = None) -> trt.ITensor: ...

    # -- types --------------------------------------------------------------------------------------------------------

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x.to(dtype)`, with torch's wrap-around for the small integers."""
        if x.dtype is dtype:
            return x
        if dtype not in TYPES and dtype not in CARRIED:
            raise Unsupported(f"TensorRT has no {str(dtype).removeprefix('torch.')}")
        target = to_trt(CARRIED.get(dtype, dtype))
        raw = x.raw
        if raw.dtype != target:
            raw = self.raw_out(self.raw.add_cast(raw, target))
        return self.wrap(Tensor(raw, dtype, x.shape), fits=x.dtype is torch.bool)

    def wide(self, x: Any) -> Any:
        """A tensor of a half type as float32, in which torch computes a formula's steps; all else as it is."""
        return self.cast(x, torch.float32) if isinstance(x, Tensor) and x.dtype in HALVES else x

    def wrap(self, x: Tensor, *, fits: bool = False) -> Tensor:
        """Brings a small integer that is carried as int32 back into its range, modulo its width as torch does."""
        if x.dtype not in WRAP or fits:
            return x
        shift, width = WRAP[x.dtype]
        carried = Tensor(x.raw, torch.int32, x.shape)
        moved = self.elementwise("SUM", carried, shift) if shift else carried
        turns = self.elementwise("PROD", self.elementwise("FLOOR_DIV", moved, width), width)
        result = self.elementwise("SUB", moved, turns)
        result = self.elementwise("SUB", result, shift) if shift else result
        return Tensor(result.raw, x.dtype, x.shape)

    def promoted_dtype(self, *xs: Operand | sympy.Expr, kind: Kind = Kind.DEFAULT) -> torch.dtype:
        """The dtype that torch computes `xs` in, by torch's own rules (0-D tensors and Python numbers are weak)."""
        return common_dtype(tuple(map(kind_of, xs)), kind, torch.get_default_dtype())

    def promote(self, *xs: Operand | sympy.Expr, kind: Kind = Kind.DEFAULT) -> tuple[Tensor, ...]:
        """`xs` cast to the dtype that torch computes them in, and brought to one rank."""
        dtype = self.promoted_dtype(*xs, kind=kind)
        rank = max((x.ndim for x in xs if isinstance(x, Tensor)), default=0)
        return self.align(*(self.operand(x, dtype, rank) for x in xs))

    def align(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """`xs` with leading 1s up to the largest rank, as broadcasting wants them."""
        rank = max(x.ndim for x in xs)
        return tuple(self.unsqueeze_to(x, rank) for x in xs)

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def unary(self, op: str, x: Tensor, *, kind: Kind = Kind.DEFAULT) -> Tensor:
        """An `IUnaryLayer`. `op` is a name of `UnaryOperation`."""
        x = self.cast(x, self.promoted_dtype(x, kind=kind))
        dtype = torch.bool if op in ("ISNAN", "ISINF", "NOT") else x.dtype
        return self.wrap(
            self.out(self.raw.add_unary(x.raw, getattr(trt.UnaryOperation, op)), shape=x.shape, dtype=dtype)
        )

    def elementwise(
        self, op: str, a: Operand | sympy.Expr, b: Operand | sympy.Expr, *, kind: Kind = Kind.DEFAULT
    ) -> Tensor:
        """An `IElementWiseLayer` over promoted, broadcast operands. `op` is a name of `ElementWiseOperation`."""
        if (
            op in ARITHMETIC
            and (dtype := self.promoted_dtype(a, b, kind=kind)) in HALVES
            and not (holds(dtype, a) and holds(dtype, b))
        ):
            return self.cast(self.elementwise(op, self.wide(a), self.wide(b)), dtype)
        left, right = self.promote(a, b, kind=kind)
        dtype = left.dtype
        if dtype is torch.bool:
            op = LOGICAL.get(op, op)
            if op in ("GREATER", "LESS", "SUB", "DIV", "POW", "FLOOR_DIV"):
                left, right = self.cast(left, torch.int32), self.cast(right, torch.int32)
        elif op in ("AND", "OR", "XOR"):
            left, right, dtype = self.cast(left, torch.bool), self.cast(right, torch.bool), torch.bool
        layer = self.raw.add_elementwise(left.raw, right.raw, getattr(trt.ElementWiseOperation, op))
        compares = op in ("EQUAL", "GREATER", "LESS", "AND", "OR", "XOR")
        shape = self.broadcast(left.shape, right.shape)
        out = self.out(layer, shape=shape, dtype=torch.bool if compares else left.dtype)
        return out if compares else self.cast(self.wrap(out), dtype)

    def activation(self, op: str, x: Tensor, alpha: float | None = None, beta: float | None = None) -> Tensor:
        """An `IActivationLayer`. `op` is a name of `ActivationType`; its alpha and beta are set when given."""
        layer = self.made(self.raw.add_activation(x.raw, getattr(trt.ActivationType, op)))
        if alpha is not None:
            layer.alpha = alpha
        if beta is not None:
            layer.beta = beta
        return self.out(layer, shape=x.shape, dtype=x.dtype)

    def where(self, condition: Tensor, a: Operand | sympy.Expr, b: Operand | sympy.Expr) -> Tensor:
        """An `ISelectLayer`: `a` where the condition holds, else `b`, promoted and broadcast."""
        left, right = self.promote(a, b)
        condition, left, right = self.align(self.cast(condition, torch.bool), left, right)
        shape = self.broadcast(condition.shape, self.broadcast(left.shape, right.shape))
        return self.out(self.raw.add_select(condition.raw, left.raw, right.raw), shape=shape, dtype=left.dtype)

    def logical_not(self, x: Tensor) -> Tensor:
        return self.unary("NOT", self.cast(x, torch.bool))

    def reduce(self, op: str, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """An `IReduceLayer` over `dims` (all when None or empty). `op` is a name of `ReduceOperation`."""
        axes = sorted({d % x.ndim for d in dims}) if dims and x.ndim else list(range(x.ndim))
        if all(x.shape[axis] == 1 for axis in axes):
            # Nothing to combine. RTX 1.7's builder takes endless time for some networks with such a layer.
            return x if keepdim else self.squeeze(x, axes)
        dtype = x.dtype
        if dtype is torch.bool:
            x = self.cast(x, torch.int32)
        mask = sum(1 << axis for axis in axes)
        layer = self.raw.add_reduce(x.raw, getattr(trt.ReduceOperation, op), mask, keepdim)
        kept = [1 if i in axes else d for i, d in enumerate(x.shape) if keepdim or i not in axes]
        out = self.out(layer, shape=kept, dtype=x.dtype)
        return self.cast(self.wrap(out), dtype)

    def softmax(self, x: Tensor, dim: int) -> Tensor:
        """An `ISoftMaxLayer` over one dim; TensorRT wants a rank of 2 at least."""
        if x.ndim < 2:
            rank = x.ndim
            wide = self.reshape(x, (1, *x.shape) if rank else (1, 1))
            return self.reshape(self.softmax(wide, 1), x.shape)
        if x.shape[dim] == 1:
            # 1, or NaN of what is no finite number. RTX 1.7's builder takes endless time for some such layers.
            return self.unary("EXP", self.elementwise("SUB", x, x))
        layer = self.made(self.raw.add_softmax(x.raw))
        layer.axes = 1 << (dim % x.ndim)
        return self.out(layer, shape=x.shape, dtype=x.dtype)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """An `IMatrixMultiplyLayer` over tensors of equal dtype, batch dims broadcast, vectors as torch takes them."""
        if not a.is_float or CARRIED.get(a.dtype):
            raise Unsupported(f"matrix product in {str(a.dtype).removeprefix('torch.')}: TensorRT has floats only")
        batch = self.broadcast(a.shape[:-2], b.shape[:-2])
        rows, columns = a.shape[-2:-1] if a.ndim > 1 else (), b.shape[-1:] if b.ndim > 1 else ()
        (left, left_op), (right, right_op) = self.matrix(a), self.matrix(b)
        rank = max(left.ndim if a.ndim > 1 else left.ndim + 1, right.ndim if b.ndim > 1 else right.ndim + 1)
        left = self.unsqueeze_to(left, rank - (a.ndim == 1))
        right = self.unsqueeze_to(right, rank - (b.ndim == 1))
        if self.wide_products and a.dtype is torch.float16:
            # How TensorRT is told: it takes casts in front of a product for the type to add up in.
            left, right = self.cast(left, torch.float32), self.cast(right, torch.float32)
        layer = self.raw.add_matrix_multiply(left.raw, left_op, right.raw, right_op)
        return self.cast(self.out(layer, shape=(*batch, *rows, *columns), dtype=left.dtype), a.dtype)

    def matrix(self, x: Tensor) -> tuple[Tensor, trt.MatrixOperation]:
        """The operand and how the layer reads it: the transpose of a tensor is that tensor, read transposed."""
        if x.ndim == 1:
            return x, trt.MatrixOperation.VECTOR
        if x.transposed is not None:
            return x.transposed, trt.MatrixOperation.TRANSPOSE
        return x, trt.MatrixOperation.NONE
