"""What we ask of CUDA's driver ourselves, through cuda-python: streams that are not torch's; statuses of answers."""

from __future__ import annotations

from typing import Any

import torch

from trt_dynamo.errors import EngineError


def done(answer: tuple[Any, ...]) -> Any:
    """What a call into CUDA returned beside its status.

    Raises:
        EngineError: the status is an error.
    """
    status, *found = answer
    if status.value:
        raise EngineError(f"CUDA says {status.name}")
    return found[0] if found else None


def enter(index: int) -> None:
    """Makes the GPU's context current in this thread, as any call of CUDA's runtime does, for the driver's own."""
    torch.cuda.Event().record(torch.cuda.current_stream(index))


def new_stream(index: int, flag: str) -> torch.cuda.Stream:
    """A stream of ours, none of torch's pool, which the user may be capturing. It is never destroyed.

    Args:
        index: the GPU.
        flag: the driver's name for the kind of stream, `CU_STREAM_...`.
    """
    from cuda.bindings import driver

    with torch.cuda.device(index):
        enter(index)
        handle = done(driver.cuStreamCreate(getattr(driver.CUstream_flags, flag)))
        return torch.cuda.ExternalStream(int(handle), device=index)
