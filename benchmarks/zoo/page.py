"""docs/models.md, from the zoo's figures and those of the rival."""

from __future__ import annotations

import collections
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.zoo.every import CASES
from benchmarks.zoo.results import Figures
from benchmarks.zoo.rival import RESULTS as PACES
from benchmarks.zoo.rival import Pace

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"

HEAD = """\
<!-- Made by `python -m benchmarks.zoo --page` from benchmarks/zoo/results.jsonl and rival.jsonl: edit the program. -->

# Models

{count} models with random weights through `torch.compile(model, backend="tensorrt")`, with {versions}.
TensorRT built every engine; none ran on a GPU. What is compared with eager is what the reference evaluator made of the
networks that TensorRT was given, on a CPU.

`python -m benchmarks.zoo` measures, `python -m benchmarks.zoo --page` writes this page. It needs torchvision, timm,
transformers, diffusers and torchaudio. Transformers are of two layers or so; `benchmarks/zoo/` has the sizes.

| | static | dynamic |
| --- | --: | --: |
{summary}
A model counts as one engine where Dynamo made one graph of it, the graph became one engine, no call went to eager and,
if dynamic, that one engine served two batches (and lengths, or sizes of images, where the model takes several): what
can vary is marked with `mark_dynamic`. {breaking} of the models break their graph themselves, whatever the backend:
detectors, which return as many boxes as they find, and what calls functions that Dynamo skips. They are named below,
and count in the last line only.

Views at the end of a graph are eager's: a result that is a view of another result, or has strides that are not dense,
has to be, and computes nothing.

"""

COLUMNS = """\
- nodes: of the lowered graph, and how many of them no engine has
- engines; layers: TensorRT's
- convert, build: CPU seconds for the network, and of TensorRT's builder
- peak: the largest memory of the process, with Python, torch and the evaluator; weights: of the model
- error: the largest difference from eager, relative to the largest value of that result; with dynamic sizes the larger
  of the two that were tried. With *: eager itself answers as differently when its input changes by a millionth, since
  random scores tie

"""

TABLE = """\
| model | sizes | nodes | in eager | engines | layers | convert s | build s | peak MB | weights MB | error |
| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
"""

RIVAL = """\
## Beside Torch-TensorRT

From one exported program (`torch.export`, fixed sizes, float32) to a plan: `trt_dynamo.export_engine` with TensorRT-RTX
1.7.1 beside `torch_tensorrt.dynamo.compile` of torch-tensorrt-rtx 2.14.0 with TensorRT-RTX 1.6.1, both with torch
2.14.1 on 2 CPU cores that others used too. CPU seconds of the process, the median of {rounds} runs each, in turns,
after a small model that loads what is loaded once. Torch-TensorRT asks for a GPU and loads each plan that it has
built; here it was told of one, and the loading left out. `python -m benchmarks.zoo.rival pairs` measures it.

| model | ours s | theirs s | ours / theirs | engines ours | engines theirs |
| --- | --: | --: | --: | --: | --: |
"""


def page(figures: Sequence[Figures]) -> str:
    """The text of docs/models.md."""
    names = {f.name for f in figures}
    versions = collections.Counter(f"torch {f.versions['torch']}, {said(f)}" for f in figures if f.versions)
    text = HEAD.format(
        count=len(names),
        versions=" and ".join(versions),
        summary=summary(figures) + lacking(figures),
        breaking=sum(bool(CASES[name].breaks) for name in names),
    )
    families = dict.fromkeys(f.family for f in figures)
    parts = [f"## {family}\n\n{TABLE}{rows(figures, family)}\n" for family in families]
    return text + misses(figures) + "## The figures\n\n" + COLUMNS + "#".join(["", *parts]) + rival_part()


def said(figures: Figures) -> str:
    return figures.versions["tensorrt"].replace("tensorrt_rtx", "TensorRT-RTX")


def summary(figures: Sequence[Figures]) -> str:
    """The lines of the table at the top."""
    by_mode = {mode: [f for f in figures if f.mode == mode] for mode in ("static", "dynamic")}
    plain = {mode: [f for f in found if not CASES[f.name].breaks] for mode, found in by_mode.items()}
    lines = {
        "models measured": {mode: str(len(found)) for mode, found in by_mode.items()},
        "one engine, of those that need not break": {
            mode: f"{sum(f.whole for f in found)} of {len(found)}" for mode, found in plain.items()
        },
        "median error": {mode: f"{statistics.median(errors_of(found)):.1e}" for mode, found in by_mode.items()},
        "largest error, less those marked * below": {
            mode: f"{max(errors_of(found)):.1e}" for mode, found in by_mode.items()
        },
        "compiled and answered": {
            mode: f"{sum(not f.failure for f in found)} of {len(found)}" for mode, found in by_mode.items()
        },
    }
    return "".join(f"| {name} | {cells['static']} | {cells['dynamic']} |\n" for name, cells in lines.items()) + "\n"


def lacking(figures: Sequence[Figures]) -> str:
    """What was not measured."""
    known = {(f.name, f.mode) for f in figures}
    missing = [name for name in CASES if (name, "dynamic") not in known]
    if not missing:
        return ""
    why = "On 2 cores torch's symbolic shapes take too long for them: 20 minutes were not enough where it was tried."
    return f"Not measured with dynamic sizes: {', '.join(missing)}.\n{why}\n\n"


def errors_of(figures: Iterable[Figures]) -> list[float]:
    """Of the models whose own answers hold when their inputs change a little."""
    return [error for f in figures if (error := worst(f)) is not None and f.moved is None] or [0.0]


def worst(figures: Figures) -> float | None:
    errors = [e for e in (figures.error, figures.other_error) if e is not None]
    return max(errors) if errors and not figures.failure else None


def rows(figures: Iterable[Figures], family: str) -> str:
    return "".join(row(f) for f in figures if f.family == family)


def row(f: Figures) -> str:
    name = f.name.rpartition("/")[2]
    if f.failure:
        return f"| {name} | {f.mode} | not measured: {reason_of(f)} |||||||||\n"
    error = worst(f)
    cells = [
        name,
        f.mode,
        str(f.nodes),
        str(sum(number for _, _, number in f.eager)),
        str(f.engines),
        str(f.layers),
        f"{f.convert_s:.1f}" if f.clock == "cpu" else "",
        f"{f.build_s:.1f}" if f.clock == "cpu" else "",
        f"{f.peak_mb:.0f}",
        f"{f.weights_mb:.0f}",
        ("" if error is None else f"{error:.1e}") + "*" * (f.moved is not None),
    ]
    return "| " + " | ".join(cells) + " |\n"


def misses(figures: Iterable[Figures]) -> str:
    """What is more than one engine, and why, a line for each model and mode."""
    lines = [f"- {f.name}, {f.mode}: {why(f)}\n" for f in figures if not f.whole]
    return "## Not one engine alone\n\n" + ("".join(lines) or "None.\n") + "\n"


def why(f: Figures) -> str:
    if f.failure:
        return f"not measured: {reason_of(f)}"
    told = [f"{f.engines} engine{'s' * (f.engines != 1)} from {f.graphs} graph{'s' * (f.graphs != 1)}"]
    told += [f"{CASES[f.name].breaks}"] if CASES[f.name].breaks else []
    told += [f"Dynamo: {one_line(text)}" for text in f.breaks[:2]]
    told += [f"{number} x `{target}`: {reason}" for target, reason, number in f.eager[:3]] if not f.breaks else []
    told += ["the model's own code makes a size a constant"] if f.specialized and f.recompiled else []
    told += [f"{f.recompiled} more graph{'s' * (f.recompiled != 1)} for the second sizes"] if f.recompiled else []
    told += [f"{one_line(reason)} ({number})" for reason, number in f.why_eager.items()]
    return "; ".join(told)


def reason_of(f: Figures) -> str:
    return one_line(f.failure.splitlines()[-1])


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:220]


def rival_part(path: Path = PACES) -> str:
    """The paired runs, empty where there are none."""
    found = [Pace(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    if not found:
        return ""
    sides: dict[str, dict[str, list[Pace]]] = {}
    for pace in found:
        sides.setdefault(pace.name, {}).setdefault(pace.side, []).append(pace)
    lines, ratios = [], []
    for name, by_side in sides.items():
        ours, theirs = (medians(by_side.get(side, ())) for side in ("ours", "theirs"))
        if ours and theirs:
            ratios.append(ours / theirs)
        cells = [name, shown(ours), shown(theirs), f"{ratios[-1]:.2f}" if ours and theirs else ""]
        lines.append("| " + " | ".join([*cells, *(engines(by_side, side) for side in ("ours", "theirs"))]) + " |\n")
    rounds = max(len(runs) for by_side in sides.values() for runs in by_side.values())
    median = f"\nMedian of the ratios: {statistics.median(ratios):.2f}, over {len(ratios)} models.\n" if ratios else ""
    return RIVAL.format(rounds=rounds) + "".join(lines) + median


def medians(paces: Iterable[Pace]) -> float | None:
    seconds = [pace.cpu_seconds for pace in paces if not pace.failure]
    return statistics.median(seconds) if seconds else None


def shown(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def engines(by_side: Mapping[str, Sequence[Pace]], side: str) -> str:
    runs = by_side.get(side, ())
    failed = [pace for pace in runs if pace.failure]
    if failed:
        return f"failed: {one_line(failed[-1].failure.splitlines()[-1])[:90]}"
    return str(runs[-1].engines) if runs else ""
