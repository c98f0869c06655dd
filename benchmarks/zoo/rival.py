"""From an exported program to engines: ours beside torch-tensorrt-rtx, each in its own environment, on a machine
without a GPU.

python -m benchmarks.zoo.rival ours NAME         seconds and engines of one model, a line of JSON
python -m benchmarks.zoo.rival theirs NAME       the same; needs torch-tensorrt-rtx in this environment
python -m benchmarks.zoo.rival pairs --ours PYTHON --theirs PYTHON NAME ...    both in turns, into rival.jsonl

torch-tensorrt asks the GPU for its name and loads each plan that it has built. Neither can be had here, so it is told
of a GPU, and what it would load is kept as bytes: that is less work for it than on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.export import ExportedProgram

from benchmarks.zoo.case import Case, Inputs
from benchmarks.zoo.every import CASES

RESULTS = Path(__file__).parent / "rival.jsonl"
GPU = types.SimpleNamespace(name="none", major=8, minor=9, total_memory=8 << 30, multi_processor_count=1)
ROUNDS = 3


@dataclasses.dataclass
class Pace:
    """Wall and CPU seconds from program to engines, the engines, and what hindered it."""

    name: str
    side: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    engines: int = 0
    failure: str = ""


class Kept:
    """Stands for the engine that would be loaded from these bytes."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan

    def serialize(self) -> Any:
        return self.plan

    def get_aliased_input_tensor(self, name: str) -> None:
        return None


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: Any) -> Kept:
        return Kept(plan)


class Called(nn.Module):
    """Stands for the module that would run an engine."""

    def set_output_tensors_as_unowned(self, unowned: bool) -> None:
        pass


def theirs() -> Callable[[ExportedProgram, Inputs], int]:
    """Their compiler, ready to run: takes a program and its inputs, gives the number of engines."""
    told: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *_, **__: GPU,
        "get_device_capability": lambda *_, **__: (GPU.major, GPU.minor),
        "current_device": lambda *_, **__: 0,
        "mem_get_info": lambda *_, **__: (GPU.total_memory, GPU.total_memory),
    }
    for name, function in told.items():
        setattr(torch.cuda, name, function)
    rival = importlib.import_module("torch_tensorrt")
    compiler = importlib.import_module("torch_tensorrt.dynamo._compiler")
    conversion = importlib.import_module("torch_tensorrt.dynamo.conversion._conversion")
    interpreter = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
    interpreter.trt.Runtime = Runtime

    def build(program: ExportedProgram, inputs: Inputs) -> int:
        made = 0

        def engine(module: Any, given: Any, settings: Any, *_: Any, **__: Any) -> nn.Module:
            nonlocal made
            conversion.interpret_module_to_result(module, given, settings)
            made += 1
            return Called()

        args, kwargs = inputs
        with mock.patch.object(compiler, "convert_module", engine):
            rival.dynamo.compile(program, arg_inputs=list(args), kwarg_inputs=kwargs, min_block_size=1, device="cuda:0")
        return made

    return build


def ours() -> Callable[[ExportedProgram, Inputs], int]:
    """The same of ours, which writes one plan or raises."""
    import trt_dynamo

    def build(program: ExportedProgram, inputs: Inputs) -> int:
        with tempfile.TemporaryDirectory() as folder:
            trt_dynamo.export_engine(program, inputs[0], Path(folder) / "model.plan", inputs[1], progress="off")
        return 1

    return build


def paced(case: Case, side: str) -> Pace:
    """One model on one side, after a small one that loads what is loaded once."""
    build = {"ours": ours, "theirs": theirs}[side]()
    linear = (torch.randn(2, 4),), dict[str, Any]()
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        build(torch.export.export(nn.Linear(4, 4).eval(), linear[0]), linear)
        torch.manual_seed(0)
        inputs = case.inputs(case.batches[0], case.sizes[0])
        program = torch.export.export(case.make(), *inputs)
        started, worked = time.perf_counter(), time.process_time()
        engines = build(program, inputs)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    return Pace(case.name, side, seconds, cpu_seconds, engines)


def in_turns(names: list[str], pythons: dict[str, str], seconds: float, results: Path) -> None:
    """Each model `ROUNDS` times on each side, in turns; every run is a line of `results`."""
    for name in names:
        for _ in range(ROUNDS):
            for side, python in pythons.items():
                pace = by_process(name, side, python, seconds)
                with results.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(pace)) + "\n")
                told = pace.failure.splitlines()[-1] if pace.failure else f"{pace.engines} engines"
                sys.stdout.write(f"{name:40} {side:7} {pace.seconds:6.2f} s, CPU {pace.cpu_seconds:6.2f} s, {told}\n")
                sys.stdout.flush()


def by_process(name: str, side: str, python: str, seconds: float) -> Pace:
    command = [python, "-m", "benchmarks.zoo.rival", side, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Pace(name, side, failure=f"not done after {seconds:.0f} s")
    if done.returncode:
        return Pace(name, side, failure=done.stderr.strip()[-600:])
    return Pace(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ours", "theirs", "pairs"))
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--ours", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--theirs", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if chosen.what == "pairs":
        in_turns(chosen.names, {"ours": chosen.ours, "theirs": chosen.theirs}, chosen.seconds, chosen.results)
        return
    warnings.simplefilter("ignore")
    for name in chosen.names:
        sys.stdout.write(json.dumps(dataclasses.asdict(paced(CASES[name], chosen.what))) + "\n")


if __name__ == "__main__":
    main()
