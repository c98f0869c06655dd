"""What a refit saves over a rebuild: seconds for both, and their ratio, for each model.

The rebuild is real: conversion, and TensorRT's build of an engine with fixed weights, which needs no GPU. The refit is
the stand-in engine's, through the same code as TensorRT's: every weight is copied once, from torch's memory to the
engine's. What NVIDIA's refitter does beside that copy is not in it, so that the ratio is an upper bound.

Usage: python -m benchmarks.refit [--device cpu|cuda] [--json FILE] [model ...]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from benchmarks.models import MODELS
from trt_dynamo.aten_converters import convert
from trt_dynamo.build import build, profile_of
from trt_dynamo.engine_making import stand_in
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import Segment, partition
from trt_dynamo.profiles import ranges_of
from trt_dynamo.settings import Settings

SETTINGS = Settings(progress="off")
REPEATS = 5


def measure(name: str, device: torch.device) -> dict[str, float]:
    """Figures of all the model's segments together."""
    torch._dynamo.reset()
    model, args = MODELS[name]()
    model, args = model.to(device), tuple(arg.to(device) for arg in args)
    figures: dict[str, float] = {}

    def compile(lowered: Lowered) -> Callable[..., Any]:
        with unset_fake_temporarily(), torch.no_grad():
            for segment in partition(lowered.module, lowered.names, SETTINGS).segments:
                weights = dict(zip(segment.weights, lowered.weights_of(segment.weights), strict=True))
                for key, value in measure_segment(segment, weights, device).items():
                    figures[key] = figures.get(key, 0) + value
        return lowered.module.forward

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(module, inputs, compile, SETTINGS)

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args)
    return figures


def measure_segment(segment: Segment, weights: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    ranges = ranges_of([node.meta["val"] for node in segment.module.graph.nodes if node.op == "placeholder"])

    def rebuild() -> None:
        fixed = convert(segment.module, weights)
        build(fixed, profile_of(fixed, ranges), SETTINGS)

    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    network = convert(segment.module, copies, refit=True)
    engine = stand_in(network, [profile_of(network, ranges)], device, 1)
    sources = list(weights.values())

    def copy() -> None:
        for copied, source in zip(targets, sources, strict=True):
            copied.copy_(source)

    targets = [torch.empty_like(source) for source in sources]
    return {
        "weights": len(network.weights),
        "MB": sum(source.nbytes for source in sources) / 1e6,
        "rebuild s": seconds(rebuild, device, repeats=1),
        "refit s": seconds(lambda: engine.refit(sources), device),
        "copy s": seconds(copy, device),
    }


def seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The least of a few runs, until the device is done; what runs more than once is run before, too."""
    if repeats > 1:
        work()
    return min(once(work, device) for _ in range(repeats))


def once(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"default: all of {', '.join(MODELS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {name: measure(name, given.device) for name in given.models or MODELS}
    print(f"{'model':<12} weights     MB  rebuild s   refit s    copy s  rebuild/refit  refit/copy")
    for name, f in results.items():
        ratios = f["rebuild s"] / f["refit s"], f["refit s"] / f["copy s"]
        print(
            f"{name:<12} {f['weights']:>7.0f} {f['MB']:>6.0f} {f['rebuild s']:>10.2f} {f['refit s']:>9.4f}"
            f" {f['copy s']:>9.4f} {ratios[0]:>14.0f} {ratios[1]:>11.1f}"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
