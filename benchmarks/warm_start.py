"""Where the first answer's time goes, in new processes: with an empty cache, with a full one, from a remote tier, with
the lowered graph from AOTAutograd's cache; beside eager's and Inductor's.

What TensorRT itself does with a plan is not in it: where no engine can run, the stand-in answers in its place, and its
own work (for which the weights are copied and the network is converted again) is not counted as ours. Each child is a
process of its own, with Inductor's caches in a folder of this run. The imports are made before the clock starts.

A stage's time is that of the thread that compiles, waiting for others included. What our own threads do beside it shows
in the processor's time alone.

Usage: python -m benchmarks.warm_start [--repeat N] [--ours] [model ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS

SIZES: dict[str, dict[str, int]] = {"resnet50": {}, "minilm": {}}
BACKEND, ENGINE = "trt_dynamo.backend", "trt_dynamo.engine_making"
LOWERING, RUNTIME = "trt_dynamo.lowering", "trt_dynamo.runtime"
CACHE = "torch._functorch._aot_autograd.autograd_cache"

# Stages by where they are called: module, name. What no stage has is Dynamo's and the run's.
STAGES = {
    "AOTAutograd": (BACKEND, "lower"),
    "its cache's key": (CACHE, "autograd_cache_key"),
    "decompositions": (LOWERING, "decompositions"),
    "salt": (LOWERING, "kept_graphs"),
    "passes": (LOWERING, "run_passes"),
    "early look": ("trt_dynamo.early_look", "EarlyLook.__init__"),
    "waiting for it": ("trt_dynamo.early_look", "EarlyLook.knows"),
    "backend": (BACKEND, "compile_lowered"),
    "dry runs": ("trt_dynamo.partition", "judge"),
    "partition": (BACKEND, "partition"),
    "hashing": ("trt_dynamo.identity", "digests"),
    "keys": ("trt_dynamo.identity", "segment_key"),
    "identity": (ENGINE, "identity_of"),
    "cache": (ENGINE, "get_or_build"),
    "watching weights": ("trt_dynamo.weights", "Reader.read_by_several"),
    "engine": (BACKEND, "make_engine"),
    "conversion": (ENGINE, "convert"),
    "stand-in": (ENGINE, "stand_in"),
    "run": (RUNTIME, "SegmentRunner.answer"),
}
BESIDE = "threads beside"
TORCH = ("Dynamo", "AOTAutograd", "its cache's key")
# With an engine of TensorRT's, a warm start neither copies weights nor converts.
ONLY_COLD = ("engine", "conversion")
OURS = {*STAGES, BESIDE} - {*TORCH, *ONLY_COLD, "stand-in", "run"}
MODULES = ("torch._dynamo", "torch._functorch.aot_autograd", "torch._dynamo.backends.common")


@dataclasses.dataclass
class Clock:
    """Adds up wall and processor seconds of the thread that makes it, for each stage; what is inside another stage
    counts there alone.
    """

    wall: dict[str, float] = dataclasses.field(default_factory=dict)
    processor: dict[str, float] = dataclasses.field(default_factory=dict)
    open: list[list[float]] = dataclasses.field(default_factory=list)
    thread: int = dataclasses.field(default_factory=threading.get_ident)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        inner = [0.0, 0.0]
        self.open.append(inner)
        started = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            took = time.perf_counter() - started[0], time.thread_time() - started[1]
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
            if threading.get_ident() != self.thread:
                return function(*args, **keywords)
            with self.stage("stand-in" if name == "watching weights" and for_stand_in() else name):
                return function(*args, **keywords)

        setattr(owner, last, run)

    def watch_threads(self, *modules: str) -> None:
        """Adds up what the threads take that are started by `started` of these modules."""

        def started(work: Callable[[], None]) -> threading.Thread | None:
            def run() -> None:
                work()
                self.processor[BESIDE] = self.processor.get(BESIDE, 0.0) + time.thread_time()

            thread: threading.Thread | None = start(run)
            return thread

        start = importlib.import_module(modules[0]).started
        for module in modules:
            importlib.import_module(module).started = started  # type: ignore[attr-defined]


def for_stand_in() -> bool:
    """Whether the weights are looked at because they are copied for a conversion."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "network_of":
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
        clock.watch_threads("trt_dynamo.side_threads", "trt_dynamo.early_look")
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
    """Our own share, by the clock and by processor time; and all stages, by the clock and by processor time."""
    ours = {*OURS, *(ONLY_COLD if cold else ())}
    shares = []
    for kind in ("wall", "processor"):
        mine, torchs = (sum(found[kind].get(stage, 0.0) for stage in stages) for stages in (ours, TORCH))
        shares.append(f"{mine:.2f} beside {torchs:.2f} ({mine / torchs:.0%})")
    stages = [
        f"{stage} {1e3 * found['wall'].get(stage, 0.0):.0f}/{1e3 * each:.0f}"
        for stage, each in found["processor"].items()
        if each >= 0.0005
    ]
    return f"; ours beside Dynamo and AOTAutograd {shares[0]}, of the processor {shares[1]}; ms: {', '.join(stages)}"


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of all figures."""

    def over(figures: list[dict[str, float]]) -> dict[str, float]:
        return {name: statistics.median(each.get(name, 0.0) for each in figures) for name in figures[0]}

    totals = [statistics.median(values) for values in zip(*(run["total"] for run in runs), strict=True)]
    return {"total": totals, **{kind: over([run[kind] for run in runs]) for kind in ("wall", "processor")}}


def measure(name: str, repeat: int, only_ours: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        remote = {"TRT_DYNAMO_CACHE_REMOTE": f"file://{folder / 'remote'}"}

        def elsewhere() -> dict[str, Any]:
            """On a machine that has nothing yet."""
            with tempfile.TemporaryDirectory() as other:
                return first_answer(name, "off", Path(other), **remote)

        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "eager": lambda: first_answer(name, "eager", folder),
            "inductor, cold": lambda: first_answer(name, "inductor", folder),
            "inductor, warm": lambda: first_answer(name, "inductor", folder),
            "ours, cold": lambda: first_answer(name, "off", folder, **remote),
            "ours, warm": lambda: first_answer(name, "off", folder),
            "ours, remote": elsewhere,
            "ours, aot_cache filled": lambda: first_answer(name, "on", folder),
            "ours, aot_cache, warm": lambda: first_answer(name, "on", folder),
        }
        for way, run in runs.items():
            if only_ours and not way.startswith("ours"):
                continue
            found = median([run() for _ in range(1 if "cold" in way or "filled" in way else repeat)])
            wall, processor = found["total"]
            shares = summary(found, "cold" in way) if way.startswith("ours") else ""
            print(f"{name}, {way}: {wall:.2f} s, of the processor {processor:.2f} s{shares}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_start", description="The time to a first answer.")
    parser.add_argument("models", nargs="*", default=[*SIZES])
    parser.add_argument("--repeat", type=int, default=1, help="medians of so many runs, where a run changes no cache")
    parser.add_argument("--ours", action="store_true", help="neither eager nor Inductor")
    chosen = parser.parse_args()
    print(f"torch {torch.__version__}, one thread each, seconds to the first answer, imports not counted")
    for name in chosen.models:
        measure(name, chosen.repeat, chosen.ours)


if __name__ == "__main__":
    main()
