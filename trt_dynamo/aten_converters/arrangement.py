"""The layers of `Network` that move elements without computing: reshape, permute, expand, slice, cat, gather."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.value_ranges import bound_sympy

from trt_dynamo.aten_converters.shapes import is_static
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import LARGEST, Dim, Range, dim_of, dim_range, finite, range_of, shape_env_of
from trt_dynamo.trt import has, to_trt, trt

if TYPE_CHECKING:
    from trt_dynamo.aten_converters.shapes import ShapeArithmetic
    from trt_dynamo.aten_converters.tensor import Tensor


L = TypeVar("L")


class Arrangement:
    """See `Network`, which this is a part of."""

    raw: trt.INetworkDefinition
    sizes: ShapeArithmetic
    ranges: Mapping[sympy.Symbol, Range]
    expected: tuple[Any, ...]
    node: Node | None

    def result_shape(self, index: int = 0) -> tuple[Dim, ...]:
        """The shape that FX states for a result of the node under conversion."""
        return tuple(dim_of(d) for d in self.expected[index].shape)

    def seen(self, dim: Dim) -> int:
        """What `dim` was while tracing: torch's guards make every comparison of sizes come out as it did then."""
        if isinstance(dim, int):
            return dim
        known = self.shape_env().backed_var_to_val
        found = dim.xreplace({s: sympy.Integer(known[s]) for s in dim.free_symbols if s in known})
        if not found.is_number:
            raise Unsupported(f"the size {dim} depends on data")
        return int(found)

    def was_one(self, dim: Dim) -> bool:
        """Whether `dim` was 1 while tracing. A symbol never is, but what is computed of symbols may be: `s // 4`."""
        if isinstance(dim, int) or self.shape_env() is None:
            return dim == 1
        return self.backed(dim) and self.seen(dim) == 1

    def guessed(self, dim: Dim) -> int:
        """What `dim` was while tracing; where it depends on data, the largest that it can be in this engine."""
        depends_on_data = isinstance(dim, sympy.Expr) and not self.backed(dim)
        return self.most(dim) if depends_on_data else self.seen(dim)

    def less(self, a: Dim, b: Dim) -> bool | None:
        """Whether `a` is less than `b`, which is the same at every call; None where it depends on data."""
        gap = a - b
        gap = dim_of(gap) if isinstance(gap, sympy.Expr) else gap
        if isinstance(gap, int) or self.backed(gap):
            return self.seen(a) < self.seen(b)
        known = self.shape_env().var_to_range
        bounds = bound_sympy(gap, {s: known[s] for s in gap.free_symbols if s in known})
        if bounds.upper < 0:
            return True
        return False if bounds.lower >= 0 else None

    def may_be_empty(self, dim: Dim) -> bool:
        """Whether a symbolic size can be 0: torch gives a size of 0 that it sees a graph of its own."""
        return isinstance(dim, sympy.Expr) and self.shape_env() is not None and not self.backed(dim)

    def refuse_empty(self, x: Tensor, axes: Sequence[int]) -> None:
        """Raises `Unsupported` for a choice along dims that may turn out empty, where torch raises an error."""
        if any(self.may_be_empty(x.shape[axis]) and not self.less(0, x.shape[axis]) for axis in axes):
            raise Unsupported("a choice among elements whose number depends on data, perhaps none")

    def backed(self, dim: sympy.Expr) -> bool:
        """Whether torch had a number for each of its symbols while tracing."""
        return bool(dim.free_symbols <= self.shape_env().backed_var_to_val.keys())

    def most(self, dim: Dim) -> int:
        """The largest that `dim` can be in this engine."""
        if isinstance(dim, int):
            return dim
        env = self.shape_env()
        ranges = {symbol: self.ranges.get(symbol) or range_of(symbol, env) for symbol in dim.free_symbols}
        return dim_range(dim, ranges).max

    def largest(self, dim: Dim) -> int:
        """The largest that `dim` can ever be: what torch knows of it, and at most what TensorRT can hold."""
        if isinstance(dim, int):
            return dim
        ranges = self.shape_env().var_to_range
        upper = bound_sympy(dim, {s: ranges[s] for s in dim.free_symbols if s in ranges}).upper
        return min(finite(upper, LARGEST), LARGEST)

    def shape_env(self) -> Any:
        """The ShapeEnv behind the symbols of the node under conversion."""
        assert self.node is not None
        values = [n.meta.get("val") for n in (self.node, *self.node.all_input_nodes)]
        return shape_env_of([v for value in values for v in (value if isinstance(value, list | tuple) else (value,))])

    def result_dtype(self, index: int = 0) -> torch.dtype:
        dtype: torch.dtype = self.expected[index].dtype
        return dtype

    if TYPE_CHECKING:

        def made(self, layer: L | None) -> L: ...
        def out(self, layer: Any, index: int = 0, *, shape: Any = None, dtype: Any = None) -> Tensor: ...
        def constant(self, value: Any, dtype: Any = None, *, name: str | None = None) -> Tensor: ...
        def operand(self, x: Any, dtype: torch.dtype, rank: int = 0) -> Tensor: ...

    def reshape(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """`x.reshape(dims)`; `dims` are ints and expressions, without a -1."""
        dims = tuple(dims)
        if dims == x.shape:
            return x
        layer = self.made(self.raw.add_shuffle(x.raw))
        layer.zero_is_placeholder = False
        if is_static(dims):
            layer.reshape_dims = dims
        else:
            self.reshape_to_symbols(layer, x, dims)
        value = x.value.reshape(dims) if x.value is not None and is_static(dims) else None
        return dataclasses.replace(self.out(layer, shape=dims, dtype=x.dtype), value=value)

    def reshape_to_symbols(self, layer: trt.IShuffleLayer, x: Tensor, dims: Sequence[Dim]) -> None:
        """Copied dims are 0 and one dim is -1 where that says it all: no arithmetic then."""
        copied = [i < x.ndim and d == x.shape[i] and not isinstance(d, int) for i, d in enumerate(dims)]
        inferred = [i for i, d in enumerate(dims) if not isinstance(d, int) and not copied[i]]
        # Beside a dim of size 0, any size would do for the -1.
        clear = not inferred or not any(self.may_be_empty(d) for d in dims)
        if len(inferred) <= 1 and clear and 0 not in dims and 0 not in x.shape:
            layer.zero_is_placeholder = True
            layer.reshape_dims = tuple(0 if copied[i] else -1 if i in inferred else d for i, d in enumerate(dims))
        else:
            layer.set_input(1, self.sizes.vector(dims))

    def unsqueeze_to(self, x: Tensor, rank: int) -> Tensor:
        """`x` with leading 1s up to the rank."""
        return self.unsqueeze(x, range(rank - x.ndim)) if x.ndim < rank else x

    def unsqueeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """`x` with a 1 at each of `axes`, which count in the result."""
        rank = x.ndim + len(axes)
        inner = iter(x.shape)
        dims: list[Dim] = [1 if axis in axes else next(inner) for axis in range(rank)]
        if is_static(dims) or len([d for d in dims if not isinstance(d, int)]) == 1 or not has("add_unsqueeze"):
            return self.reshape(x, dims)
        positions = self.constant(torch.tensor(list(axes), dtype=torch.int64))
        return self.out(self.raw.add_unsqueeze(x.raw, positions.raw), shape=dims, dtype=x.dtype)

    def squeeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """`x` without the dims at `axes`, each of size 1."""
        dims = [d for axis, d in enumerate(x.shape) if axis not in axes]
        if not axes:
            return x
        if is_static(dims) or len([d for d in dims if not isinstance(d, int)]) == 1 or not has("add_squeeze"):
            return self.reshape(x, dims)
        positions = self.constant(torch.tensor(list(axes), dtype=torch.int64))
        return self.out(self.raw.add_squeeze(x.raw, positions.raw), shape=dims, dtype=x.dtype)

    def permute(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """`x.permute(order)`."""
        order = [axis % x.ndim for axis in order]
        if order == list(range(x.ndim)):
            return x
        dims = [x.shape[axis] for axis in order]
        if self.moves_nothing(x, order):
            out = self.reshape(x, dims)
        else:
            layer = self.made(self.raw.add_shuffle(x.raw))
            layer.first_transpose = trt.Permutation(order)
            out = self.out(layer, shape=dims, dtype=x.dtype)
        swaps_last_two = x.ndim >= 2 and order == [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
        return dataclasses.replace(out, transposed=x if swaps_last_two else None)

    @staticmethod
    def moves_nothing(x: Tensor, order: Sequence[int]) -> bool:
        """Whether only dims of size 1 change places, so that a reshape without arithmetic does it. A row of such
        permutations (MaxViT's windows) ends RTX 1.7's builder in a failed check on strides of its own.
        """
        kept = [axis for axis in order if x.shape[axis] != 1]
        symbols = [dim for dim in x.shape if not isinstance(dim, int)]
        return kept == sorted(kept) and len(symbols) <= 1

    def expand(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """`x` broadcast to `dims`, which are complete (no -1)."""
        dims = tuple(dims)
        x = self.unsqueeze_to(x, len(dims))
        if dims == x.shape:
            return x
        stretched = [
            want != 1 and (have == 1 or self.stretches(have, want)) for have, want in zip(x.shape, dims, strict=True)
        ]
        strides = [0 if stretch else 1 for stretch in stretched]
        return self.slice(x, [0] * len(dims), dims, strides)

    def slice(
        self,
        x: Tensor,
        start: Sequence[Dim],
        size: Sequence[Dim],
        stride: Sequence[Dim],
        mode: str = "STRICT_BOUNDS",
        fill: Tensor | None = None,
    ) -> Tensor:
        """An `ISliceLayer`: `size[i]` elements from `start[i]` on, `stride[i]` apart. `mode`: a `SampleMode`'s name."""
        shape = tuple(size)
        axes = [i for i in range(x.ndim) if start[i] != 0 or size[i] != x.shape[i] or (stride[i] != 1 and size[i] != 1)]
        if not axes:
            return x
        # The layer is told of the cut dims only, so that a symbolic one that stays whole costs no arithmetic.
        chosen = range(x.ndim) if is_static(shape) and is_static(x.shape) else axes
        roles = [[dims[i] for i in chosen] for dims in (start, size, stride)]
        layer = self.raw.add_slice(x.raw, *([d if isinstance(d, int) else 1 for d in role] for role in roles))
        if layer is None:
            raise Unsupported("TensorRT refused the slice")
        if len(chosen) < x.ndim:
            layer.axes = list(chosen)
        for index, role in enumerate(roles, 1):
            if not is_static(role):
                layer.set_input(index, self.sizes.vector(role))
        if mode != "STRICT_BOUNDS":
            layer.mode = getattr(trt.SampleMode, mode)
        if fill is not None:
            layer.set_input(4, fill.raw)
        return self.out(layer, shape=shape, dtype=x.dtype)

    def narrow(self, x: Tensor, axis: int, start: Dim, size: Dim, stride: Dim = 1) -> Tensor:
        """`size` elements of one dim from `start` on, every `stride`-th."""
        starts: list[Dim] = [0] * x.ndim
        strides: list[Dim] = [1] * x.ndim
        sizes = list(x.shape)
        starts[axis], sizes[axis], strides[axis] = start, size, stride
        return self.slice(x, starts, sizes, strides)

    def full(self, shape: Sequence[Dim], value: Any, dtype: torch.dtype) -> Tensor:
        """A tensor of one value, which may be a size."""
        one = self.reshape(self.operand(value, dtype, len(shape)), (1,) * len(shape))
        return self.expand(one, shape)

    def linspace(
        self, shape: Sequence[Dim], start: Dim, steps: Sequence[Dim], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """A tensor whose element at `index` is `start + sum(steps[d] * index[d])`; of float32, int32 or int64."""
        if not shape:
            return self.operand(start, dtype)
        layer = self.raw.add_fill(tuple(shape) if is_static(shape) else (1,), trt.FillOperation.LINSPACE, to_trt(dtype))
        if layer is None:
            raise Unsupported("TensorRT refused the fill")
        if not is_static(shape):
            layer.set_input(0, self.sizes.vector(shape))
        layer.set_input(1, self.operand(start, dtype).raw)
        layer.set_input(2, self.numbers(steps, dtype).raw)
        return self.out(layer, shape=tuple(shape), dtype=dtype)

    def numbers(self, values: Sequence[Dim | float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Python numbers and sizes as a 1-D tensor."""
        if not any(isinstance(value, sympy.Expr) for value in values):
            return self.constant(torch.tensor(values, dtype=dtype))
        return self.cat([self.reshape(self.operand(value, dtype), (1,)) for value in values], 0)

    def cat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors of one dtype and rank, joined along `axis`."""
        if len(xs) == 1:
            return xs[0]
        total: Dim = 0
        for x in xs:
            total = total + x.shape[axis]
        layer = self.made(self.raw.add_concatenation([x.raw for x in xs]))
        layer.axis = axis
        shape = [*xs[0].shape[:axis], total, *xs[0].shape[axis + 1 :]]
        return self.out(layer, shape=shape, dtype=xs[0].dtype)

    def gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """`x` at whole indices (0 or more) along `axis`: torch's `index_select` for indices of any rank."""
        shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
        return self.out(self.raw.add_gather(x.raw, indices.raw, axis), shape=shape, dtype=x.dtype)

    def gather_elements(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """torch's `gather`: one index for each element of the result; the other dims are equal."""
        layer = self.raw.add_gather_v2(x.raw, indices.raw, trt.GatherMode.ELEMENT)
        if layer is not None:
            layer.axis = axis
        return self.out(layer, shape=indices.shape, dtype=x.dtype)

    def gather_nd(self, x: Tensor, rows: Tensor) -> Tensor:
        """What `x` holds at each row of places, which go into its first dims."""
        depth = int(rows.shape[-1])
        layer = self.raw.add_gather_v2(x.raw, rows.raw, trt.GatherMode.ND)
        return self.out(layer, shape=(*rows.shape[:-1], *x.shape[depth:]), dtype=x.dtype)

    def scatter(self, x: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
        """`x` with `updates` written at `indices` along `axis`: torch's `scatter`, no place twice."""
        layer = self.raw.add_scatter(x.raw, indices.raw, updates.raw, trt.ScatterMode.ELEMENT)
        if layer is not None:
            layer.axis = axis
        return self.out(layer, shape=x.shape, dtype=x.dtype)

    def scatter_nd(self, x: Tensor, rows: Tensor, updates: Tensor) -> Tensor:
        """`x` with `updates` written at rows of places, no place twice."""
        layer = self.raw.add_scatter(x.raw, rows.raw, updates.raw, trt.ScatterMode.ND)
        return self.out(layer, shape=x.shape, dtype=x.dtype)

    def running_sum(self, x: Tensor, axis: int) -> Tensor:
        """The sum of the elements up to each, along `axis`."""
        if x.shape[axis] == 1:
            return x
        if not has("add_cumulative"):
            raise Unsupported("running sums: this TensorRT has no such layer")
        place = self.constant(torch.tensor(axis))
        layer = self.raw.add_cumulative(x.raw, place.raw, trt.CumulativeOperation.SUM, False, False)
        return self.out(layer, shape=x.shape, dtype=x.dtype)

    def broadcast(self, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
        """The shape that two shapes broadcast to. A symbol is never 1 by chance: Dynamo gives 1 a graph of its own."""
        rank = max(len(a), len(b))
        left, right = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
        return tuple(self.broadcast_dim(m, n) for m, n in zip(left, right, strict=True))

    def broadcast_dim(self, m: Dim, n: Dim) -> Dim:
        if m == n or n == 1:
            return m
        if m == 1 or isinstance(n, int) or self.stretches(m, n):
            return n
        return m

    def stretches(self, have: Dim, want: Dim) -> bool:
        """Whether a size is 1 at every call, by torch's guard on it, where the other was not even while tracing."""
        return have != want and self.was_one(have) and not self.was_one(want)

    def static_shape(self, x: Tensor, what: str = "shape") -> tuple[int, ...]:
        """The shape as ints.

        Raises:
            Unsupported: a dim is symbolic.
        """
        if not is_static(x.shape):
            raise Unsupported(f"a symbolic {what}")
        return tuple(int(d) for d in x.shape)
