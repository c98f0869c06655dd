"""The streams that engines run on.

Comes in: the stream of the caller, by its handle. Goes out: the stream for TensorRT: the same, but for the default
stream, on which TensorRT would make the host wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from trt_dynamo.cuda_driver import new_stream

# torch's own ways to ask for these make objects, which costs more than the rest of a call. A torch without CUDA lacks
# them.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


def torch_stream(handle: int, device: torch.device) -> torch.cuda.Stream:
    """A stream as torch knows it."""
    return torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)


@functools.cache
def beside_default(index: int) -> torch.cuda.Stream:
    """A stream on a GPU that CUDA itself keeps in turns with the default stream: what is enqueued on either comes after
    all that was enqueued on the other before. That costs the host nothing, where two events cost four calls.
    """
    return new_stream(index, "CU_STREAM_DEFAULT")


@functools.cache
def for_captures(index: int, stream: int) -> torch.cuda.Stream:
    """What CUDA graphs are captured on that are replayed on `stream`, which then have torch's scratch memory for
    matrix products to themselves. None of torch's pool, which the user may be capturing.
    """
    return new_stream(index, "CU_STREAM_NON_BLOCKING")
