"""Eager parts between engines against the same parts compiled by Inductor: the setting `fallback`.

A stack of blocks that turn their input by angles in float64, which TensorRT lacks, as rotary embeddings do: an engine,
a part, an engine, and so on. Timed twice, turn by turn: whole calls, and calls whose engines answer at once with what
they answered before, so that the parts and the host's work are left. On a GPU where there is one.

Usage: python -m benchmarks.fallback [--calls 100]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from trt_dynamo.reports import report, reset_report
from trt_dynamo.runtime import SegmentRunner

BLOCKS = 6
SHAPES = ((1, 16, 64), (8, 128, 256))
FALLBACKS = ("eager", "inductor")


class Block(nn.Module):
    """A gated layer whose values are turned by angles that depend on their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(self.up(self.norm(x)))
        even, odd = y.double().unflatten(-1, (-1, 2)).unbind(-1)
        places = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None]
        rates = torch.exp(-torch.arange(even.shape[-1], dtype=torch.float64, device=x.device) / even.shape[-1])
        turned = [even * torch.cos(places * rates) - odd * torch.sin(places * rates)]
        turned += [even * torch.sin(places * rates) + odd * torch.cos(places * rates)]
        result: torch.Tensor = x + self.down(torch.stack(turned, -1).flatten(-2).float())
        return result


def compiled(model: nn.Module, fallback: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    options: dict[str, Any] = {
        "runtime": "reference",
        "min_segment_nodes": 1,
        "strict": True,
        "cache": "off",
        "fallback": fallback,
    }
    return torch.compile(model, backend="tensorrt", options=options)


def at_once(answer: Callable[..., Any]) -> Callable[..., Any]:
    """`SegmentRunner.answer` of segments that know their answer from the first call."""

    def answer_again(module: SegmentRunner, args: Sequence[Any]) -> Any:
        known = vars(module)
        if "known" not in known:
            known["known"] = answer(module, args)
        return known["known"]

    return answer_again


def medians(runs: dict[str, Callable[[], Any]], calls: int, device: str) -> dict[str, float]:
    """Milliseconds a call, each in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for place in range(calls + 20):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if place >= 20:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(shape: tuple[int, int, int], calls: int, device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(shape[-1]) for _ in range(BLOCKS)]).to(device).eval()
    x = torch.randn(shape, device=device)
    runs: dict[str, Callable[[], Any]] = {}
    wanted = model(x)
    for fallback in FALLBACKS:
        reset_report()
        fast = compiled(model, fallback)
        started = time.perf_counter()
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
        seconds = time.perf_counter() - started
        counts = report()
        made = f"{counts['engines_built']} engines, {counts['inductor_parts']} compiled parts"
        print(f"{fallback}: {made}, {seconds:.1f} s to compile")
        runs[fallback] = lambda fast=fast: fast(x)  # type: ignore[misc]
    original = SegmentRunner.answer
    for what, answer in (("whole calls", original), ("engines that answer at once", at_once(original))):
        SegmentRunner.answer = answer  # type: ignore[method-assign]
        found = medians(runs, calls, device)
        SegmentRunner.answer = original  # type: ignore[method-assign]
        line = ", ".join(f"{name} {found[name]:.3f} ms" for name in FALLBACKS)
        print(f"{shape} on {device}, {what}: {line}, eager / inductor {found['eager'] / found['inductor']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    calls = parser.parse_args().calls
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # on a machine with other work, threads that wait for each other are all that is seen
    print(f"torch {torch.__version__}, one thread")
    with torch.no_grad():
        for shape in SHAPES:
            measure(shape, calls, device)


if __name__ == "__main__":
    main()
