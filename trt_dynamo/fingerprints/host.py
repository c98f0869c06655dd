"""Rows of tensors on the CPU. In: where their bytes lie. Out: BLAKE2b, of the bytes if they are few, else of sums.

A chunk of 256 KiB becomes four sums of words of 64 bits times keys, which wrap. Odd keys let no change of one word go
unseen. A sum is blind to changes that touch nothing but the highest bits of an even number of words (`neg_` of
float64), so two of the four read the same bytes 4 bytes further: a bit is in the lower half of its word in two sums,
where odd random keys miss a change with a probability of at most 2**-32 each, independently.
"""

from __future__ import annotations

import ctypes
import hashlib
import secrets
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.fingerprints.spans import Run
from trt_dynamo.side_threads import shared

# Bytes for each tensor.
ROW = 16
# Words of a chunk: they and a row of keys fit the second cache.
CHUNK = 32768
# Under so many bytes the hash itself is faster than four sums.
FEW = 8192


KEYS: list[tuple[bytes, tuple[torch.Tensor, ...]]] = []


def keys() -> tuple[bytes, tuple[torch.Tensor, ...]]:
    """The hash's key and four rows of odd ones, drawn once: nobody knows them, so nobody makes two models collide."""
    if not KEYS:
        drawn = torch.frombuffer(bytearray(secrets.token_bytes(4 * 8 * CHUNK)), dtype=torch.int64).view(4, CHUNK)
        KEYS.append((secrets.token_bytes(32), (drawn | 1).unbind()))
    return KEYS[0]  # also where several threads have drawn some


class Stretch:
    """A run of bytes, ready to be read: as it is, or as words and as words that begin 4 bytes later."""

    def __init__(self, run: Run) -> None:
        start, length = run
        few = length < FEW
        # The words leave up to 7 bytes over, and the last of them may have no later one beside it.
        self.rest = bytes_at(start, length) if few else bytes_at(start + length - 16, 16)
        self.words = None if few else words_at(start, length)
        self.later = None if few else words_at(start + 4, length - 4)

    def feed(self, hasher: hashlib.blake2b, beside: bool) -> None:
        if self.words is not None and self.later is not None:
            whole = min(len(self.words), len(self.later)) // CHUNK * CHUNK if beside else 0
            if whole:
                hash_of(at_once(self.words[:whole], self.later[:whole]), hasher)
            if whole < len(self.later):
                hash_of(chunk_by_chunk(self.words[whole:], self.later[whole:]), hasher)
        hasher.update(self.rest)


def chunk_by_chunk(all_words: torch.Tensor, all_later: torch.Tensor) -> torch.Tensor:
    """Four sums for each chunk, which the processor's cache holds meanwhile."""
    one, two, three, four = keys()[1]
    sums = []
    for words, later in zip(all_words.split(CHUNK), all_later.split(CHUNK), strict=False):
        w, n = len(words), len(later)
        sums += [torch.dot(words, one[:w]), torch.dot(words, two[:w])]
        sums += [torch.dot(later, three[:n]), torch.dot(later, four[:n])]
    return torch.stack(sums)


def at_once(words: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The same of whole chunks in four steps. It reads memory four times, but beside a thread that runs Python each
    step waits for its turn, milliseconds at a time.
    """
    one, two, three, four = keys()[1]
    words, later = words.view(-1, CHUNK), later.view(-1, CHUNK)
    return torch.stack([words.mv(one), words.mv(two), later.mv(three), later.mv(four)], dim=1)


def hash_of(sums: torch.Tensor, hasher: hashlib.blake2b) -> None:
    hasher.update(ctypes.string_at(sums.data_ptr(), sums.nbytes))


def bytes_at(start: int, length: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * length).from_address(start)


def words_at(start: int, length: int) -> torch.Tensor:
    """A view, at any alignment; it holds the memory of nothing."""
    return torch.frombuffer(bytes_at(start, length // 8 * 8), dtype=torch.int64)


class HostRows:
    """Rows of tensors on the CPU, computed in `read`."""

    def __init__(self, layout: Sequence[Sequence[Run]]) -> None:
        self.stretches = [[Stretch(run) for run in runs] for runs in layout]
        self.sizes = [sum(length for _, length in runs) for runs in layout]

    def record(self) -> None:
        """Nothing: the CPU's work is done when it returns."""

    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing: there is nobody to do it meanwhile."""

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            return b"".join(map(row, self.stretches))

    def read_by_several(self) -> bytes:
        """The same, by several threads: for once, since a call has no time to start them."""
        return b"".join(shared(row_alone, self.stretches, self.sizes))

    def read_beside(self) -> bytes:
        """The same, beside a thread that runs Python."""
        return b"".join(row_alone(each, beside=True) for each in self.stretches)


def row_alone(stretches: Sequence[Stretch], beside: bool = False) -> bytes:
    """`row` in any thread: modes are a thread's own."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return row(stretches, beside)


def row(stretches: Sequence[Stretch], beside: bool = False) -> bytes:
    hasher = hashlib.blake2b(key=keys()[0], digest_size=ROW)
    for stretch in stretches:
        stretch.feed(hasher, beside)
    return hasher.digest()
