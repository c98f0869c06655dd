"""One model of the zoo through `torch.compile(model, backend="tensorrt")`, in this process, with the reference
evaluator in the engines' place. Prints a line of JSON, the figures of `Figures`.

python -m benchmarks.zoo.measure NAME static|dynamic [--memory GIB]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo.exc import UserError
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError
from torch.utils._pytree import tree_map_only

from benchmarks.zoo.case import Case, Inputs, varying_dims
from benchmarks.zoo.every import CASES
from benchmarks.zoo.results import Figures, as_line, largest_error
from trt_dynamo import backend, engine_making, explain, report, trt
from trt_dynamo.graph_breaks import noted

UNSTABLE = 1e-3  # errors above it are looked at: the model itself may answer a hair's breadth with as much
OPTIONS: dict[str, Any] = {"runtime": "reference", "cache": "off", "rebuild": "sync", "progress": "off"}

# The stages, and the module that calls each.
STAGES = {"lower": backend, "partition": backend, "convert": engine_making, "build": engine_making}


class Watch:
    """What the stages of the backend were given and how long they took, while it is installed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.nodes = 0
        self.eager: collections.Counter[tuple[str, str]] = collections.Counter()
        self.engines = 0
        self.layers = 0
        self.depth: list[str] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for stage, module in STAGES.items():
                wrapped = functools.partial(self.timed, stage, getattr(module, stage))
                stack.enter_context(mock.patch.object(module, stage, wrapped))
            yield

    def timed(self, stage: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `work`; what stages inside of it take does not count for this one. CPU time, which others on the
        machine change little.
        """
        inner, started = sum(self.seconds.values()), time.process_time()
        result = work(*args, **kwargs)
        spent = time.process_time() - started
        self.seconds[stage] += spent - (sum(self.seconds.values()) - inner)
        if stage == "partition":
            self.nodes += len(result.verdicts)
            self.eager.update((v.target, v.reason) for v in result.verdicts if not v.ok)
        if stage == "convert":
            self.layers += result.network.raw.num_layers
        if stage == "build":
            self.engines += 1
        return result


def measure(case: Case, dynamic: bool) -> Figures:
    """The figures of one model."""
    torch.manual_seed(0)
    model = case.make()
    first = seeded(case, case.batches[0], case.sizes[0])
    other = seeded(case, case.batches[1], case.sizes[1])
    figures = Figures(case.name, case.family, "dynamic" if dynamic else "static", clock="cpu")
    figures.weights_mb = sum(t.nbytes for t in model.state_dict().values()) / 1e6
    figures.versions = {"torch": torch.__version__, "tensorrt": f"{trt.flavor()} {trt.version()}"}
    with torch.no_grad():
        wanted = call(model, first)
    watch = Watch()
    with watch.installed(), torch.no_grad(), noted() as breaks:
        fast, answer, seconds = compiled(model, case, first, other, dynamic, figures)
        figures.error = largest_error(answer, wanted)
        if figures.error > UNSTABLE:
            figures.moved = largest_error(call(model, nudged(first)), wanted)
        graphs = figures.graphs = report()["graphs"]
        figures.first_call_s = seconds
        figures.stages(watch.seconds)
        figures.nodes, figures.engines, figures.layers = watch.nodes, watch.engines, watch.layers
        figures.eager = [(target, reason, number) for (target, reason), number in watch.eager.most_common()]
        if dynamic and not case.breaks:
            figures.other_error = largest_error(call(fast, other), call(model, other))
            figures.recompiled = report()["graphs"] - graphs
    figures.breaks = [] if one_frame() else list(dict.fromkeys(breaks))
    told = report()
    figures.eager_graphs, figures.eager_calls = sum(told["eager_graphs"].values()), told["eager_calls"]
    figures.why_eager = {**told["eager_graphs"], **told["eager_reasons"]}
    figures.why_eager |= {build["error"]: 1 for build in told["builds"] if build["error"]}
    figures.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return figures


def one_frame() -> bool:
    """Whether Dynamo met one function and made a graph of all of it. It may tell of what it could not trace all the
    same, where it found another way. What it traces again for the second sizes is one more.
    """
    frames, told = counters["frames"], report()
    return bool(frames["total"] == frames["ok"] == told["graphs"] == 1 + told["guard_failures"])


def compiled(
    model: torch.nn.Module, case: Case, first: Inputs, other: Inputs, dynamic: bool, figures: Figures
) -> tuple[Callable[..., Any], Any, float]:
    """The compiled model, what it answers to `first`, and the seconds of that call. Where the model's own code makes a
    dim that we mark a constant, torch refuses the mark; it is then asked for what can vary.
    """
    marks: tuple[Callable[..., None] | None, ...] = (None,)
    if dynamic:
        marks = (torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic)
    for mark in marks:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="tensorrt", options=OPTIONS)
        given = copy.deepcopy(first)
        if mark is not None and not case.breaks:
            for tensor, dims in varying_dims(given, other):
                mark(tensor, dims)
        if case.breaks and dynamic:
            fast = torch.compile(model, backend="tensorrt", options=OPTIONS, dynamic=True)
        started = time.perf_counter()
        try:
            return fast, call(fast, given), time.perf_counter() - started
        except (UserError, ConstraintViolationError) as error:
            if mark is not torch._dynamo.mark_dynamic:
                raise
            figures.specialized = str(error)[:2000]
    raise AssertionError("unreachable")


def seeded(case: Case, batch: int, size: int) -> Inputs:
    torch.manual_seed(batch * 1000 + size)
    return case.inputs(batch, size)


def nudged(inputs: Inputs) -> Inputs:
    """The inputs, changed by about a millionth."""

    def nudge(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + 1e-6 * torch.randn_like(tensor)) if tensor.is_floating_point() else tensor

    found: Inputs = tree_map_only(torch.Tensor, nudge, inputs)
    return found


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    args, kwargs = copy.deepcopy(inputs)
    return function(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CASES, metavar="NAME")
    parser.add_argument("mode", choices=("static", "dynamic"))
    parser.add_argument("--memory", type=float, default=10, metavar="GIB")
    parser.add_argument("--explain", action="store_true", help="print what `trt_dynamo.explain` says instead")
    chosen = parser.parse_args()
    limit = int(chosen.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    case = CASES[chosen.name]
    torch._dynamo.config.allow_rnn = True
    torch._dynamo.config.capture_scalar_outputs = case.reads_numbers
    if chosen.explain:
        args, kwargs = seeded(case, case.batches[0], case.sizes[0])
        told = explain(case.make(), *args, options=OPTIONS, dynamic=chosen.mode == "dynamic" or None, **kwargs)
        sys.stdout.write(f"{told}\n")
        return
    sys.stdout.write(as_line(measure(case, chosen.mode == "dynamic")) + "\n")


if __name__ == "__main__":
    main()
