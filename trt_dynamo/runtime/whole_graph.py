"""A whole compiled call as one CUDA graph: the engines, and what eager or Inductor runs between them.

Comes in: what computes a lowered graph, as it is called by AOTAutograd. Goes out: the same, replayed where it can be.
Each replay looks at the weights of its engines, as their own calls do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from trt_dynamo.errors import EngineError
from trt_dynamo.reports import CALLS
from trt_dynamo.runtime import profiling
from trt_dynamo.runtime.cuda_graphs import Capture, Graph, Graphs
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.one_look import can_be_joined, joined
from trt_dynamo.runtime.ports import items_at
from trt_dynamo.runtime.streams import current_device, current_stream, is_capturing

if TYPE_CHECKING:
    from trt_dynamo.runtime.slots import Slot
    from trt_dynamo.weights import Snapshot

log = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Sequence[Any]]


@dataclasses.dataclass(eq=False)
class CapturedUse:
    """An engine in a captured call, and the weights that it had."""

    slot: Slot
    engine: Engine
    held: Snapshot | None
    tensors: Sequence[torch.Tensor]  # the segment's weights in the call that was captured,
    positions: list[int] = dataclasses.field(default_factory=list)  # and their places among the call's arguments

    def place(self, args: Sequence[Any]) -> None:
        """Finds the weights among the arguments."""
        known = {id(arg): i for i, arg in enumerate(args)}
        missing = [t for t in self.tensors if id(t) not in known]
        if missing:
            raise EngineError("a weight is no argument of the call")
        self.positions, self.tensors = [known[id(t)] for t in self.tensors], ()

    def ready(self) -> bool:
        """Before a replay: whether the engine still has the weights that it was captured with."""
        fitted = self.slot.fitted
        return fitted is not None and fitted[0] is self.engine and fitted[1] is self.held


class Weights:
    """The weights of some engines, among the arguments of a call."""

    def __init__(self, snapshot: Snapshot, positions: Sequence[int]) -> None:
        self.snapshot, self.take = snapshot, items_at(positions)

    def begin(self) -> None:
        self.snapshot.begin()

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether they are those of the call."""
        return self.snapshot.holds(self.take(args))


def weights_of(uses: Sequence[CapturedUse], args: Sequence[Any]) -> list[Weights]:
    """What to look at in each replay: all at once where that can be, else engine by engine."""
    baked = [(use.held, [args[i] for i in use.positions]) for use in uses if use.held is not None]
    places = [use.positions for use in uses if use.held is not None]
    if len(baked) > 1 and can_be_joined(baked):
        return [Weights(joined(baked), [position for each in places for position in each])]
    return [Weights(held, positions) for (held, _), positions in zip(baked, places, strict=True)]


class WholeGraph:
    """Calls `run`, or replays it. Takes its arguments as a list.

    Args:
        name: for the log, and for profilers.
        run: the function of AOTAutograd's arguments.
        weights: the positions of those that are the same tensors, in general, from call to call.
        index: the GPU.
        most: how many combinations of shapes have a graph.
    """

    _boxed_call = True

    def __init__(self, name: str, run: Boxed, weights: Collection[int], index: int, most: int) -> None:
        self.run, self.weights, self.index = run, frozenset(weights), index
        self.name = f"{name} by CUDA graph"
        self.graphs = Graphs(name, index, most)
        self.varying: list[int] | None = None  # the arguments that are no weights

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.graphs.refused is not None or PRESENT.larger is not None:
            return self.run(args)
        stream = current_stream(self.index)
        if current_device() != self.index or (stream and is_capturing()):
            return self.run(args)
        if self.varying is None:
            self.varying = [i for i in range(len(args)) if i not in self.weights]
        graph = self.graphs.find(tuple([described(args[i]) for i in self.varying]), args, stream, self.captured)
        if graph is None:
            return self.run(args)
        with profiling.named(self.name):
            results = self.replay(graph, args)
        if results is None:
            self.graphs.drop(graph)
            return self.run(args)
        return results

    def captured(self, capture: Capture, args: Sequence[Any]) -> Sequence[Any]:
        """The call for its graph, and where its engines' weights are among the arguments."""
        results = self.run(list(args))
        for use in capture.uses:
            use.place(args)
        return results

    def replay(self, graph: Graph, args: Sequence[Any]) -> Sequence[Any] | None:
        """The results; None where an engine in the graph no longer has the weights of the call."""
        entered = []
        try:
            for use in graph.uses:
                if use.engine.weights:  # they can be refitted: not now
                    use.engine.gate.enter()
                    entered.append(use.engine.gate)
                if not use.ready():
                    return None
                if not graph.replays:
                    use.engine.in_graphs.add(graph)
            if graph.weights is None:
                graph.weights = weights_of(graph.uses, args)
            for weights in graph.weights:
                weights.begin()
            results = graph.replay(args)
        finally:
            for gate in entered:
                gate.leave()
        if results is None or not all(weights.holds(args) for weights in graph.weights):
            return None
        for use in graph.uses:
            use.slot.served += 1
            CALLS.tick()
        return results


def why_not_whole(module: GraphModule) -> str | None:
    """What in a lowered graph keeps its calls from being captured whole, or None. What this overlooks shows when a call
    is captured.
    """
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        for tag, why in HINDRANCES.items():
            if tag in tags:
                return f"{node.target} {why}"
        values = node.meta.get("val")
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                return f"{node.name} is on {value.device}"
    return None


HINDRANCES = {
    torch.Tag.nondeterministic_seeded: "draws random numbers, which torch counts on the host",
    torch.Tag.data_dependent_output: "gives the host a value from the GPU",
    torch.Tag.dynamic_output_shape: "has a result whose size depends on data",
}


def described(value: Any) -> Any:
    """What the work depends on: shape and strides of a tensor, a number itself."""
    return (value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
