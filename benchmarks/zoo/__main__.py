"""Measures the zoo, a process for each model and mode, and writes docs/models.md from what was found.

python -m benchmarks.zoo                     what results.jsonl lacks; it can be stopped and goes on where it was
python -m benchmarks.zoo --again resnet bert the models whose names contain one of these, or of this family, anew
python -m benchmarks.zoo --page              writes docs/models.md
python -m benchmarks.zoo --list              the names
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.zoo.every import CASES
from benchmarks.zoo.page import PAGE, page
from benchmarks.zoo.results import RESULTS, Figures, as_line, read

MODES = ("static", "dynamic")


def measured(name: str, mode: str, seconds: float, gigabytes: float) -> Figures:
    """The figures of a model, by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.zoo.measure", name, mode, "--memory", str(gigabytes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Figures(name, CASES[name].family, mode, failure=f"not done after {seconds:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Figures(**json.loads(lines[-1]))
    words = done.stderr.strip()[-1500:] or f"exit code {done.returncode}"
    return Figures(name, CASES[name].family, mode, failure=words)


def run(names: list[str], modes: list[str], again: bool, seconds: float, gigabytes: float, results: Path) -> None:
    for name in CASES:
        if names and not any(part in name or part == CASES[name].family for part in names):
            continue
        for mode in modes:
            if (name, mode) in read(results) and not again:
                continue
            started = time.monotonic()
            figures = measured(name, mode, seconds, gigabytes)
            with results.open("a") as file:
                file.write(as_line(figures) + "\n")
            sys.stdout.write(f"{told(figures)}  {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()


def told(figures: Figures) -> str:
    """A line for who watches."""
    if figures.failure:
        return f"{figures.name:45} {figures.mode:8} FAILED {figures.failure.splitlines()[-1][:200]}"
    eager = sum(number for _, _, number in figures.eager)
    errors = " ".join(f"{e:.1e}" for e in (figures.error, figures.other_error) if e is not None)
    seconds = (figures.lower_s, figures.partition_s, figures.convert_s, figures.build_s)
    return (
        f"{figures.name:45} {figures.mode:8} {'whole' if figures.whole else 'PARTS'} nodes {figures.nodes} "
        f"eager {eager} engines {figures.engines} graphs {figures.graphs}+{figures.recompiled} error {errors} "
        f"lower/partition/convert/build {'/'.join(f'{s:.1f}' for s in seconds)}"
    )


def tidy(results: Path) -> None:
    """Keeps the last line of each model and mode, in the zoo's order."""
    found = read(results)
    lines = [as_line(found[name, mode]) for name in CASES for mode in MODES if (name, mode) in found]
    results.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names, or families")
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--again", action="store_true", help="measure what is already there")
    parser.add_argument("--seconds", type=float, default=600, help="the limit of a model and mode")
    parser.add_argument("--memory", type=float, default=10, metavar="GIB", help="the same, of its data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    if chosen.list:
        sys.stdout.write("".join(f"{name}\n" for name in CASES))
    elif chosen.page:
        tidy(chosen.results)
        PAGE.write_text(page(list(read(chosen.results).values())))
    else:
        run(chosen.names, chosen.mode or list(MODES), chosen.again, chosen.seconds, chosen.memory, chosen.results)


if __name__ == "__main__":
    main()
