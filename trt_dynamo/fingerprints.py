"""The content of tensors in a few bytes each, to be compared within this process only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


ROW = 16


class Fingerprints:
    """The content of tensors as one row of bytes each, to be compared within this process only."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.count = len(tensors)

    def record(self) -> None:
        """Marks the point after which the content counts."""

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begins to read."""

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """`ROW` bytes per tensor."""
        return b"".join(digest(t) for t in tensors)


def digest(tensor: torch.Tensor) -> bytes:
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return hashlib.sha256(host.view(torch.uint8).numpy().data if host.numel() else b"").digest()[:ROW]
