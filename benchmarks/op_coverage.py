"""Counts over torch's databases of ops and modules: what passes, is unsupported (and why), or is wrong.

python -m benchmarks.op_coverage                          float32, every sample, static and dynamic sizes
python -m benchmarks.op_coverage --samples 3 softmax      the first three samples of one op, or more ops
python -m benchmarks.op_coverage --all --jobs 16 --write  every dtype; writes tests/op_expectations.json and the README
python -m benchmarks.op_coverage --readme                 writes the README's table anew from that file
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.op_cases import DTYPES, EXPECTATIONS, cases, expectations, names, run

README = Path(__file__).parent.parent / "README.md"
KINDS = ("passed", "unsupported", "untraceable", "wrong", "error")
MODES = ("static", "dynamic")


class Job(NamedTuple):
    name: str
    dtype: str
    mode: str
    limit: int | None
    build: bool


def run_job(job: Job) -> tuple[Job, list[tuple[str, str]]]:
    """All samples of one op in one dtype, with static or with dynamic sizes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dtype = getattr(torch, job.dtype)
    found = [
        run(case, dtype, dynamic=job.mode == "dynamic", build=job.build)
        for case in itertools.islice(cases(job.name, dtype), job.limit)
    ]
    return job, [(outcome.kind, outcome.detail) for outcome in found]


Results = dict[str, dict[str, list[tuple[str, str]]]]


def run_all(jobs: list[Job], processes: int, seconds: float) -> Results:
    """The outcomes by run (`float32 static`) and op, of those jobs that end in time."""
    results: Results = {f"{job.dtype} {job.mode}": {} for job in jobs}
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=60) as pool:
        found_jobs, end = pool.imap_unordered(run_job, jobs), time.monotonic() + seconds
        for left in range(len(jobs), 0, -1):
            try:
                job, found = found_jobs.next(timeout=max(end - time.monotonic(), 0))
            except multiprocessing.TimeoutError:
                print(f"out of time: {left} of {len(jobs)} runs are missing", file=sys.stderr)
                break
            if found:
                results[f"{job.dtype} {job.mode}"][job.name] = found
    return {which: dict(sorted(by_op.items())) for which, by_op in results.items()}


def counts(by_op: dict[str, list[tuple[str, str]]]) -> dict[str, int]:
    found = collections.Counter(kind for outcomes in by_op.values() for kind, _ in outcomes)
    whole = sum(all(kind == "passed" for kind, _ in outcomes) for outcomes in by_op.values())
    return {"ops": len(by_op), "whole": whole} | {kind: found[kind] for kind in KINDS}


def as_expectations(results: Results) -> dict[str, Any]:
    """What the tests hold each op to: in which runs all, or some, of its samples are not converted, and why."""
    entries: dict[str, dict[str, Any]] = {"unsupported": {}, "untraceable": {}}
    for kind, entry in entries.items():
        for name, which, outcomes in ((n, r, o) for r, by_op in results.items() for n, o in by_op.items()):
            reasons = [detail for found, detail in outcomes if found == kind]
            if reasons:
                known = entry.setdefault(name, {"reason": first_reason(reasons), "all": [], "some": []})
                known["all" if len(reasons) == len(outcomes) else "some"].append(which)
    old = expectations() if EXPECTATIONS.is_file() else {}
    return {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "counts": {which: counts(by_op) for which, by_op in results.items()},
        "tolerances": old.get("tolerances", {}),
        "failures": old.get("failures", {}),
        **{kind: dict(sorted(entry.items())) for kind, entry in entries.items()},
    }


def first_reason(reasons: Iterable[str]) -> str:
    """The most frequent reason, in a line and without what differs from process to process."""
    (text, _), *_ = collections.Counter(reasons).most_common(1)
    return " ".join(re.sub(r"0x[0-9a-f]+", "", text).split())[:160]


def surprises(results: Results) -> list[str]:
    """The ops with a wrong result or an error that nobody expects."""
    failures = expectations()["failures"] if EXPECTATIONS.is_file() else {}
    return [
        f"{name}, {which}"
        for which, by_op in results.items()
        for name, outcomes in by_op.items()
        if any(kind in ("wrong", "error") for kind, _ in outcomes)
        and which not in failures.get(name, {"some": []})["some"]
    ]


def readme_table(known: dict[str, Any]) -> str:
    """The README's table of counts."""
    lines = ["| dtype | sizes | ops and modules | samples | passed | unsupported | untraceable | expected failures |\n"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |\n")
    for which, found in known["counts"].items():
        samples = sum(found[kind] for kind in KINDS)
        shown = (found["ops"], samples, found["passed"], found["unsupported"], found["untraceable"])
        cells = [*which.split(), *(f"{n:,}" for n in (*shown, found["wrong"] + found["error"]))]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def write_readme() -> None:
    table = readme_table(json.loads(EXPECTATIONS.read_text()))
    text = README.read_text()
    README.write_text(re.sub(r"(<!-- op_coverage -->\n).*?(<!-- /op_coverage -->)", rf"\1{table}\2", text, flags=re.S))


def show(results: Results, *, quiet: bool) -> None:
    for which, by_op in results.items():
        for name, kind in ((n, k) for n in by_op for k in reversed(KINDS[1:])):
            details = collections.Counter(detail for found, detail in by_op[name] if found == kind)
            for detail, count in details.most_common(0 if quiet else 2):
                print(f"{which}: {kind:12} {count:3} x {name}: {' '.join(detail.split())[:260]}")
        found = counts(by_op)
        print(f"{which}: " + ", ".join(f"{found[kind]} {kind}" for kind in KINDS if found[kind]))
        print(f"{which}: {found['whole']} of {found['ops']} ops and modules pass whole")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", help=f"one of torch's; several may be given. --all: {DTYPES}")
    parser.add_argument("--all", action="store_true", help="every dtype of the tests")
    parser.add_argument("--mode", choices=MODES, action="append", help="static or dynamic sizes; both by default")
    parser.add_argument("--samples", type=int, help="the first of each op; all by default")
    parser.add_argument("--shard", default="1/1", help="I/N: the I-th of N parts, counted from 1")
    parser.add_argument("--no-build", action="store_true", help="evaluate the networks without building plans")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e6, help="ends with what is there by then")
    parser.add_argument("--json", type=Path, help="writes every outcome")
    parser.add_argument("--merge", type=Path, nargs="+", help="reads outcomes written by --json instead of running")
    parser.add_argument("--write", action="store_true", help="writes tests/op_expectations.json and the README's table")
    parser.add_argument("--readme", action="store_true", help="writes the README's table and ends")
    parser.add_argument("--quiet", action="store_true", help="only the counts")
    parser.add_argument("names", nargs="*")
    return parser.parse_args()


def merged(paths: Iterable[Path]) -> Results:
    """The outcomes of several runs."""
    results: Results = {}
    for path in paths:
        for run_name, by_op in json.loads(path.read_text()).items():
            results.setdefault(run_name, {}).update(by_op)
    return results


def run_chosen(chosen: argparse.Namespace) -> Results:
    """What comes of the samples that are asked for."""
    wanted = [n for n in names() if not chosen.names or any(n == w or n.startswith(w + ".") for w in chosen.names)]
    dtypes = DTYPES if chosen.all else tuple(chosen.dtype or ["float32"])
    jobs = [
        Job(name, dtype, mode, chosen.samples, not chosen.no_build)
        for name in wanted
        for dtype in dtypes
        for mode in chosen.mode or MODES
    ]
    part, parts = (int(number) for number in chosen.shard.split("/"))
    return run_all(jobs[part - 1 :: parts], chosen.jobs, chosen.seconds)


def main() -> int:
    chosen = arguments()
    if chosen.readme:
        write_readme()
        return 0
    results = merged(chosen.merge) if chosen.merge else run_chosen(chosen)
    show(results, quiet=chosen.quiet)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))
    if chosen.write:
        EXPECTATIONS.write_text(json.dumps(as_expectations(results), indent=1) + "\n")
        write_readme()
    return int(bool(surprises(results)))


if __name__ == "__main__":
    sys.exit(main())
