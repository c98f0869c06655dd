"""Where the first answer's time goes, in new processes: with an empty cache, with a full one, from a remote tier;
beside eager's and Inductor's.

What TensorRT itself does with a plan is not in it: where no engine can run, the stand-in answers in its place, and its
own work (for which the network is converted again) is not counted as ours. Each child is a process of its own, with
Inductor's caches in a folder of this run.

Usage: python -m benchmarks.warm_start [model ...]
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS

SIZES: dict[str, dict[str, int]] = {"resnet50": {}, "minilm": {}}
# Stages of ours, by where they are called: module, name.
STAGES = {
    "passes": ("trt_dynamo.lowering", "run_passes"),
    "partition": ("trt_dynamo.backend", "partition"),
    "hashing": ("trt_dynamo.backend", "digest"),
    "keys": ("trt_dynamo.backend", "segment_key"),
    "cache": ("trt_dynamo.backend", "get_or_build"),
    "conversion": ("trt_dynamo.backend", "convert"),
    "stand-in": ("trt_dynamo.backend", "stand_in"),
    "watching weights": ("trt_dynamo.runtime", "WeightSet"),
    "backend": ("trt_dynamo.backend", "compile_lowered"),
}


def make(name: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """MiniLM's size with random weights, or one of the benchmarks' models."""
    if name != "minilm":
        return MODELS[name](**SIZES.get(name, {}))
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config).eval(), (torch.randint(0, 1000, (1, 128)),)


@contextlib.contextmanager
def timed_stages() -> Iterator[dict[str, float]]:
    """Adds up the seconds in each stage; a stage inside another counts in both."""
    import importlib

    spent = dict.fromkeys(STAGES, 0.0)
    kept = []

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spent[stage] += time.perf_counter() - started

        return run

    for stage, (module, name) in STAGES.items():
        where = importlib.import_module(module)
        kept.append((where, name, getattr(where, name)))
        setattr(where, name, timed(stage, getattr(where, name)))
    try:
        yield spent
    finally:
        for where, name, function in kept:
            setattr(where, name, function)


def child(name: str, way: str) -> None:
    """One first answer in this process; prints its seconds as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, args = make(name)
    spent: dict[str, float] = {}
    with torch.no_grad():
        started = time.perf_counter()
        if way == "eager":
            model(*args)
        elif way == "inductor":
            torch.compile(model)(*args)
        else:
            with timed_stages() as spent:
                torch.compile(model, backend="tensorrt", options={"runtime": "reference", "strict": True})(*args)
        total = time.perf_counter() - started
        started = time.perf_counter()
        model(*args)
    print(json.dumps({"total": total, "again": time.perf_counter() - started, **spent}))


def first_answer(name: str, way: str, folder: Path, **environ: str) -> dict[str, float]:
    """The seconds of a first answer in a new process."""
    places = {"TRT_DYNAMO_CACHE_DIR": str(folder / "engines"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.warm_start", "--child", name, way],
        env={**os.environ, **places, **environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours_of(found: dict[str, float], cold: bool) -> float:
    """Our own seconds: all in the backend but the stand-in's. Only where an engine is built is it we who convert."""
    return found["passes"] + found["backend"] - found["stand-in"] - (0 if cold else found["conversion"])


def measure(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        remote = {"TRT_DYNAMO_CACHE_REMOTE": f"file://{folder / 'remote'}"}
        runs = {
            "eager": first_answer(name, "eager", folder),
            "inductor, cold": first_answer(name, "inductor", folder),
            "inductor, warm": first_answer(name, "inductor", folder),
            "ours, cold": first_answer(name, "ours", folder, **remote),
            "ours, warm": first_answer(name, "ours", folder),
            "ours, remote": first_answer(name, "ours", folder / "elsewhere", **remote),
        }
    for way, found in runs.items():
        line = f"{name}, {way}: {found['total']:.2f} s"
        if "backend" in found:
            rest = found["total"] - found["backend"] - found["passes"] - found["again"]
            stages = ", ".join(f"{stage} {1e3 * seconds:.0f}" for stage, seconds in found.items() if stage in STAGES)
            mine = ours_of(found, "cold" in way)
            line += f"; ours {mine:.2f} s, {mine / rest:.0%} of the rest (Dynamo, AOTAutograd); ms: {stages}"
        print(line, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    print(f"torch {torch.__version__}, one thread each, seconds to the first answer, imports not counted")
    for name in sys.argv[1:] or SIZES:
        measure(name)


if __name__ == "__main__":
    main()
