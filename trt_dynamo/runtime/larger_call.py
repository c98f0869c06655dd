"""What a thread's calls of segments are part of: a compiled call that looks at the weights of all its engines at once,
or the capture of a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from trt_dynamo.runtime.segment_runner import SegmentRunner


class LargerCall(Protocol):
    """Says how the calls in it are answered."""

    def answer(self, segment: SegmentRunner, args: Sequence[Any]) -> tuple[torch.Tensor, ...]: ...


class Present(threading.local):
    """The larger call that this thread is in, None where there is none."""

    larger: LargerCall | None = None


PRESENT = Present()
