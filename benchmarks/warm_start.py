"""Where the first answer's time goes, in new processes: with an empty cache, with a full one, from a remote tier, with
the lowered graph from AOTAutograd's cache; beside eager's and Inductor's.

What TensorRT itself does with a plan is not in it: where no engine can run, the stand-in answers in its place, and its
own work (for which the weights are copied and the network is converted again) is not counted as ours. Each child is a
process of its own, with Inductor's caches in a folder of this run. The imports are made before the clock starts.

Usage: python -m benchmarks.warm_start [model ...]
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS

SIZES: dict[str, dict[str, int]] = {"resnet50": {}, "minilm": {}}
BACKEND, LOWERING, RUNTIME = "trt_dynamo.backend", "trt_dynamo.lowering", "trt_dynamo.runtime"
CACHE = "torch._functorch._aot_autograd.autograd_cache"

# Stages by where they are called: module, name. What no stage has is Dynamo's and the run's.
STAGES = {
    "AOTAutograd": (BACKEND, "lower"),
    "its cache's key": (CACHE, "autograd_cache_key"),
    "decompositions": (LOWERING, "decompositions"),
    "salt": (LOWERING, "kept_graphs"),
    "passes": (LOWERING, "run_passes"),
    "backend": (BACKEND, "compile_lowered"),
    "dry runs": ("trt_dynamo.partition", "judge"),
    "partition": (BACKEND, "partition"),
    "hashing": ("trt_dynamo.identity", "digests"),
    "keys": ("trt_dynamo.identity", "segment_key"),
    "cache": (BACKEND, "get_or_build"),
    "watching weights": ("trt_dynamo.weights", "Reader.read_by_several"),
    "engine": (BACKEND, "make_engine"),
    "conversion": (BACKEND, "convert"),
    "stand-in": (BACKEND, "stand_in"),
    "run": (RUNTIME, "SegmentModule.answer"),
}
OURS = ("salt", "passes", "backend", "dry runs", "partition", "hashing", "keys", "cache", "watching weights")
TORCH = ("Dynamo", "AOTAutograd", "its cache's key", "decompositions")
# With an engine of TensorRT's, a warm start neither copies weights nor converts.
ONLY_COLD = ("engine", "conversion")
MODULES = ("torch._dynamo", "torch._functorch.aot_autograd", "torch._dynamo.backends.common")


@dataclasses.dataclass
class Clock:
    """Adds up wall and processor seconds for each stage; what is inside another stage counts there alone."""

    wall: dict[str, float] = dataclasses.field(default_factory=dict)
    processor: dict[str, float] = dataclasses.field(default_factory=dict)
    open: list[list[float]] = dataclasses.field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        inner = [0.0, 0.0]
        self.open.append(inner)
        started = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            took = time.perf_counter() - started[0], time.process_time() - started[1]
            self.open.pop()
            self.wall[name] = self.wall.get(name, 0.0) + took[0] - inner[0]
            self.processor[name] = self.processor.get(name, 0.0) + took[1] - inner[1]
            if self.open:
                self.open[-1][0] += took[0]
                self.open[-1][1] += took[1]

    def watch(self, name: str, module: str, path: str) -> None:
        """Times the function there from now on."""
        *owners, last = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, last)

        @functools.wraps(function)
        def run(*args: Any, **keywords: Any) -> Any:
            with self.stage("stand-in" if name == "watching weights" and for_stand_in() else name):
                return function(*args, **keywords)

        setattr(owner, last, run)


def for_stand_in() -> bool:
    """Whether the weights are looked at because they are copied for a conversion, or in a run."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in ("converted", "answer"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def make(name: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """MiniLM's size with random weights (`bert<n>`: n layers, narrow), or one of the benchmarks' models."""
    if not name.startswith(("minilm", "bert")):
        return MODELS[name](**SIZES.get(name, {}))
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    if name.startswith("bert"):
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": int(name.removeprefix("bert")),
            "num_attention_heads": 2,
            "intermediate_size": 128,
        }
    return BertModel(BertConfig(**sizes)).eval(), (torch.randint(0, 1000, (1, 128)),)


def child(name: str, way: str) -> None:
    """One first answer in this process; prints its seconds as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, args = make(name)
    clock = Clock()
    compiled: Callable[..., Any] = model
    for module in MODULES if way != "eager" else ():
        importlib.import_module(module)
    if way == "inductor":
        importlib.import_module("torch._inductor.compile_fx")
        compiled = torch.compile(model)
    elif way != "eager":
        importlib.import_module("trt_dynamo.reference")
        for stage, (module, path) in STAGES.items():
            clock.watch(stage, module, path)
        options: dict[str, Any] = {"runtime": "reference", "strict": True, "aot_cache": way}
        compiled = torch.compile(model, backend="tensorrt", options=options)
    with torch.no_grad():
        started = time.perf_counter(), time.process_time()
        with clock.stage("Dynamo"):
            compiled(*args)
        total = time.perf_counter() - started[0], time.process_time() - started[1]
    print(json.dumps({"total": total, "wall": clock.wall, "processor": clock.processor}))


def first_answer(name: str, way: str, folder: Path, **environ: str) -> dict[str, Any]:
    """The seconds of a first answer in a new process."""
    places = {"TRT_DYNAMO_CACHE_DIR": str(folder / "engines"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.warm_start", "--child", name, way],
        env={**os.environ, **places, **environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(found: dict[str, Any], cold: bool) -> str:
    """Our own share, by processor time, which other programs on the machine disturb least; and all stages."""
    seconds = found["processor"]
    ours = sum(seconds.get(stage, 0.0) for stage in (*OURS, *(ONLY_COLD if cold else ())))
    torchs = sum(seconds.get(stage, 0.0) for stage in TORCH)
    stages = ", ".join(f"{stage} {1e3 * each:.0f}" for stage, each in seconds.items() if each >= 0.0005)
    return f"; ours {ours:.2f}, Dynamo and AOTAutograd {torchs:.2f} ({ours / torchs:.0%}); ms: {stages}"


def measure(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        remote = {"TRT_DYNAMO_CACHE_REMOTE": f"file://{folder / 'remote'}"}
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "eager": lambda: first_answer(name, "eager", folder),
            "inductor, cold": lambda: first_answer(name, "inductor", folder),
            "inductor, warm": lambda: first_answer(name, "inductor", folder),
            "ours, cold": lambda: first_answer(name, "off", folder, **remote),
            "ours, warm": lambda: first_answer(name, "off", folder),
            "ours, remote": lambda: first_answer(name, "off", folder / "elsewhere", **remote),
            "ours, aot_cache filled": lambda: first_answer(name, "on", folder),
            "ours, aot_cache, warm": lambda: first_answer(name, "on", folder),
        }
        for way, run in runs.items():
            found = run()
            wall, processor = found["total"]
            shares = summary(found, "cold" in way) if way.startswith("ours") else ""
            print(f"{name}, {way}: {wall:.2f} s, of the processor {processor:.2f} s{shares}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    print(f"torch {torch.__version__}, one thread each, seconds to the first answer, imports not counted")
    for name in sys.argv[1:] or SIZES:
        measure(name)


if __name__ == "__main__":
    main()
