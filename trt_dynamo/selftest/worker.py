"""The process in which cases run: `python -m trt_dynamo.selftest.worker FD RUNTIME [FILE ...]`.

Comes in: on stdin a line of JSON, the names of the cases; the files register further ones. Goes out: lines of JSON on
the file descriptor FD: `{"ready": true}`, then for each case `{"start": name}` and `{"name", "status", ...}`. Whoever
started it sees from these lines which case ended the process, or does not end.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import report, reset_report
from trt_dynamo.selftest import load_cases
from trt_dynamo.selftest.trial import Case, Skipped, Trial

LONGEST = 4000
BROKEN_DEVICE = 3  # exit status: the GPU's context is lost, so the next case needs a new process


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # says where each thread is, for a case that does not end
    torch.backends.cudnn.allow_tf32 = False  # what an engine is compared with is float32, as the engine is
    channel, runtime, *files = sys.argv[1:]
    names = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    with os.fdopen(int(channel), "w", buffering=1) as out:
        cases = load_cases(files)
        out.write(json.dumps({"ready": True}) + "\n")
        for name in names:
            out.write(json.dumps({"start": name}) + "\n")
            found = run(cases[name], runtime)
            lost = device_lost()
            out.write(json.dumps({**found, "lost": lost}, default=str) + "\n")
            if lost:
                os._exit(BROKEN_DEVICE)


def end_with_parent() -> None:
    """Ends this process when its parent is gone, whatever a case is doing."""
    sys.stdin.read()
    os._exit(1)


def run(case: Case, runtime: str) -> dict[str, Any]:
    """What came of one case."""
    torch._dynamo.reset()
    reset_report()
    torch.manual_seed(0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(runtime, Path(folder))
        status, error = outcome(case, trial)
    counts = report()
    trial.figures.build_seconds = counts["build_seconds"]
    trial.figures.engine_calls = trial.figures.engine_calls or counts["engine_calls"]
    gc.collect()
    return {
        "name": case.name,
        "status": status,
        "error": error,
        "seconds": time.perf_counter() - started,
        **dataclasses.asdict(trial.figures),
    }


def outcome(case: Case, trial: Trial) -> tuple[str, str]:
    """The status, and what there is to say of it."""
    try:
        case.run(trial)
        if trial.device.type == "cuda":
            torch.cuda.synchronize()
    except Skipped as why:
        return "skipped", str(why)
    except AssertionError as wrong:
        return "failed", shortened(str(wrong))
    except TrtDynamoError as error:
        return "error", shortened(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001  whatever it is, it is the case's
        return "error", shortened(traceback.format_exc())
    return "passed", ""


def shortened(text: str) -> str:
    """The beginning and the end, which say most."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n[...]\n{text[-LONGEST // 2 :]}"


def device_lost() -> bool:
    """Whether the GPU refuses everything from now on, as it does after an illegal access."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
