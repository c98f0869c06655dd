"""What a stream of requests of many sizes costs: graphs, engines and the reasons for them, and who answers the calls.

For each model: eager and the backend get the same requests, in one process. With a GPU, or with TRT_DYNAMO_RUNTIME=
reference anywhere (then the times say how fast the reference evaluator is, not TensorRT; the counts are the same).

    python -m benchmarks.request_stream [--requests 200] [--smallest 2] [--set NAME=VALUE ...] [--json FILE] [MODEL ...]
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks.streams import STREAMS, Arguments, Stream
from trt_dynamo.reports import report, reset_report
from trt_dynamo.runtime import wait_for_builds


def seconds(model: Callable[..., Any], arguments: Arguments) -> float:
    started = time.perf_counter()
    model(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(stream: Stream, requests: int, smallest: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one model: counts, reasons, and seconds of the later half of the requests."""
    torch._dynamo.reset()
    reset_report()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = stream.model().to(device)
    fast = torch.compile(net, backend="tensorrt", options=options)
    draw = random.Random(seed)
    eager_seconds, our_seconds = 0.0, 0.0
    for number in range(requests):
        arguments = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(device), stream.arguments(stream.sizes(draw, smallest))
        )
        eager, ours = seconds(net, arguments), seconds(fast, arguments)
        if number >= requests // 2:
            eager_seconds, our_seconds = eager_seconds + eager, our_seconds + ours
    wait_for_builds()
    counts = report()
    reasons = collections.Counter(build["reason"] for build in counts["builds"])
    return {
        "requests": requests,
        "graphs": counts["graphs"],
        "engines": counts["engines_built"] + counts["cache_hits"],
        "why": dict(reasons),
        "engine_calls": counts["engine_calls"],
        "eager_calls": counts["eager_calls"],
        "why_eager": {**counts["eager_reasons"], **counts["eager_graphs"]},
        "build_seconds": sum(build["seconds"] for build in counts["builds"]),
        "eager_seconds": eager_seconds,
        "our_seconds": our_seconds,
    }


def told(figures: dict[str, Any]) -> str:
    calls = figures["engine_calls"] + figures["eager_calls"]
    share = figures["engine_calls"] / calls if calls else 0.0
    why = ", ".join(f"{count} x {reason}" for reason, count in figures["why"].items())
    lines = [
        f"{figures['requests']} requests: {figures['graphs']} graphs, {figures['engines']} engines in "
        f"{figures['build_seconds']:.1f} s ({why or 'none'})",
        f"  segments' calls: {figures['engine_calls']} by engines, {figures['eager_calls']} by eager ({share:.0%})",
        f"  later half: eager {figures['eager_seconds']:.2f} s, ours {figures['our_seconds']:.2f} s, ratio "
        f"{figures['eager_seconds'] / max(figures['our_seconds'], 1e-9):.2f}",
    ]
    lines += [f"  eager: {count} x {reason}" for reason, count in figures["why_eager"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*STREAMS, []], help="the models; all of them by default")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--smallest", type=int, default=0, help="no size is below this; 0 and 1 are graphs of their own"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    options: dict[str, Any] = dict(text.split("=", 1) for text in given.set)
    figures = {}
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        for name in given.models or STREAMS:
            # An LSTM without steps is an error, in eager too.
            smallest = max(given.smallest, 1) if name.startswith("LSTM") else given.smallest
            figures[name] = measure(STREAMS[name], given.requests, smallest, given.seed, options)
            print(f"{name}: {told(figures[name])}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
