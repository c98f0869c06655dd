"""Results whose size an engine finds when it runs: memory from torch's caching allocator, through `IOutputAllocator`.

TensorRT asks for the memory while it enqueues, and tells the shape before that is over. It must read the size off the
device for that: an engine with such a result makes the host wait, all others do not.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import torch

from trt_dynamo.errors import EngineError
from trt_dynamo.trt import trt

# Memory that is more than so many times (and bytes) larger than its result goes back at once, for a copy of the result.
SLACK = 2
SLACK_BYTES = 2**20


class FoundResult(Protocol):
    """One result of one execution context. `start` goes before each enqueue, `take` after it."""

    def start(self, stream: torch.cuda.Stream | None) -> None:
        """Forgets the result before. `stream` is the one that the engine runs on, None for the current one."""

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """The result, of the shape that the engine found; nobody else holds its memory."""


def found_result(name: str, device: torch.device) -> FoundResult:
    """The memory of the result `name`: also the `IOutputAllocator` for it, which the context does not keep alive."""

    class Found(trt.IOutputAllocator):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.stream: torch.cuda.Stream | None = None
            self.memory: torch.Tensor | None = None
            self.shape: tuple[int, ...] | None = None

        def start(self, stream: torch.cuda.Stream | None) -> None:
            self.stream, self.memory, self.shape = stream, None, None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.allocate(size, alignment)

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.allocate(size, alignment)

        def allocate(self, size: int, alignment: int) -> int:
            """The address of so many bytes, which belong to the stream that writes them; 0 if there are none."""
            try:
                with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
                    self.memory = aligned(max(size, 1), max(alignment, 1), device)
            except torch.OutOfMemoryError:
                return 0
            return self.memory.data_ptr()

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def take(self, dtype: torch.dtype) -> torch.Tensor:
            memory, shape = self.memory, self.shape
            self.memory = None
            if memory is None or shape is None:
                raise EngineError(f"TensorRT told neither memory nor shape of {name}, whose size depends on data")
            size = math.prod(shape) * dtype.itemsize
            if size > memory.numel():
                raise EngineError(f"TensorRT made {name} of shape {shape} in memory of {memory.numel()} bytes")
            result = torch.empty(0, dtype=dtype, device=device)
            result.set_(memory.untyped_storage(), memory.storage_offset() // dtype.itemsize, shape)  # type: ignore[call-overload]
            if self.stream is not None:
                result.record_stream(torch.cuda.current_stream(device))
            return result.clone() if memory.numel() > SLACK * size + SLACK_BYTES else result

    found: FoundResult = Found()
    return found


def aligned(size: int, alignment: int, device: torch.device) -> torch.Tensor:
    """So many bytes, which begin at a multiple of `alignment`."""
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    if memory.data_ptr() % alignment == 0:
        return memory
    memory = torch.empty(size + alignment, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % alignment
    return memory[start : start + size]
