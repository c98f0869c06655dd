"""The arguments of an exported model. In: what the user calls it with. Out: the flat list that its graph takes, or the
reason why the export does not allow it.

Dynamo's guards would send other sizes to another graph; an export has one graph, and what it took for granted of its
inputs must be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.export._tree_utils import reorder_kwargs
from torch.fx import Node
from torch.utils._sympy.value_ranges import ValueRanges

from trt_dynamo.aten_converters.layout import memory_order
from trt_dynamo.profiles import Dim, dim_of, solved

# So many combinations of shapes are remembered as good.
REMEMBERED = 1000

Moved = list[tuple[torch.Tensor, torch.Tensor]]


class Inputs:
    """What a graph takes: `placeholders` of its inputs, the structure of its arguments, and the ranges of its sizes."""

    def __init__(
        self, placeholders: Sequence[Node], spec: pytree.TreeSpec, ranges: Mapping[sympy.Symbol, ValueRanges[Any]]
    ) -> None:
        self.names = [str(node.target) for node in placeholders]
        self.values = [node.meta.get("val") for node in placeholders]
        self.spec = spec
        self.ranges = ranges
        self.orders = [memory_order(v) if isinstance(v, torch.Tensor) else None for v in self.values]
        self.good: set[Any] = set()

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments as the graph takes them.

        Raises:
            TypeError: they have another structure, kind or dtype.
            ValueError: a size or a number that the export does not allow.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self.spec:
            leaves = self.reordered(args, kwargs)
        key = tuple([(type(v), v) if not isinstance(v, torch.Tensor) else (v.shape, v.dtype, v.device) for v in leaves])
        try:
            if key in self.good:
                return leaves
        except TypeError:  # an argument that cannot be hashed
            pass
        else:
            self.check(leaves)
            if len(self.good) < REMEMBERED:
                self.good.add(key)
            return leaves
        self.check(leaves)
        return leaves

    def reordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The same with the keywords in the example's order."""
        try:
            ordered = reorder_kwargs(dict(kwargs), self.spec)
        except ValueError as error:
            raise TypeError(f"the model was exported with other arguments: {error}") from None
        leaves, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != self.spec:
            raise TypeError(
                f"the model was exported with arguments of another structure: {self.spec}, and was called with {spec}"
            )
        return leaves

    def check(self, leaves: Sequence[Any]) -> None:
        """Compares each argument with what the graph was made for."""
        sizes: dict[sympy.Symbol, int] = {}
        later: list[tuple[str, sympy.Expr, int]] = []
        for name, value, given in zip(self.names, self.values, leaves, strict=True):
            for where, dim, number in self.dims(name, value, given):
                if isinstance(dim, int):
                    if dim != number:
                        raise ValueError(f"{where} is {number}; the model was exported for {dim}")
                    continue
                known = solved(dim, number)
                if known is not None:
                    sizes.setdefault(*known)
                later.append((where, dim, number))
        for where, dim, number in later:
            if set(dim.free_symbols) <= sizes.keys():
                stated = dim.xreplace({s: sympy.Integer(sizes[s]) for s in dim.free_symbols})
                if stated != number:
                    raise ValueError(f"{where} is {number}; by the other inputs and {dim} it must be {stated}")
            self.check_range(where, dim, number)

    def check_range(self, where: str, dim: sympy.Expr, number: int) -> None:
        known = solved(dim, number)
        span = self.ranges.get(known[0]) if known is not None else None
        if known is not None and span is not None and not span.lower <= known[1] <= span.upper:
            told = f"{span.lower} to {span.upper}" + (f" (of {known[0]} in {dim})" if dim != known[0] else "")
            raise ValueError(f"{where} is {number}; the model was exported for {told}")

    def dims(self, name: str, value: Any, given: Any) -> list[tuple[str, Dim, int]]:
        """The sizes of an argument beside what the graph says of them."""
        if isinstance(value, torch.Tensor):
            if not isinstance(given, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(given).__name__}")
            for what in ("dtype", "device", "ndim"):
                if getattr(given, what) != getattr(value, what):
                    wanted, got = getattr(value, what), getattr(given, what)
                    raise TypeError(f"{name} has {what} {got}; the model was exported for {wanted}")
            pairs = enumerate(zip(value.shape, given.shape, strict=True))
            return [(f"dim {axis} of {name}", dim_of(size), int(number)) for axis, (size, number) in pairs]
        if isinstance(value, torch.SymInt):
            if not isinstance(given, int) or isinstance(given, bool):
                raise TypeError(f"{name} must be an int, not {type(given).__name__}")
            return [(name, dim_of(value), given)]
        if isinstance(value, torch.SymFloat):
            return []
        if type(given) is not type(value) or given != value:
            raise ValueError(f"{name} is {given!r}; the model was exported for {value!r}")
        return []

    def laid_out(self, leaves: Sequence[Any]) -> tuple[list[Any], Moved]:
        """The arguments in the memory order of the example, which the graph's views rely on; and each that was copied
        for that, with its copy, since the graph may write to it.
        """
        laid, moved = list(leaves), []
        for position, (order, value) in enumerate(zip(self.orders, leaves, strict=True)):
            if order is None or is_in_order(value, order):
                continue
            back = [order.index(axis) for axis in range(len(order))]
            laid[position] = value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
            moved.append((value, laid[position]))
        return laid, moved


def is_in_order(value: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether the tensor is dense, its dims in this order."""
    expected = 1
    for axis in reversed(order):
        size = value.shape[axis]
        if size != 1 and value.stride(axis) != expected:
            return value.numel() == 0
        expected *= size
    return True
