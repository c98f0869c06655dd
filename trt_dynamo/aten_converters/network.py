"""`Network`: TensorRT layers with torch's semantics (promotion, broadcasting, casts, symbolic sizes), stated once.

Converters get one and give back its `Tensor`s. `out` is the only way to get a tensor from a layer: it reads the shape
at once, because TensorRT creates a wrong layer happily and its setters fail without an exception.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Kind
from torch._prims_common import elementwise_dtypes
from torch.fx import Node

from trt_dynamo import log
from trt_dynamo.aten_converters.arrangement import Arrangement, L
from trt_dynamo.aten_converters.shapes import ShapeArithmetic
from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import TYPES, to_torch, to_trt, trt

MAX_RANK = 8

# TensorRT computes with none of these: they travel as int32 inside a network, and wrap after arithmetic as torch's do.
CARRIED = {torch.uint8: torch.int32, torch.int8: torch.int32}
WRAP = {torch.uint8: (0, 256), torch.int8: (128, 256)}

# The bool forms of arithmetic, which TensorRT has only for numbers.
LOGICAL = {"SUM": "OR", "PROD": "AND", "MAX": "OR", "MIN": "AND"}


# torch computes these with a Python number as float32, also where the tensor is of a half type.
ARITHMETIC = frozenset({"SUM", "SUB", "PROD", "DIV", "POW"})
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
    """Whether a number keeps its value in the half type, up to rounding: 1e9 and 1e-8 do not; a tensor has its own
    type.
    """
    if isinstance(x, sympy.Expr):
        return False
    if isinstance(x, Tensor):
        return True
    limits = torch.finfo(dtype)
    return x == 0 or not math.isfinite(x) or limits.tiny <= abs(x) <= limits.max


class Network(Arrangement):
    """A TensorRT network under construction. `raw` is the `INetworkDefinition`, for a layer that no helper covers."""

    def __init__(self) -> None:
        self.builder = trt.Builder(log.logger())
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.raw: trt.INetworkDefinition = self.builder.create_network(0 if flag is None else 1 << int(flag))
        self.sizes = ShapeArithmetic(self)
        self.scope = "network"  # the FX node under conversion
        self.source = ""  # the user's line behind it
        self.expected: tuple[Any, ...] = ()  # meta["val"] of the results of that node
        self.used: tuple[bool, ...] = ()  # which of its results anybody reads
        self.node: Node | None = (
            None  # the node itself, for what a `Tensor` does not tell: the strides of its arguments
        )
        self.owners: list[torch.Tensor] = []  # TensorRT keeps pointers to weights, not copies
        self.constants: dict[str, torch.Tensor] = {}  # layer name to value, for weights that Python cannot read back
        self.inputs: dict[str, trt.ITensor] = {}
        self.names: dict[str, int] = {}
        self.scalars: dict[tuple[Any, ...], Tensor] = {}

    # -- layers and what comes out of them ----------------------------------------------------------------------------

    def name(self, layer: trt.ILayer, name: str | None = None) -> None:
        """Names the layer after its FX node; the source line becomes its metadata."""
        base = name or self.scope
        count = self.names.get(base, 0)
        self.names[base] = count + 1
        layer.name = f"{base}.{count}" if count else base
        layer.metadata = self.source

    def raw_out(self, layer: trt.ILayer | None, index: int = 0, name: str | None = None) -> trt.ITensor:
        """The layer's output, its shape read.

        Raises:
            Unsupported: TensorRT refused the layer; the text is TensorRT's own.
        """
        if layer is None:
            raise Unsupported(self.refusal("TensorRT refused the layer"))
        if index == 0:
            self.name(layer, name)
        raw = layer.get_output(index)
        try:
            len(raw.shape)
        except (RuntimeError, ValueError, AttributeError):
            raise Unsupported(self.refusal("TensorRT cannot tell the shape")) from None
        if log.MESSAGES.quiet and log.MESSAGES.errors:
            raise Unsupported(self.refusal("TensorRT logged an error"))
        return raw

    def made(self, layer: L | None) -> L:
        """The layer, for one whose attributes are set before `out`; `Unsupported` if TensorRT made none."""
        if layer is None:
            raise Unsupported(self.refusal("TensorRT refused the layer"))
        return layer

    def refusal(self, otherwise: str) -> str:
        """TensorRT's own words on what went wrong last."""
        errors, log.MESSAGES.errors[:] = list(log.MESSAGES.errors), []
        return log.first_line(errors[0]) if errors else otherwise

    def out(
        self,
        layer: trt.ILayer | None,
        index: int = 0,
        *,
        shape: Sequence[Dim] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The layer's output as a `Tensor`. `shape` gives what TensorRT calls -1; `dtype` is needed for carried
        types.
        """
        raw = self.raw_out(layer, index)
        seen = tuple(raw.shape)
        dims = [self.dim_seen(raw, axis, size, shape) for axis, size in enumerate(seen)]
        return Tensor(raw, dtype or to_torch(raw.dtype), tuple(dims))

    def dim_seen(self, raw: trt.ITensor, axis: int, size: int, shape: Sequence[Dim] | None) -> Dim:
        if shape is not None:
            if size >= 0 and isinstance(shape[axis], int) and shape[axis] != size:
                raise ConversionError(
                    f"{self.scope}: dim {axis} was meant to be {shape[axis]}, TensorRT makes it {size}"
                )
            return shape[axis] if size < 0 else size
        if size >= 0:
            return size
        symbol = sympy.Symbol(f"size_{raw.name}_{axis}", integer=True, nonnegative=True)
        self.sizes.declare(symbol, lambda: raw, axis)
        return symbol

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[Dim]) -> Tensor:
        """A network input; a type that TensorRT takes only at the border (uint8, int8) is cast to its carrier at
        once.
        """
        if dtype not in TYPES:
            raise Unsupported(f"TensorRT has no {str(dtype).removeprefix('torch.')}")
        if len(shape) > MAX_RANK:
            raise Unsupported(f"rank {len(shape)}: TensorRT's largest is {MAX_RANK}")
        dims = [dim if isinstance(dim, int) else -1 for dim in shape]
        raw = self.raw.add_input(name, to_trt(dtype), dims)
        if raw is None:
            raise Unsupported(self.refusal("TensorRT refused the input"))
        for axis, dim in enumerate(shape):
            self.sizes.declare(dim, lambda: raw, axis)
        self.inputs[name] = raw
        tensor = Tensor(raw, dtype, tuple(shape))
        if dtype not in CARRIED:
            return tensor
        carried = self.raw_out(self.raw.add_cast(raw, to_trt(CARRIED[dtype])))
        return Tensor(carried, dtype, tuple(shape))

    # -- constants ----------------------------------------------------------------------------------------------------

    def constant(
        self, value: torch.Tensor | bool | int | float, dtype: torch.dtype | None = None, *, name: str | None = None
    ) -> Tensor:
        """A constant of the network, in torch's own layout and dtype. `name` is the parameter's qualified name."""
        tensor = torch.as_tensor(value, dtype=dtype) if not isinstance(value, torch.Tensor) else value
        if tensor.dtype is torch.float64 and not isinstance(value, torch.Tensor):
            tensor = tensor.to(torch.get_default_dtype() if dtype is None else dtype)
        if tensor.dtype not in TYPES and tensor.dtype not in CARRIED:
            raise Unsupported(f"TensorRT has no {str(tensor.dtype).removeprefix('torch.')}")
        stored = tensor.detach().to(CARRIED.get(tensor.dtype, tensor.dtype)).cpu().contiguous()
        self.owners.append(stored)
        weights = (
            trt.Weights(to_trt(stored.dtype), stored.data_ptr(), stored.numel())
            if stored.numel()
            else trt.Weights(to_trt(stored.dtype))
        )
        layer = self.made(self.raw.add_constant(tuple(stored.shape), weights))
        raw = self.raw_out(layer, name=name)
        self.constants[layer.name] = stored
        return Tensor(raw, tensor.dtype, tuple(stored.shape), value=stored)

    def scalar(self, value: bool | int | float, dtype: torch.dtype, rank: int = 0) -> Tensor:
        """A one-element constant of the rank, made once per network."""
        key = (type(value), repr(value), dtype, rank)
        if key not in self.scalars:
            wrapped = (
                torch.tensor(value, dtype=dtype)
                if not isinstance(value, float) or dtype.is_floating_point
                else torch.tensor(value).to(dtype)
            )
            self.scalars[key] = self.constant(wrapped.reshape((1,) * rank))
        return self.scalars[key]

    def size_tensor(self, dim: Dim, dtype: torch.dtype = torch.int64) -> Tensor:
        """A size as a 0-D tensor to compute with."""
        if isinstance(dim, int):
            return self.scalar(dim, dtype)
        one = Tensor(self.sizes.tensor(dim), torch.int64, (1,))
        return self.cast(self.reshape(one, ()), dtype)

    def operand(self, x: Any, dtype: torch.dtype, rank: int = 0) -> Tensor:
        """A tensor, Python number or size as a `Tensor` of the dtype; a number gets the rank."""
        if isinstance(x, Tensor):
            return self.cast(x, dtype)
        if isinstance(x, sympy.Expr):
            return self.size_tensor(x, dtype)
        return self.scalar(x, dtype, rank)

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
        samples = [
            torch.empty((1,) * x.ndim, dtype=x.dtype, device="meta")
            if isinstance(x, Tensor)
            else 1
            if isinstance(x, sympy.Expr)
            else x
            for x in xs
        ]
        return elementwise_dtypes(*samples, type_promotion_kind=kind)[1]

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
        if not axes:
            return x
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
        layer = self.raw.add_matrix_multiply(left.raw, left_op, right.raw, right_op)
        return self.out(layer, shape=(*batch, *rows, *columns), dtype=a.dtype)

    def matrix(self, x: Tensor) -> tuple[Tensor, trt.MatrixOperation]:
        """The operand and how the layer reads it: the transpose of a tensor is that tensor, read transposed."""
        if x.ndim == 1:
            return x, trt.MatrixOperation.VECTOR
        if x.transposed is not None:
            return x.transposed, trt.MatrixOperation.TRANSPOSE
        return x, trt.MatrixOperation.NONE

    # -- checks -------------------------------------------------------------------------------------------------------

    def check(self, result: Tensor, value: torch.Tensor, shape: tuple[Dim, ...]) -> Tensor:
        """The result with the shape that FX states.

        Raises:
            ConversionError: rank, dtype or a static dim differs from what FX states: our bug.
        """
        seen = tuple(result.raw.shape)
        fits = len(seen) == len(shape) and all(
            s < 0 or (s == d if isinstance(d, int) else d.is_Symbol is False) for s, d in zip(seen, shape, strict=False)
        )
        if not fits or result.dtype is not value.dtype:
            stated, made = f"{list(shape)} {value.dtype}", f"{list(seen)} {result.dtype}"
            raise ConversionError(f"{self.scope} should be {stated}, its converter made {made}")
        return dataclasses.replace(result, shape=shape)
