"""`Network`: TensorRT layers with torch's semantics (promotion, broadcasting, casts, symbolic sizes), stated once.

Converters get one and give back its `Tensor`s. `out` is the only way to get a tensor from a layer: it reads the shape
at once, because TensorRT creates a wrong layer happily and its setters fail without an exception.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from trt_dynamo import log
from trt_dynamo.aten_converters.arithmetic import Arithmetic
from trt_dynamo.aten_converters.arrangement import L
from trt_dynamo.aten_converters.shapes import ShapeArithmetic
from trt_dynamo.aten_converters.tensor import CARRIED, HALVES, Operand, Tensor
from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.profiles import Dim, Range
from trt_dynamo.trt import TYPES, has, to_torch, to_trt, trt

__all__ = ["CARRIED", "HALVES", "MAX_RANK", "Network", "Operand", "Tensor"]

MAX_RANK = 8


@dataclasses.dataclass(frozen=True, eq=False)
class NamedWeight:
    """A constant that can be refitted: its name to the refitter, its layer, the dtype of what it holds, its tensor."""

    name: str
    layer: str
    stored: torch.dtype
    raw: trt.ITensor


def weights_at(tensor: torch.Tensor) -> trt.Weights:
    """TensorRT's view of a dense tensor's memory, which must stay until the engine is built."""
    dtype, count = to_trt(tensor.dtype), tensor.numel()
    return trt.Weights(dtype, tensor.data_ptr(), count) if count else trt.Weights(dtype)


def candidates(name: str) -> Iterator[str]:
    """The name itself, then others made of it."""
    return itertools.chain((name,), (f"{name}.{count}" for count in itertools.count(1)))


class Network(Arithmetic):
    """A TensorRT network under construction. `raw` is the `INetworkDefinition`, for a layer that no helper covers."""

    def __init__(
        self,
        ranges: Mapping[sympy.Symbol, Range] | None = None,
        *,
        refit: bool = False,
        wide_products: bool = False,
    ) -> None:
        self.ranges = ranges or {}  # of the sizes for which it will be built, where that is known
        self.refit = refit  # whether the weights of its engine shall be replaceable
        self.wide_products = wide_products  # whether matrix products of float16 add up in float32
        self.baked: Mapping[str, torch.Tensor] = {}  # the values of the weights by placeholder; none in a dry run
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
        self.addresses: set[int] = set()  # of constants, where weights get names
        self.weight_names: set[str] = set()
        self.inputs: dict[str, trt.ITensor] = {}
        self.dimension_names: dict[Dim, str] = {}
        self.names: dict[str, int] = {}
        self.places: dict[str, Tensor] = {}  # name of a mask to where it is true
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
            if not isinstance(dim, int):  # equal names tell TensorRT that the sizes are equal in every call
                raw.set_dimension_name(axis, self.dimension_names.setdefault(dim, f"size_{len(self.dimension_names)}"))
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
        if self.refit and stored.data_ptr() in self.addresses:  # TensorRT finds weights by address when it names them
            stored = stored.clone()
        self.addresses.add(stored.data_ptr())
        self.owners.append(stored)
        layer = self.made(self.raw.add_constant(tuple(stored.shape), weights_at(stored)))
        raw = self.raw_out(layer, name=name)
        self.constants[layer.name] = stored
        return Tensor(raw, tensor.dtype, tuple(stored.shape), value=stored)

    def weight(self, value: torch.Tensor, name: str) -> tuple[Tensor, NamedWeight | None]:
        """A parameter or buffer as a constant whose value no converter may look at, because it can change; and, where
        the engine shall be refittable, under which name. An empty tensor has nothing to replace, and no name.

        Raises:
            ConversionError: TensorRT refused the name.
        """
        made = self.constant(value, name=name)
        stored, layer = made.value, next(reversed(self.constants))
        assert stored is not None
        tensor = dataclasses.replace(made, value=None)
        if not self.refit or stored.numel() == 0:
            return tensor, None
        if not has("mark_weights_refittable"):
            raise Unsupported("this TensorRT cannot mark single weights as refittable")
        unique = next(n for n in candidates(name) if n not in self.weight_names)
        self.weight_names.add(unique)
        if not self.raw.set_weights_name(weights_at(stored), unique):
            raise ConversionError(self.refusal(f"TensorRT refused the name of the weight {unique}"))
        if not self.raw.mark_weights_refittable(unique):
            raise ConversionError(self.refusal(f"TensorRT refused to make the weight {unique} refittable"))
        return tensor, NamedWeight(unique, layer, stored.dtype, made.raw)

    def scalar(self, value: bool | int | float, dtype: torch.dtype, rank: int = 0) -> Tensor:
        """A one-element constant of the rank, made once per network."""
        key = (type(value), repr(value), dtype, rank)
        if key not in self.scalars:
            # A number that the type cannot hold wraps, as torch casts it.
            exact = torch.float64 if isinstance(value, float) else None
            wrapped = torch.tensor(value, dtype=dtype if dtype.is_floating_point else exact).to(dtype)
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
        for axis, dim in enumerate(shape):
            if not self.sizes.known(dim):  # it depends on data, and this is where it comes from
                self.sizes.declare(dim, functools.partial(lambda raw: raw, result.raw), axis)
        return dataclasses.replace(result, shape=shape)
