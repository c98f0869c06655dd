"""Raw addresses as torch tensors. In: an address, a shape, a dtype, a device. Out: a tensor over that memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError

CUDA_ALIGNMENT = 256  # what TensorRT asks of every address on the device
CPU_ALIGNMENT = 64  # what torch's CPU allocator gives


class CudaMemory:
    """Bytes on a GPU, as torch takes them over without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The dense row-major tensor at `address`, which must stay allocated as long as the tensor is used."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cuda":
        flat = torch.as_tensor(CudaMemory(address, size), device=device)
    else:
        flat = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return flat.view(dtype).reshape(tuple(shape))


def check_alignment(what: str, address: int, device: torch.device, itemsize: int, host: bool) -> None:
    """Refuses an address that is not aligned as TensorRT asks: 256 bytes on a GPU. On the CPU the stand-in asks for 64,
    and of tensors that TensorRT too reads on the CPU, for whole elements.
    """
    wanted = itemsize if host else CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
    if address % wanted:
        raise EngineError(f"the address of {what} is {address:#x}, not aligned to {wanted} bytes")


def check_side(what: str, address: int, device: torch.device, host: bool) -> None:
    """Refuses a host address for a tensor on the device, and the reverse."""
    if device.type != "cuda":
        return
    from cuda.bindings import runtime

    error, attributes = runtime.cudaPointerGetAttributes(address)
    if error != runtime.cudaError_t.cudaSuccess:
        raise EngineError(f"the address of {what}, {address:#x}, is unknown to CUDA: {error.name}")
    kind = attributes.type
    on_device = kind in (runtime.cudaMemoryType.cudaMemoryTypeDevice, runtime.cudaMemoryType.cudaMemoryTypeManaged)
    if host and kind == runtime.cudaMemoryType.cudaMemoryTypeDevice:
        raise EngineError(f"{what} must be on the host, and {address:#x} is on a GPU")
    if not host and not on_device:
        raise EngineError(f"{what} must be on the GPU, and {address:#x} is on the host")


@contextlib.contextmanager
def on_stream(device: torch.device, handle: int) -> Iterator[None]:
    """Work inside goes to this stream of the device; on the CPU the handle must be 0."""
    if device.type != "cuda":
        if handle:
            raise EngineError(f"the engine runs on the CPU, and is given the stream {handle:#x}")
        yield
        return
    stream = torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        yield
