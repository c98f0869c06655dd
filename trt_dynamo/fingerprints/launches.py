"""Rows of tensors on a GPU by one kernel launch. In: where their bytes lie. Out: rows, in the host's memory.

The launch goes to a stream of ours, which first waits for the point that the caller recorded on its own stream, so
that it runs beside the engine; the host waits for an event, not for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.cuda_driver import done, new_stream
from trt_dynamo.errors import in_a_line
from trt_dynamo.fingerprints import kernel
from trt_dynamo.fingerprints.host import ROW
from trt_dynamo.fingerprints.kernel import CHUNK, PLACES, THREADS
from trt_dynamo.fingerprints.spans import Run, cut, runs

# As the kernel's `Item`: address, place, bytes, row.
ITEM = struct.Struct("=QQII")
# Blocks at once: enough to fill any GPU, and few enough that an item's cost is not a block's.
BLOCKS = 1056


class SideStreams:
    """Streams of ours, by GPU. None is one of torch's pool, which the user may be capturing; none is ever destroyed."""

    def __init__(self) -> None:
        self.idle: dict[int, list[torch.cuda.Stream]] = defaultdict(list)

    def lend(self, index: int) -> torch.cuda.Stream:
        try:
            return self.idle[index].pop()
        except IndexError:
            return new_stream(index, "CU_STREAM_NON_BLOCKING")

    def give_back(self, index: int, stream: torch.cuda.Stream) -> None:
        self.idle[index].append(stream)


STREAMS = SideStreams()


def items(layout: Sequence[Sequence[Run]]) -> Iterator[bytes]:
    """The kernel's table: every tensor in pieces that know their place in it."""
    for row, pieces in enumerate(layout):
        place = 0
        for start, length in pieces:
            for offset, size in cut(length, CHUNK):
                yield ITEM.pack(start + offset, place, size, row)
                place += PLACES


class Lane:
    """What one thread needs to have its own answer under way: a stream, two events, the table, sums and rows."""

    def __init__(self, table: bytes, rows: int, index: int, function: Any) -> None:
        from cuda.bindings import driver

        self.index, self.function, self.launch = index, function, driver.cuLaunchKernel
        self.tensors: Sequence[torch.Tensor] | None = None
        # An attribute, since a module may be gone before what it made.
        self.streams = STREAMS
        self.stream = STREAMS.lend(index)
        self.handle = driver.CUstream(self.stream.cuda_stream)
        self.before, self.after = torch.cuda.Event(), torch.cuda.Event()
        self.rows = torch.zeros(rows * ROW, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.address, self.size = self.rows.data_ptr(), self.rows.nbytes
        count = len(table) // ITEM.size
        self.blocks = min(count, BLOCKS)
        # On our stream, so that the allocator gives the memory to nobody before our last launch is done.
        with torch.cuda.stream(self.stream):
            host = torch.frombuffer(bytearray(table or bytes(ITEM.size)), dtype=torch.uint8)
            self.table = host.to(f"cuda:{index}")
            self.sums = torch.zeros(2 * rows + 1, dtype=torch.int64, device=f"cuda:{index}")
        sums = self.sums.data_ptr()
        values = [
            ctypes.c_uint64(self.table.data_ptr()),
            ctypes.c_uint32(count),
            ctypes.c_uint64(sums),
            ctypes.c_uint64(sums + rows * ROW),
            ctypes.c_uint64(self.address),
            ctypes.c_uint32(2 * rows),
        ]
        self.values = values
        self.arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.where = ctypes.addressof(self.arguments)

    def record(self) -> None:
        self.before.record(torch.cuda.current_stream(self.index))

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.tensors is not None:
            self.after.synchronize()
        self.stream.wait_event(self.before)
        self.tensors = tensors
        if self.blocks:
            status = self.launch(self.function, self.blocks, 1, 1, THREADS, 1, 1, 0, self.handle, self.where, 0)
            done(status)
        self.after.record(self.stream)

    def read(self) -> bytes:
        self.after.synchronize()
        self.tensors = None
        return ctypes.string_at(self.address, self.size)

    def __del__(self) -> None:
        # The GPU may still be writing the rows, if a call broke off before it read them.
        if getattr(self, "tensors", None) is not None:
            self.after.synchronize()
        if hasattr(self, "stream"):
            self.streams.give_back(self.index, self.stream)


class KernelRows:
    """Rows of tensors on one GPU; each thread that asks gets a lane of its own."""

    def __init__(self, layout: Sequence[Sequence[Run]], device: torch.device, function: Any) -> None:
        self.index: int = device.index
        self.table = b"".join(items(layout))
        self.count = len(layout)
        self.function = function
        self.local = threading.local()

    def lane(self) -> Lane:
        try:
            lane: Lane = self.local.lane
        except AttributeError:
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
                lane = self.local.lane = Lane(self.table, self.count, self.index, self.function)
        return lane

    def record(self) -> None:
        self.lane().record()

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        lane = self.lane()
        if torch._C._cuda_getDevice() == self.index:
            lane.start(tensors)
        else:
            with torch.cuda.device(self.index):
                lane.start(tensors)

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        return self.lane().read()


@functools.cache
def function_on(index: int) -> Any | None:
    """The kernel, loaded on this GPU and tried once, or None, said once, where torch's operations must do."""
    function = kernel.load(index)
    if function is None:
        return None
    try:
        if counts_right(index, function):
            return function
        why = "it counts wrongly on this GPU"
    except RuntimeError as error:
        why = in_a_line(error)
    kernel.say_without(why)
    return None


def counts_right(index: int, function: Any) -> bool:
    """Whether a change shows in the row of the tensor changed, and goes when it is taken back."""
    tensors = [torch.arange(CHUNK // 4 + 5, dtype=torch.int32, device=f"cuda:{index}") for _ in range(2)]
    rows = KernelRows([runs(each) for each in tensors], torch.device("cuda", index), function)

    def now() -> bytes:
        rows.record()
        rows.start(tensors)
        return rows.read(tensors)

    before = now()
    tensors[1][-1] ^= 1
    changed = now()
    tensors[1][-1] ^= 1
    return before[:ROW] == before[ROW:] == changed[:ROW] != changed[ROW:] and now() == before
