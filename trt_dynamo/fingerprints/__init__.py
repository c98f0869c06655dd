"""The content of tensors as 16 bytes each, so that a write shows that moved no address and bumped no version.

In: tensors of one device. Out: a row of bytes for each, computed where the tensors are, at about the speed of their
memory. Rows mean something in this process only: their keys are drawn when it starts, so that nothing in a model can
be made to collide.

A row changes for certain when bytes of one aligned word change (4 bytes on a GPU, 8 on the CPU). Whatever else changes
goes unseen with a probability of at most about 2**-64, mostly much less, and no pattern of writes makes it worse: the
sums are keyed and know each byte's position (`trt_dynamo.fingerprints.kernel`, `.host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.errors import Unsupported
from trt_dynamo.fingerprints import host
from trt_dynamo.fingerprints.batches import BatchRows
from trt_dynamo.fingerprints.host import HostRows
from trt_dynamo.fingerprints.launches import KernelRows, function_on
from trt_dynamo.fingerprints.spans import runs

ROW = host.ROW


class Rows(Protocol):
    """One way to compute the rows: on the CPU, by a CUDA kernel, or by torch's operations on the GPU."""

    def record(self) -> None: ...
    def start(self, tensors: Sequence[torch.Tensor]) -> None: ...
    def read(self, tensors: Sequence[torch.Tensor]) -> bytes: ...


class Fingerprints:
    """The content of tensors as one row of bytes each, to be compared within this process only.

    Equal bytes at equal strides give equal rows, wherever the tensors lie. Shapes, strides and dtypes take no part.

    It holds addresses, no tensor and no storage: the caller passes the same tensors again, and makes another object
    when one has moved. Threads may share an object; each has a stream and results of its own. On CUDA not to be used
    while the current stream is being captured.

    Args:
        tensors: dense tensors of any dtype, size and strides, on one device. Of one with gaps between its elements,
            the gaps take part if it lies in more than `spans.MOST_RUNS` pieces.

    Raises:
        Unsupported: a tensor that has no bytes of its own (fake, meta, sparse, wrapped, emptied), or devices differ.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        devices = {t.device for t in tensors}
        if len(devices) > 1:
            raise Unsupported(f"the fingerprint of tensors on several devices: {', '.join(sorted(map(str, devices)))}")
        device = devices.pop() if devices else torch.device("cpu")
        with _disable_current_modes(), torch.no_grad():
            layout = [runs(t) for t in tensors]
            self.rows: Rows = rows_on(device, layout)

    def record(self) -> None:
        """Marks the point on the current stream after which the content counts. Nothing on the CPU."""
        self.rows.record()

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begins to compute, on CUDA beside whatever was enqueued since `record`.

        `tensors` are kept alive until `read`, which must follow in this thread; without it the next start waits.
        """
        self.rows.start(tensors)

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """Waits, and returns `ROW` bytes for each tensor, in order."""
        return self.rows.read(tensors)

    def read_by_several(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """`read`, on the CPU by several threads, which is not for each call."""
        return self.rows.read_by_several() if isinstance(self.rows, HostRows) else self.rows.read(tensors)

    def read_beside(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """`read`, in few steps on the CPU, for a thread beside one that runs Python."""
        return self.rows.read_beside() if isinstance(self.rows, HostRows) else self.rows.read(tensors)


def rows_on(device: torch.device, layout: Sequence[Sequence[tuple[int, int]]]) -> Rows:
    """The fastest way that this device has."""
    if device.type == "cpu":
        return HostRows(layout)
    if device.type != "cuda":
        raise Unsupported(f"the fingerprint of tensors on {device}")
    function = function_on(device.index)
    return BatchRows(layout, device) if function is None else KernelRows(layout, device, function)


def fingerprint(tensors: Sequence[torch.Tensor]) -> bytes:
    """The rows of `tensors` as they are now, `ROW` bytes each, in order."""
    now = Fingerprints(tensors)
    now.record()
    now.start(tensors)
    return now.read_beside(tensors)
