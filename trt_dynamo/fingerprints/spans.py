"""Where the elements of a tensor lie. In: a tensor of any strides. Out: runs of bytes, in the order of its strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trt_dynamo.errors import Unsupported

# An address and a number of bytes.
Run = tuple[int, int]

# A tensor in more pieces is read as one, with its gaps: a write to a gap is then a false alarm.
MOST_RUNS = 4096


def runs(tensor: torch.Tensor) -> list[Run]:
    """The memory that holds the tensor's elements; an expanded one's only once. Nothing of it for an empty one.

    Raises:
        Unsupported: there is no such memory.
    """
    if isinstance(tensor, FakeTensor) or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        raise Unsupported(f"a {type(tensor).__name__} on {tensor.device} has no bytes to make a fingerprint of")
    if tensor.layout != torch.strided:
        raise Unsupported(f"a tensor of layout {tensor.layout} cannot have a fingerprint")
    if not tensor.numel():
        return []
    if not tensor.untyped_storage().nbytes():
        raise Unsupported("a tensor whose memory was given back (sharded, offloaded) cannot have a fingerprint")
    start = address(tensor)
    if tensor.is_contiguous():
        return [(start, tensor.nbytes)]
    width = tensor.element_size()
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    dims = sorted((stride * width, size) for stride, size in steps if size > 1 and stride)
    length = width
    while dims and dims[0][0] == length:
        length *= dims.pop(0)[1]
    if math.prod(size for _, size in dims) > MOST_RUNS:
        return [(start, length + sum(stride * (size - 1) for stride, size in dims))]
    offsets = itertools.product(*(range(0, stride * size, stride) for stride, size in reversed(dims)))
    return [(start + sum(each), length) for each in offsets]


def address(tensor: torch.Tensor) -> int:
    """Of its first element. `data_ptr` would copy a tensor that is copy-on-write; this is the address for reading."""
    storage: int = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return storage + int(tensor.storage_offset()) * tensor.element_size()


def cut(length: int, most: int) -> Sequence[tuple[int, int]]:
    """Offsets and sizes of the pieces of at most `most` that make up `length`."""
    return [(first, min(most, length - first)) for first in range(0, length, most)]
