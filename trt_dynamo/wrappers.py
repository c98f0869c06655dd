"""Wrappers of models with which engines make no sense: told at compile time, from the stack of the call.

`torch.nn.DataParallel` makes new copies of a model for each call, and runs each in a thread of its own. No engine could
live for more than a call.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

DATA_PARALLEL = (
    "torch.nn.DataParallel makes new copies of the model at each call, so no engine could be used twice: the model "
    "runs in eager. Use torch.nn.parallel.DistributedDataParallel, with one process for each GPU, or call the model "
    "without a wrapper, on one GPU"
)


def in_data_parallel() -> bool:
    """Whether this thread runs a replica of `torch.nn.DataParallel`."""
    codes = workers()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if any(frame.f_code is code for code in codes):  # Dynamo's own code may hold slices, and has no hash then
            return True
        frame = frame.f_back
    return False


def workers() -> list[CodeType]:
    """The code that runs a replica: the functions inside of `parallel_apply`, in whose threads the replicas run."""
    from torch.nn.parallel.parallel_apply import parallel_apply

    return [constant for constant in parallel_apply.__code__.co_consts if isinstance(constant, CodeType)]
