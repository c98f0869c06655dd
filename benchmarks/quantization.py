"""INT8, FP8 and INT4 on the pretrained MiniLM: how the similarities of sentences rank, and the bytes of the plans; and
the plans of GPT-2 with weights of codes.

Needs torchao, ModelOpt and the packages of the extra `demo`. The numbers are those of the evaluator (PyTorch, on the
CPU); the plans are built by TensorRT for RTX, which needs no GPU for it.

    python -m benchmarks.quantization
    python -m benchmarks.quantization int8 modelopt       # the rows that name one of these
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import trt_dynamo
from trt_dynamo.cache import open_store
from trt_dynamo.demo import embedding
from trt_dynamo.demo.embedding import SentenceEncoder, Tokenizer

# The tool, the type, the method.
CASES = (
    ("torchao", "int8", "minmax"),
    ("torchao", "int8", "smooth"),
    ("torchao", "int8", "entropy"),
    ("torchao", "int8", "percentile"),
    ("torchao", "fp8", "minmax"),
    ("torchao", "int8wo", None),
    ("torchao", "int4wo", None),
    ("modelopt", "int8", "minmax"),
    ("modelopt", "int8", "smooth"),
    ("modelopt", "fp8", "minmax"),
    ("modelopt", "int8wo", None),
    ("modelopt", "int4wo", "awq"),
)
TARGETS = ("8.9", "12.0")
BATCH = 32
CALIBRATED = 96  # sentences


def batches(tokenizer: Tokenizer, first: int, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    texts = embedding.lines_of("sentences")
    for start in range(first, min(last, len(texts)), BATCH):
        batch = tokenizer.batch(texts, range(start, min(start + BATCH, last, len(texts))))
        yield batch.ids, batch.mask


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of the ranks of two lists of numbers."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def similarities(model: Any, tokenizer: Tokenizer, first: int, last: int) -> torch.Tensor:
    """Of each pair of different sentences, the cosine of their embeddings."""
    with torch.no_grad():
        vectors = torch.cat([model(*batch) for batch in batches(tokenizer, first, last)])
    rows, columns = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[rows, columns]


def quantized(
    model: SentenceEncoder, tokenizer: Tokenizer, dtype: str, method: str | None, tool: str = "torchao"
) -> torch.nn.Module:
    """Calibrated with the first sentences; the others are for the comparison."""
    return trt_dynamo.quantize(model, batches(tokenizer, 0, CALIBRATED), dtype, method=method, tool=tool)


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    options = {"runtime": "reference", "cache": "off", **options}
    return torch.compile(model, backend="tensorrt", dynamic=True, options=options)


def plan_bytes(model: torch.nn.Module, batch: Sequence[torch.Tensor], target: str) -> int:
    """The plan that TensorRT for RTX builds for the model, with open sizes."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = compiled(model, targets=target, cache="on", cache_dir=folder)
        run(*batch)
        return sum(entry.size for entry in open_store(trt_dynamo.Settings(cache_dir=Path(folder))).entries())


def plans(model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> str:
    return " | ".join(f"{plan_bytes(model, batch, target) / 1e6:.1f} MB" for target in TARGETS)


class Logits(torch.nn.Module):
    """GPT-2, small, without pretrained weights, which the bytes do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids).logits
        return logits


def language_model() -> None:
    model, batch = Logits(), (torch.arange(2 * 16).reshape(2, 16),)
    print(f"| GPT-2 | float32 | - | - | - | {plans(model, batch)} |", flush=True)
    for dtype in ("int8wo", "int4wo"):
        made = trt_dynamo.quantize(model, None, dtype)
        print(f"| GPT-2 | {dtype} | - | - | - | {plans(made, batch)} |", flush=True)


def sentences(wanted: Callable[..., bool]) -> None:
    model, tokenizer = embedding.load(torch.device("cpu"))
    count = len(embedding.lines_of("sentences"))
    first = next(batches(tokenizer, 0, BATCH))
    if wanted("float32"):
        print(f"| - | float32 | - | 1 | - | {plans(model, first)} |", flush=True)
    expected = similarities(model, tokenizer, CALIBRATED, count)
    for tool, dtype, method in CASES:
        if not wanted(tool, dtype, method):
            continue
        started = time.perf_counter()
        made = quantized(model, tokenizer, dtype, method, tool)
        took = time.perf_counter() - started
        found = spearman(expected, similarities(compiled(made), tokenizer, CALIBRATED, count))
        print(f"| {tool} | {dtype} | {method or '-'} | {found:.4f} | {took:.0f} s | {plans(made, first)} |", flush=True)


def main(names: Sequence[str]) -> None:
    def wanted(*of: str | None) -> bool:
        return not names or any(name in of for name in names)

    titles = ["tool", "type", "method", "Spearman", "calibration", *(f"plan, SM {target}" for target in TARGETS)]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    if wanted("float32", *(name for case in CASES for name in case)):
        sentences(wanted)
    if wanted("gpt2"):
        language_model()


if __name__ == "__main__":
    main(sys.argv[1:])
