"""The layers of `Network` that move elements without computing: reshape, permute, expand, slice, cat, gather."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trt_dynamo.aten_converters.shapes import is_static, product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import has, trt

if TYPE_CHECKING:
    from trt_dynamo.aten_converters.network import Tensor
    from trt_dynamo.aten_converters.shapes import ShapeArithmetic


class Arrangement:
    """See `Network`, which this is a part of."""

    raw: trt.INetworkDefinition
    sizes: ShapeArithmetic

    if TYPE_CHECKING:

        def out(self, layer: Any, index: int = 0, *, shape: Any = None, dtype: Any = None) -> Tensor: ...
        def constant(self, value: Any, dtype: Any = None, *, name: str | None = None) -> Tensor: ...

    def reshape(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """`x.reshape(dims)`; `dims` are ints and expressions, without a -1."""
        dims = tuple(dims)
        if dims == x.shape:
            return x
        layer = self.raw.add_shuffle(x.raw)
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
        if len(inferred) <= 1 and 0 not in dims and 0 not in x.shape:
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
        layer = self.raw.add_shuffle(x.raw)
        layer.first_transpose = trt.Permutation(order)
        out = self.out(layer, shape=[x.shape[axis] for axis in order], dtype=x.dtype)
        swaps_last_two = x.ndim >= 2 and order == [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
        return dataclasses.replace(out, transposed=x if swaps_last_two else None)

    def expand(self, x: Tensor, dims: Sequence[Dim]) -> Tensor:
        """`x` broadcast to `dims`, which are complete (no -1)."""
        dims = tuple(dims)
        x = self.unsqueeze_to(x, len(dims))
        if dims == x.shape:
            return x
        stretched = [have == 1 and want != 1 for have, want in zip(x.shape, dims, strict=True)]
        strides = [0 if stretch else 1 for stretch in stretched]
        return self.slice(x, [0] * len(dims), dims, strides)

    def slice(
        self, x: Tensor, start: Sequence[Dim], size: Sequence[Dim], stride: Sequence[int], mode: str = "STRICT_BOUNDS", fill: Tensor | None = None
    ) -> Tensor:
        """An `ISliceLayer`: `size[i]` elements from `start[i]` on, every `stride[i]`-th. `mode` is a name of `SampleMode`."""
        ones = [s if isinstance(s, int) else 1 for s in start], [s if isinstance(s, int) else 1 for s in size]
        layer = self.raw.add_slice(x.raw, ones[0], ones[1], list(stride))
        if not is_static(start):
            layer.set_input(1, self.sizes.vector(start))
        if not is_static(size):
            layer.set_input(2, self.sizes.vector(size))
        if mode != "STRICT_BOUNDS":
            layer.mode = getattr(trt.SampleMode, mode)
        if fill is not None:
            layer.set_input(4, fill.raw)
        return self.out(layer, shape=tuple(size), dtype=x.dtype)

    def narrow(self, x: Tensor, axis: int, start: Dim, size: Dim, stride: int = 1) -> Tensor:
        """`size` elements of one dim from `start` on, every `stride`-th."""
        starts: list[Dim] = [0] * x.ndim
        sizes, strides = list(x.shape), [1] * x.ndim
        starts[axis], sizes[axis], strides[axis] = start, size, stride
        return self.slice(x, starts, sizes, strides)

    def cat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors of one dtype and rank, joined along `axis`."""
        if len(xs) == 1:
            return xs[0]
        total: Dim = 0
        for x in xs:
            total = total + x.shape[axis]
        layer = self.raw.add_concatenation([x.raw for x in xs])
        layer.axis = axis
        shape = [*xs[0].shape[:axis], total, *xs[0].shape[axis + 1 :]]
        return self.out(layer, shape=shape, dtype=xs[0].dtype)

    def gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """`x` at whole indices (0 or more) along `axis`: torch's `index_select` for indices of any rank."""
        shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
        return self.out(self.raw.add_gather(x.raw, indices.raw, axis), shape=shape, dtype=x.dtype)

    def broadcast(self, a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
        """The shape that two shapes broadcast to. A symbol is never 1 by chance: Dynamo gives 1 a graph of its own."""
        rank = max(len(a), len(b))
        left, right = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
        return tuple(self.broadcast_dim(m, n) for m, n in zip(left, right, strict=True))

    @staticmethod
    def broadcast_dim(m: Dim, n: Dim) -> Dim:
        if m == n or n == 1:
            return m
        if m == 1 or isinstance(n, int):
            return n
        return m

    def volume(self, x: Tensor) -> Dim:
        return product(x.shape)

    def static_shape(self, x: Tensor, what: str = "shape") -> tuple[int, ...]:
        """The shape as ints.

        Raises:
            Unsupported: a dim is symbolic.
        """
        if not is_static(x.shape):
            raise Unsupported(f"a symbolic {what}")
        return tuple(int(d) for d in x.shape)
