"""Symbolic sizes inside a network: each size is an `int` or a sympy expression, computed at most once per network.

A symbol is read off the shape of a network input that has it as a dim; what cannot be read off comes in as a host shape
tensor. So no size is ever copied from the device, and a dynamic network needs little more layers than a static one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import sympy
import torch
from torch.utils._sympy import functions as F

from trt_dynamo.aten_converters.rounded_sizes import whole
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim, dim_of
from trt_dynamo.trt import trt

if TYPE_CHECKING:
    from trt_dynamo.aten_converters.network import Network


def floordiv(a: Dim, b: Dim) -> Dim:
    """`a // b` for sizes."""
    return (
        a // b if isinstance(a, int) and isinstance(b, int) else dim_of(F.FloorDiv(sympy.sympify(a), sympy.sympify(b)))
    )


def ceildiv(a: Dim, b: Dim) -> Dim:
    """`-(-a // b)` for sizes."""
    return floordiv(a + b - 1, b)


def maximum(a: Dim, b: Dim) -> Dim:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else dim_of(F.Max(a, b))


def minimum(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else dim_of(F.Min(a, b))


def modulo(a: Dim, b: Dim) -> Dim:
    """`a % b` for sizes, never negative."""
    return (
        a % b if isinstance(a, int) and isinstance(b, int) else dim_of(F.PythonMod(sympy.sympify(a), sympy.sympify(b)))
    )


def product(dims: Sequence[Dim]) -> Dim:
    """The number of elements of a shape."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return dim_of(total) if isinstance(total, sympy.Expr) else total


def is_static(dims: Sequence[Dim]) -> bool:
    return all(isinstance(dim, int) for dim in dims)


BINARY: dict[type, str] = {
    sympy.Add: "SUM",
    sympy.Mul: "PROD",
    F.FloorDiv: "FLOOR_DIV",
    F.CleanDiv: "FLOOR_DIV",
    F.Max: "MAX",
    F.Min: "MIN",
    sympy.Max: "MAX",
    sympy.Min: "MIN",
}


class ShapeArithmetic:
    """Computes sizes as one-element int64 tensors in a network, each expression once."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.sources: dict[sympy.Expr, Callable[[], trt.ITensor]] = {}
        self.values: dict[Dim, trt.ITensor] = {}
        self.shapes: dict[str, trt.ITensor] = {}
        self.vectors: dict[tuple[Dim, ...], trt.ITensor] = {}

    def declare(self, dim: Dim, tensor: Callable[[], trt.ITensor], axis: int) -> None:
        """Says that `dim` can be read off the tensor's shape."""
        if not isinstance(dim, int):
            self.learn(dim, lambda: self.read(tensor(), axis))

    def divided(self, size: trt.ITensor, rest: int, slope: int) -> trt.ITensor:
        """What `s` is where `slope*s + rest` is `size`."""
        return self.binary("FLOOR_DIV", self.binary("SUB", size, self.constant(rest)), self.constant(slope))

    def declare_value(self, dim: Dim, read: Callable[[], trt.ITensor]) -> None:
        """Says that `read` gives `dim` as a one-element int64 tensor, where nothing in the network tells it."""
        if not self.known(dim):
            self.learn(dim, read)

    def learn(self, dim: sympy.Expr, read: Callable[[], trt.ITensor]) -> None:
        """Remembers where `dim` comes from; also what a linear one such as `2*s0 + 1` says about `s0`."""
        read = functools.cache(read)
        self.sources.setdefault(dim, read)
        symbols = dim.free_symbols
        if len(symbols) != 1 or dim.is_Symbol:
            return
        (symbol,) = symbols
        if not dim.is_polynomial(symbol):
            return
        slope, rest = dim.coeff(symbol), dim.subs(symbol, 0)
        if slope.is_Integer and rest.is_Integer and slope > 0 and sympy.expand(slope * symbol + rest - dim) == 0:
            self.sources.setdefault(symbol, lambda: self.divided(read(), int(rest), int(slope)))

    def known(self, dim: Dim) -> bool:
        """Whether the size can be computed here; a network input is needed where it cannot."""
        if isinstance(dim, int) or dim in self.values or dim in self.sources or dim.is_Integer:
            return True
        if dim.is_Symbol or not dim.args:
            return False
        plain = whole(dim)
        if plain is not None:
            return self.known(dim_of(plain))
        if self.computable(dim) and all(self.known(argument) for argument in dim.args):
            return True
        return self.beside(dim) is not None

    def beside(self, dim: sympy.Expr) -> tuple[sympy.Expr, int] | None:
        """A size that can be read off, and how much more `dim` is: of `u0 + u1 + 11` that may be `u0 + u1 + 12`, though
        nothing tells `u0`.
        """
        gaps = ((source, sympy.expand(dim - source)) for source in self.sources)
        return next(((source, int(gap)) for source, gap in gaps if gap.is_Integer), None)

    def computable(self, dim: sympy.Expr) -> bool:
        if isinstance(dim, F.Mod | F.PythonMod):
            return True
        if isinstance(dim, sympy.Pow | F.PowByNatural):
            return bool(dim.args[1].is_Integer and dim.args[1] > 0)
        return type(dim) in BINARY

    def tensor(self, dim: Dim) -> trt.ITensor:
        """The size as a one-element 1-D int64 tensor.

        Raises:
            Unsupported: a symbol that no input of the network tells, or a function that sizes cannot be computed with.
        """
        found = self.values.get(dim)
        if found is None:
            found = self.values[dim] = self.compute(dim)
        return found

    def compute(self, dim: Dim) -> trt.ITensor:
        if isinstance(dim, int) or dim.is_Integer:
            return self.constant(int(dim))
        if dim in self.sources:
            return self.sources[dim]()
        plain = whole(dim)
        if plain is not None:
            return self.tensor(dim_of(plain))
        if not self.computable(dim):
            raise Unsupported(f"the size {dim} cannot be computed inside the network")
        first, *rest = dim.args
        near = None if all(self.known(argument) for argument in dim.args) else self.beside(dim)
        if near is not None:
            return self.binary("SUM", self.sources[near[0]](), self.constant(near[1]))
        if isinstance(dim, F.Mod | F.PythonMod):
            a, b = self.tensor(dim_of(first)), self.tensor(dim_of(rest[0]))
            return self.binary("SUB", a, self.binary("PROD", b, self.binary("FLOOR_DIV", a, b)))
        if isinstance(dim, sympy.Pow | F.PowByNatural):
            op, rest = "PROD", [first] * (int(rest[0]) - 1)
        else:
            op = BINARY[type(dim)]
        result = self.tensor(dim_of(first))
        for argument in rest:
            result = self.binary(op, result, self.tensor(dim_of(argument)))
        return result

    def vector(self, dims: Sequence[Dim]) -> trt.ITensor:
        """Sizes as a 1-D int64 shape tensor."""
        if is_static(dims):
            return self.constant(*(int(dim) for dim in dims))
        if len(dims) == 1:
            return self.tensor(dims[0])
        key = tuple(dims)
        if key not in self.vectors:
            self.vectors[key] = self.joined(key)
        return self.vectors[key]

    def joined(self, dims: Sequence[Dim]) -> trt.ITensor:
        """One shape tensor of several sizes, neighbours that are known now as one constant."""
        pieces: list[trt.ITensor] = []
        static: list[int] = []
        for dim in dims:
            if isinstance(dim, int):
                static.append(dim)
                continue
            if static:
                pieces.append(self.constant(*static))
                static = []
            pieces.append(self.tensor(dim))
        if static:
            pieces.append(self.constant(*static))
        return self.net.raw_out(self.net.raw.add_concatenation(pieces))

    def constant(self, *values: int) -> trt.ITensor:
        key = sympy.Tuple(*values)
        if key not in self.values:
            self.values[key] = self.net.constant(torch.tensor(values, dtype=torch.int64)).raw
        return self.values[key]

    def binary(self, op: str, a: trt.ITensor, b: trt.ITensor) -> trt.ITensor:
        return self.net.raw_out(self.net.raw.add_elementwise(a, b, getattr(trt.ElementWiseOperation, op)))

    def read(self, raw: trt.ITensor, axis: int) -> trt.ITensor:
        """`raw.shape[axis]`, from one Shape layer per tensor."""
        shape = self.shapes.get(raw.name)
        if shape is None:
            shape = self.shapes[raw.name] = self.net.raw_out(self.net.raw.add_shape(raw))
        return self.net.raw_out(self.net.raw.add_slice(shape, (axis,), (1,), (1,)))
