"""Counts over torch's op database: how many samples pass, are unsupported (and why), or are wrong.

Usage: python benchmarks/op_coverage.py [--dtype float32] [--dynamic] [--samples 3] [--no-build] [--jobs 2] [op-name
...]
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.op_cases import ops, run, samples


def one_op(job: tuple[str, str, bool, int | None, bool]) -> tuple[str, list[tuple[str, str]]]:
    name, dtype, dynamic, limit, build = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    op = ops()[name]
    found = []
    for sample in samples(op, getattr(torch, dtype), limit):
        outcome = run(op, getattr(torch, dtype), sample, dynamic=dynamic, build=build)
        found.append((outcome.kind, outcome.detail))
    return name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quiet", action="store_true", help="only the counts")
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args()
    limit = chosen.samples if chosen.samples > 0 else None
    known = list(ops())
    names = [n for n in known if not chosen.names or any(n == w or n.startswith(w + ".") for w in chosen.names)]
    jobs = [(name, chosen.dtype, chosen.dynamic, limit, not chosen.no_build) for name in names]
    counts: collections.Counter[str] = collections.Counter()
    results: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(chosen.jobs, maxtasksperchild=60) as pool:
        for name, found in pool.imap_unordered(one_op, jobs):
            results[name] = found
            counts.update(kind for kind, _ in found)
    for name in sorted(results):
        for kind in ("wrong", "error", "untraceable", "unsupported"):
            details = collections.Counter(detail for k, detail in results[name] if k == kind)
            for detail, count in details.most_common(2):
                if not chosen.quiet:
                    print(f"{kind:12} {count:3} x {name}: {' '.join(detail.split())[:260]}")
    whole = sum(bool(found) and all(kind == "passed" for kind, _ in found) for found in results.values())
    with_samples = sum(bool(found) for found in results.values())
    print(
        f"{chosen.dtype} {'dynamic' if chosen.dynamic else 'static'}: "
        + ", ".join(f"{n} {k}" for k, n in counts.most_common())
    )
    print(f"{whole} of {with_samples} ops pass whole")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))
    sys.exit(bool(counts["wrong"] or counts["error"]))


if __name__ == "__main__":
    main()
