"""Seconds per model from Dynamo's graph to the plan, by stage, with nodes, engines, layers and bytes. Needs no GPU.

Usage: python -m benchmarks.build_times [--dynamic] [--json FILE] [model ...]
"""

from __future__ import annotations

import argparse
import functools
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
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import partition
from trt_dynamo.profiles import ranges_of
from trt_dynamo.settings import Settings

SECONDS = ("lower s", "partition s", "convert s", "build s", "plan MB")


class Stages:
    """Seconds by the name of the stage, and what was made."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.figures[name] = self.figures.get(name, 0) + value


def measure(name: str, dynamic: bool) -> dict[str, float]:
    model, args = MODELS[name]()
    stages = Stages()
    settings = Settings(progress="off")

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        stages.add(stage, time.perf_counter() - started)
        return result

    def compile(lowered: Lowered) -> Callable[..., Any]:
        placeholders = [n.name for n in lowered.module.graph.nodes if n.op == "placeholder"]
        with unset_fake_temporarily(), torch.no_grad():
            parts = timed("partition s", lambda: partition(lowered.module, lowered.names, settings))
            stages.add("nodes", sum(v.ok for v in parts.verdicts))
            stages.add("eager nodes", sum(not v.ok for v in parts.verdicts))
            for segment in parts.segments:
                weights = {name: lowered.weights[placeholders.index(name)] for name in segment.weights}
                network = timed("convert s", functools.partial(convert, segment.module, weights))
                values = [n.meta["val"] for n in segment.module.graph.nodes if n.op == "placeholder"]
                profile = profile_of(network, ranges_of(values))
                plan = timed("build s", functools.partial(build, network, profile, settings))
                stages.add("engines", 1)
                stages.add("layers", network.network.raw.num_layers)
                stages.add("plan MB", len(plan) / 1e6)
        return lowered.module.forward

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        result = lower(module, inputs, compile, settings)
        spent = sum(stages.figures[s] for s in ("partition s", "convert s", "build s"))
        stages.add("lower s", time.perf_counter() - started - spent)
        return result

    started = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic or None)(*args)
    stages.add("whole s", time.perf_counter() - started)
    return stages.figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args()
    columns = ("nodes", "eager nodes", "engines", "layers", "lower s", "partition s", "convert s", "build s", "plan MB")
    print(f"torch {torch.__version__}, {'dynamic' if chosen.dynamic else 'static'} shapes, float32")
    print(f"{'model':12}" + "".join(f"{column:>13}" for column in columns))
    results = {}
    for name in chosen.names or MODELS:
        torch._dynamo.reset()
        results[name] = measure(name, chosen.dynamic)
        cells = [f"{results[name].get(c, 0):>13.{2 if c in SECONDS else 0}f}" for c in columns]
        print(f"{name:12}" + "".join(cells))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
