"""Inductor, for what TensorRT does not take, where the user wants it. All that we use of Inductor is here.

Comes in: the outer graph of a partition, or a graph of Dynamo's. Goes out: a callable with eager's results; where
Inductor fails, eager itself, with the reason logged and counted. Must run inside of a backend: Inductor's guards on
sizes become Dynamo's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from trt_dynamo.aten_converters.layout import is_dense
from trt_dynamo.errors import EngineError, Unsupported, cut
from trt_dynamo.graph_breaks import ANOTHER_GO
from trt_dynamo.partition import Partitioned, Segment
from trt_dynamo.partition.eager_parts import eager_parts, order_of, unbound
from trt_dynamo.profiles import symbols_of
from trt_dynamo.reports import count
from trt_dynamo.runtime import profiling
from trt_dynamo.settings import Settings, warn_once

log = logging.getLogger(__name__)

# What holds for our graphs whatever the user's own configuration of Inductor says.
OPTIONS = {
    "fallback_random": True,  # the random numbers are eager's
    "freezing": False,  # weights are read at each call
    "triton.cudagraphs": False,  # results live as long as the caller wants
    "size_asserts": True,  # other strides than those promised are an error, not a wrong result
}

# What to do about the errors that say that Inductor cannot work on this machine, by the names of their classes.
ADVICE = {
    "InvalidCxxCompiler": "install a C++ compiler (for example the package g++), or name one in the variable CXX",
    "CppCompileError": "the C++ compiler failed: see that the headers of this Python (python3-dev) are installed",
    "TritonMissing": "install Triton: pip install triton",
    "GPUTooOldForTriton": "Triton has no code for this GPU",
}
LONGEST = 300  # of Inductor's words in a message


class NothingForTensorRT(Exception):
    """A graph without any segment: Inductor does better with it as it was before it was lowered for TensorRT."""


class InductorPart(torch.nn.Module):
    """Runs one part of a graph by Inductor's code. Should that fail, eager answers, then and from then on: a part
    writes nothing, so that it can begin anew.
    """

    def __init__(self, name: str, module: GraphModule, run: Callable[..., Any], settings: Settings) -> None:
        super().__init__()
        self.name = name
        self.eager = module
        self.run: Callable[..., Any] = run
        self.settings = settings
        self.nvtx = profiling.nvtx_wanted(settings)
        self.proven = False
        self.lock = threading.Lock()
        (output,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
        self.values: list[torch.Tensor] = [node.meta["val"] for node in output]
        # The results of which each call must see that they lie as the graph says, and the order of their dims.
        self.watched = {
            place: order
            for place, value in enumerate(self.values)
            if symbols_of([value]) and (order := order_of(value)) is not None
        }

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)  # without a module's hooks, which nobody can have put here

    def forward(self, *args: Any) -> Any:
        if not self.nvtx and not profiling.wanted():
            return self.answer(args)
        with profiling.marked(f"{self.name} by Inductor", self.nvtx):
            return self.answer(args)

    def answer(self, args: Sequence[Any]) -> Any:
        try:
            results = self.run(*args) if self.proven else self.first(args)
            return self.laid_out(results) if self.watched else results
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            answer = self.eager.forward(*args)  # an error here is the call's own fault, such as an index out of range
            if any(isinstance(arg, torch.Tensor) and not arg.numel() for arg in args):
                log.debug("%s: Inductor's code fails where a tensor is empty: %s", self.name, error)
                return answer  # Triton's launchers (torch 2.11) divide by the number of tiles; other calls have some
            if self.settings.strict:
                raise
            refused(self.name, error)
            self.run, self.proven, self.watched = self.eager.forward, True, {}
            return answer

    def first(self, args: Sequence[Any]) -> Any:
        """The first call, alone: Triton's kernels are tuned in it, and the results looked at."""
        with self.lock:
            results = self.run(*args)
            if not self.proven:
                for place, (value, result) in enumerate(zip(self.values, results, strict=True)):
                    self.look_at(place, value, result)
                self.proven = True
            return results

    def look_at(self, place: int, value: torch.Tensor, result: torch.Tensor) -> None:
        """Whether a result is what the graph says, since others rely on that. `EngineError` if it cannot be mended."""
        if result.dtype is not value.dtype or result.device != value.device or result.ndim != value.ndim:
            raise EngineError(f"Inductor made {describe(result)}, the graph says {describe(value)}")
        if symbols_of([value]) or not result.numel():
            return
        wrong = any(
            size > 1 and mine != its
            for size, mine, its in zip(result.shape, result.stride(), value.stride(), strict=True)
        )
        order = order_of(value)
        if result.shape != value.shape or (wrong and order is None):
            raise EngineError(f"Inductor made {describe(result)}, the graph says {describe(value)}")
        if wrong and order is not None:
            self.watched = {**self.watched, place: order}

    def laid_out(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results, those copied that lie otherwise than the graph says."""
        dense = list(results)
        for place, order in self.watched.items():
            result = dense[place]
            if not is_dense([*result.shape], [*result.stride()], order):
                back = sorted(range(len(order)), key=order.__getitem__)
                dense[place] = result.permute(order).contiguous().permute(back)
        return dense


def describe(value: torch.Tensor) -> str:
    return f"{value.dtype} on {value.device} of sizes {tuple(value.shape)} and strides {value.stride()}"


def compile_eager_parts(parts: Partitioned, settings: Settings, prefix: str) -> GraphModule:
    """The outer graph of a partition with its eager nodes in parts, each compiled by Inductor if that can be. `prefix`
    begins their names in logs and profiles.

    Raises:
        NothingForTensorRT: there is no segment, and something to compile.
        Exception: with `strict`, whatever Inductor raises.
    """
    eager = eager_parts(parts.module)
    if eager.segments and not parts.segments:
        raise NothingForTensorRT("TensorRT takes no node of it")
    for part in eager.segments:
        name = f"{prefix}.{part.name}"
        try:
            run = compile_part(part)
        except Exception as error:  # whatever it is, eager can do it
            if settings.strict and not isinstance(error, Unsupported):
                raise
            refused(name, error)
            continue
        count("inductor_parts")
        setattr(eager.module, part.name, InductorPart(name, part.module, run, settings))
    return eager.module


def compile_part(part: Segment) -> Callable[..., Any]:
    """Inductor's code for a part. The sizes stay those of the whole graph, so guards on them are Dynamo's."""
    missing = unbound(part.module)
    if missing:
        raise Unsupported(f"no input of the part shows the sizes {', '.join(sorted(map(str, missing)))}")
    values = [node.meta["val"] for node in part.module.graph.nodes if node.op == "placeholder"]
    every = [*values, *(node.meta.get("val") for node in part.module.graph.nodes)]
    mode = next(value.fake_mode for value in every if isinstance(value, FakeTensor))
    # A tracing context of its own: AOTAutograd would write into that of the whole graph.
    with tracing(TracingContext(mode)):
        return inductor(copy_of(part.module), values)


def inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The one call of Inductor. It takes the module for its own."""
    import torch._inductor

    compiled: Callable[..., Any] = torch._inductor.compile(module, list(inputs), options=OPTIONS)
    return compiled


def compile_graph(module: GraphModule, inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """A graph of Dynamo's, whole: compiled by Inductor, forward and backward, or in eager where that fails.

    Raises:
        Exception: with `strict`, whatever Inductor raises.
    """
    spare = copy_of(module)
    try:
        # The backward now and not at the first `backward()`, when it would be too late for eager.
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            compiled = inductor(module, inputs)
    except ANOTHER_GO:
        raise
    except Exception as error:  # whatever it is, eager can do it
        if settings.strict:
            raise
        refused("a graph", error)
        return spare.forward
    count("inductor_graphs")
    return compiled


def copy_of(module: GraphModule) -> GraphModule:
    """Another graph over the same tensors, since Inductor changes what it is given."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = GraphModule(module, graph)
    copy.meta = module.meta
    return copy


def refused(name: str, error: Exception) -> None:
    """Says and counts that eager runs what Inductor cannot."""
    inner = getattr(error, "inner_exception", None) or error
    kind = type(inner).__name__
    words = cut(" ".join(str(inner).split()), LONGEST)
    count("inductor_refusals", kind)
    if kind in ADVICE:
        warn_once(f"Inductor cannot compile here, so eager runs what it should have: {ADVICE[kind]}. ({kind}: {words})")
    else:
        log.warning("%s runs in eager, because Inductor cannot compile it: %s: %s", name, kind, words)
