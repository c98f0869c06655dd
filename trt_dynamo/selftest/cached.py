"""A process that needs one engine: `python -m trt_dynamo.selftest.cached RUNTIME FOLDER`. It uses the cache in FOLDER
and prints, as JSON, what it built, what it found and what the engine answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from trt_dynamo.reports import report
from trt_dynamo.selftest.models import network
from trt_dynamo.selftest.trial import Trial


def main() -> None:
    runtime, folder = sys.argv[1:]
    torch.manual_seed(0)
    trial = Trial(runtime, Path(folder))
    model = trial.same(network(), torch.randn(8, 32), cache="on", cache_dir=folder)
    with torch.no_grad():
        answer = model(torch.ones(8, 32, device=trial.device)).tolist()
    counts = report()
    kept = {name: counts[name] for name in ("engines_built", "cache_hits")}
    sys.stdout.write(json.dumps({**kept, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
