"""The inputs and outputs of an engine, as its manifest states them.

Comes in: manifest entries, and a segment's arguments. Goes out: tensors that TensorRT can read where they lie.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Shape = tuple[int, ...]
Span = tuple[Shape, Shape]  # the smallest and largest shape in a profile

# TensorRT wants addresses aligned to this; torch's own CUDA allocations are, views into them may not be.
CUDA_ALIGNMENT = 256
CPU_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output: the engine sees `tensor.permute(order)`, dense and row-major. A `size` is a Python int,
    which the engine reads on the host.
    """

    name: str
    position: int
    dtype: torch.dtype
    order: Shape
    inverse: Shape
    permuted: bool
    size: bool

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Port:
        order = tuple(entry["order"])
        return cls(
            name=entry["name"],
            position=entry["position"],
            dtype=getattr(torch, entry["dtype"]),
            order=order,
            inverse=tuple(order.index(axis) for axis in range(len(order))),
            permuted=order != tuple(range(len(order))),
            size=entry["size"],
        )

    def shape(self, value: Any) -> Shape:
        """The shape of an argument as the engine sees it; of a size, its value."""
        if self.size:
            return (int(value),)
        return tuple(value.shape[axis] for axis in self.order) if isinstance(value, torch.Tensor) else ()

    def always_copied(self, value: torch.Tensor, device: torch.device) -> bool:
        """Whether such a tensor can never be read where it lies, whatever its strides and its address. The same for all
        calls of a compiled graph.
        """
        return self.permuted or value.device != device or value.is_neg()

    def dense(self, value: Any, device: torch.device, alignment: int) -> torch.Tensor:
        """The argument as memory that TensorRT can read: dense, row-major in the port's order, aligned, on the
        device. Its own memory, where that is so.
        """
        if isinstance(value, int):  # a size that the engine computes with
            return torch.full((), value, dtype=torch.int64, device=device)
        tensor: torch.Tensor = value.permute(self.order) if self.permuted else value
        tensor = tensor.to(device).resolve_neg().contiguous()
        return tensor.clone(memory_format=torch.contiguous_format) if tensor.data_ptr() % alignment else tensor


def dense_strides(shape: Sequence[int]) -> Shape:
    """The strides of a dense, row-major tensor, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def within(shape: Sequence[int], span: Span) -> bool:
    """Whether a shape lies between the smallest and the largest."""
    smallest, largest = span
    return len(shape) == len(smallest) and all(
        low <= n <= high for n, low, high in zip(shape, smallest, largest, strict=True)
    )


def width(spans: Iterable[Span]) -> float:
    """How wide the ranges are: the larger, the more different shapes lie within them."""
    return sum(math.log2(high - low + 1) for span in spans for low, high in zip(*span, strict=True))


def items_at(positions: Sequence[int]) -> Callable[[Any], tuple[Any, ...]]:
    """Takes the arguments at these positions, in half the time of a comprehension."""
    if len(positions) == 1:
        return lambda items, only=positions[0]: (items[only],)  # type: ignore[misc]
    return operator.itemgetter(*positions) if positions else lambda _: ()
