"""The streams that engines run on.

Comes in: the stream of the caller, by its handle. Goes out: the stream for TensorRT: the same, but for the default
stream, on which TensorRT would make the host wait.
"""

from __future__ import annotations

import functools

import torch


def torch_stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    """A stream as torch knows it."""
    return torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)


@functools.cache
def beside_default(index: int) -> torch.cuda.Stream:
    """A stream of ours on a GPU, never destroyed, that CUDA itself keeps in turns with the default stream: what is
    enqueued on either comes after all that was enqueued on the other before. That costs the host nothing, where two
    events cost four calls.
    """
    from cuda.bindings import driver

    with torch.cuda.device(index):
        torch.cuda.Event().record(torch.cuda.current_stream(index))  # makes CUDA's context current, for the driver
        status, handle = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_DEFAULT)
        if status.value:
            raise RuntimeError(f"CUDA made no stream: {status.name}")
        return torch.cuda.ExternalStream(int(handle), device=index)
