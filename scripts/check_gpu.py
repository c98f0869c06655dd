"""Everything that needs a GPU, in one command, with the stand-in in TensorRT's place: the tests marked `cuda`, NVIDIA's
memory checker over some of them, and what a call costs the host. About five minutes.

Usage: python -m scripts.check_gpu [FOLDER for the record]
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import trt_dynamo

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "--tb=short"]
# Only the files that have such tests: the others may need packages that a machine without network lacks.
MARKED = re.compile(r"mark\.cuda|def test_\w+\([^)]*\bdevice: torch")  # the fixture `device` has a CUDA case
FILES = sorted(str(f) for f in Path("tests").glob("test_*.py") if MARKED.search(f.read_text()))
# Each process takes a part of the GPU's memory: four are safe on any.
IN_PARALLEL = ["-n", "4"] if importlib.util.find_spec("xdist") else []
# Few and small, since the checker slows every kernel down: engines, whole calls as CUDA graphs, streams, refits.
CHECKED = "through or side_streams or mutations"

STEPS: dict[str, list[str]] = {
    "tests": [*PYTEST, *IN_PARALLEL, *FILES],
    "memory checker": [
        *("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"),
        *(*PYTEST, "tests/test_cuda.py", "tests/test_cuda_graphs.py", "-k", CHECKED),
    ],
    "host cost": [sys.executable, "-m", "benchmarks.host_cost"],
}


def run(name: str, command: list[str]) -> dict[str, Any]:
    """Runs a step, shows its last lines, and tells its end and its seconds."""
    if shutil.which(command[0]) is None:
        print(f"{name}: not run, there is no {command[0]}", flush=True)
        return {"why_not": f"no {command[0]}"}
    started = time.perf_counter()
    environ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    seconds = time.perf_counter() - started
    lines = done.stdout.splitlines()[-30:]
    print(*lines, f"{name}: exit status {done.returncode} after {seconds:.0f} s", sep="\n", flush=True)
    return {"exit": done.returncode, "seconds": round(seconds, 1), "end": lines}


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check here")
        return 2
    record: dict[str, Any] = {
        "trt_dynamo": trt_dynamo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "steps": {},
    }
    for name, command in STEPS.items():
        record["steps"][name] = run(name, command)
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(record, indent=1))
    return int(any(step.get("exit", 0) for step in record["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
