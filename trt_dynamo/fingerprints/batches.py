"""Rows of tensors on a GPU by torch's operations, where no kernel can be compiled. Slower; what it sees is the same.

Batches of up to 16 MiB are copied to memory of their own as words of 32 bits. Each 128 bytes become two sums of words
times odd keys, which are mixed with their place and added up, as the kernel does (`trt_dynamo.fingerprints.kernel`).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import secrets
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.fingerprints.spans import Run, cut

BATCH = 16 * 2**20
# Bytes of a group: 32 words.
GROUP = 128
# Multipliers of a well-mixing permutation of 64-bit numbers (MurmurHash3's finalizer), and of places; as signed ones.
FIRST, SECOND, STEP = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64, 0x9E3779B97F4A7C15 - 2**64


class Piece(NamedTuple):
    """Part of a tensor: which one, where, how many bytes, and the number of groups of that tensor before it."""

    row: int
    start: int
    length: int
    place: int

    @property
    def groups(self) -> int:
        return -(-self.length // GROUP)


@functools.cache
def keys() -> list[list[int]]:
    """For each of two sums an odd key for each word and a seed, signed, drawn once."""
    return [[(secrets.randbits(64) - 2**63) | 1 for _ in range(GROUP // 4 + 1)] for _ in range(2)]


def batches(layout: Sequence[Sequence[Run]]) -> list[list[Piece]]:
    """The pieces of all tensors, in lists of at most `BATCH` bytes."""
    found: list[list[Piece]] = []
    room = 0
    for row, runs in enumerate(layout):
        place = 0
        for start, length in runs:
            for offset, size in cut(length, BATCH):
                piece = Piece(row, start + offset, size, place)
                place += piece.groups
                if room < size:
                    found.append([])
                    room = BATCH
                room -= size
                found[-1].append(piece)
    return found


class BatchRows:
    """Rows of tensors on one GPU by torch's operations, on the caller's stream: after the engine, not beside it."""

    def __init__(self, layout: Sequence[Sequence[Run]], device: torch.device) -> None:
        self.device = device
        self.count = len(layout)
        self.batches = batches(layout)
        self.tables = [table(batch, device) for batch in self.batches]
        self.keys = torch.tensor(keys(), device=device)
        self.local = threading.local()

    def record(self) -> None:
        """Nothing: what is enqueued later on the same stream sees at least as much."""

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            rows = torch.zeros(2, self.count, dtype=torch.int64, device=self.device)
            for batch, (row, counts, shift) in zip(self.batches, self.tables, strict=True):
                words = gather(batch, tensors, self.device)
                total = len(words)
                row = torch.repeat_interleave(row, counts, output_size=total)
                place = torch.repeat_interleave(shift, counts, output_size=total)
                place += torch.arange(total, device=self.device)
                for sums, (*_, seed), key in zip(rows, keys(), self.keys, strict=True):
                    sums.index_add_(0, row, mix((words * key[:-1]).sum(1) + place * STEP + seed))
            self.local.rows = rows.t().contiguous()

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            found = self.local.rows.cpu()
            del self.local.rows
            return ctypes.string_at(found.data_ptr(), found.nbytes)


def table(batch: Sequence[Piece], device: torch.device) -> torch.Tensor:
    """Of each piece: its row, its number of groups, and the difference between a group's place and its number here."""
    ends = itertools.accumulate(piece.groups for piece in batch)
    columns = [(p.row, p.groups, p.place - (end - p.groups)) for p, end in zip(batch, ends, strict=True)]
    return torch.tensor(columns, device=device).t().contiguous()


def gather(batch: Sequence[Piece], tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bytes of the pieces, each filled up with zeros to whole groups, as rows of 32 words of 32 bits."""
    zeros = torch.zeros(GROUP, dtype=torch.uint8, device=device)
    parts = []
    for piece in batch:
        tensor = tensors[piece.row]
        offset = piece.start - torch._C._data_address(tensor)  # type: ignore[attr-defined]
        part = torch.empty(0, dtype=torch.uint8, device=device)
        parts.append(part.set_(tensor.untyped_storage(), offset, (piece.length,), (1,)))
        parts.append(zeros[: piece.groups * GROUP - piece.length])
    return torch.cat(parts).view(torch.int32).view(-1, GROUP // 4)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of the 64-bit numbers in which every bit of one matters to all of its image."""
    for factor in (FIRST, SECOND):
        x = (x ^ ((x >> 33) & (2**31 - 1))) * factor
    return x ^ ((x >> 33) & (2**31 - 1))
