"""What a half type saves and costs: `python -m benchmarks.precision [model ...]` prints the table of docs/precision.md.

Plans are built for compute capability 8.9 and 12.0 by TensorRT-RTX, on whatever machine; results are those of the
reference evaluator, which computes in float32 and rounds after each layer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import trt_dynamo
from benchmarks.models import MODELS
from trt_dynamo.cache import open_store
from trt_dynamo.demo import embedding

PRECISIONS = ("native", "fp16", "bf16")
TARGETS = ("8.9", "12.0")


def minilm() -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The pretrained sentence encoder, and 32 sentences."""
    model, tokenizer = embedding.load(torch.device("cpu"))
    batch = tokenizer.batch(embedding.lines_of("sentences"), range(32))
    return model, (batch.ids, batch.mask)


def load(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if name == "minilm":
        return minilm()
    torch.manual_seed(0)
    model, args = MODELS[name]()
    return model, tuple(args)


def first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else first_tensor(output[0])


def measured(name: str, precision: str) -> tuple[float, list[float], int, int]:
    """The least cosine of a row with eager's; the plan's size in MB for each target; how many nodes compute in the half
    type, and how many in float32.
    """
    model, args = load(name)
    sizes, least, low, wide = [], 1.0, 0, 0
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            options: dict[str, Any] = {"precision": precision, "runtime": "reference", "targets": target}
            options["cache_dir"] = folder
            torch._dynamo.reset()
            told = trt_dynamo.explain(model, *args, options=options).precision
            low, wide = sum(each.chosen.low for each in told), sum(each.chosen.wide for each in told)
            torch._dynamo.reset()
            actual = first_tensor(torch.compile(model, backend="tensorrt", options=options)(*args))
            expected = first_tensor(model(*args))
            least = float(F.cosine_similarity(actual.flatten(1), expected.flatten(1)).min())
            store = open_store(trt_dynamo.Settings(cache_dir=Path(folder)))
            sizes.append(sum(entry.size for entry in store.entries()) / 1e6)
    return least, sizes, low, wide


def rows(names: list[str]) -> Iterator[str]:
    plans = " | ".join(f"plan, SM {target}" for target in TARGETS)
    yield f"| model | precision | nodes in it, in float32 | least cosine | {plans} |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names:
        for precision in PRECISIONS:
            least, sizes, low, wide = measured(name, precision)
            counts = f"{low}, {wide}" if precision != "native" else "-"
            plans = " | ".join(f"{size:.1f} MB" for size in sizes)
            yield f"| {name} | {precision} | {counts} | {least:.6f} | {plans} |"


def main() -> None:
    for row in rows(sys.argv[1:] or ["minilm", "resnet18", "gpt2"]):
        print(row, flush=True)


if __name__ == "__main__":
    main()
