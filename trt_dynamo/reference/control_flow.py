"""From layers to a plan: which steps run, in which order, with loops and conditionals as steps of their own.

In: an `INetworkDefinition`. Out: a `Graph`, which makes plans. A loop is one step that runs its body's plan once per
iteration; a conditional is one step that runs the plan of the branch taken, and nothing of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trt_dynamo.errors import ConversionError, EngineError, Unsupported
from trt_dynamo.reference.layer import Layer, Run, dims, evaluates
from trt_dynamo.reference.steps import DataDependent, Frame, Runnable, Step, fits, order, run_plan

BOUNDARIES = ("RECURRENCE", "ITERATOR")  # their outputs are there when a loop's body starts


class Graph:
    """The layers of a network, by the tensors that they make; `constants` fills as plans reach constant layers."""

    def __init__(self, network: Any, given: Mapping[str, Tensor]) -> None:
        self.layers = [Layer(network.get_layer(i), given) for i in range(network.num_layers)]
        self.producers = {name: layer for layer in self.layers for name in layer.outputs}
        self.inputs = {network.get_input(i).name for i in range(network.num_inputs)}
        self.constants: dict[str, Tensor] = {}
        self.steps: dict[str, Runnable] = {}
        self.loops: dict[str, list[Layer]] = {}
        self.conditions: dict[str, str] = {}
        for layer in self.layers:
            if layer.kind in ("TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT"):
                self.loops.setdefault(layer.native.loop.name, []).append(layer)
            if layer.kind == "CONDITION":
                self.conditions[layer.native.conditional.name] = str(layer.inputs[0])

    def plan(self, targets: Sequence[str]) -> list[Runnable]:
        return order(targets, self.find)

    def find(self, tensor: str) -> Runnable | None:
        """The step that makes `tensor`; None for an input, a constant, or what an enclosing loop provides."""
        if tensor in self.inputs or tensor in self.constants:
            return None
        layer = self.producers.get(tensor)
        if layer is None:
            raise ConversionError(f"nothing in the network makes the tensor {tensor!r}")
        if layer.kind in BOUNDARIES:
            return None
        if layer.kind == "CONSTANT":
            self.constants[tensor] = read_constant(layer)
            return None
        key = f"loop {layer.native.loop.name}" if layer.kind == "LOOP_OUTPUT" else layer.name
        if key not in self.steps:
            self.steps[key] = self.prepare(layer)
        return self.steps[key]

    def prepare(self, layer: Layer) -> Runnable:
        if layer.kind == "LOOP_OUTPUT":
            return LoopStep(self, layer.native.loop.name)
        if layer.kind == "CONDITIONAL_OUTPUT":
            return BranchStep(self, layer)
        return Step(layer, self.constants)

    def assertions(self) -> list[Layer]:
        """The assertions that hold for the whole network, not for an iteration or a branch."""
        inside = self.reached_from(
            name for layer in self.layers if layer.kind in (*BOUNDARIES, "CONDITIONAL_INPUT") for name in layer.outputs
        )
        return [layer for layer in self.layers if layer.kind == "ASSERTION" and layer.inputs[0] not in inside]

    def reached_from(self, tensors: Iterable[str]) -> set[str]:
        """Every tensor that depends on one of `tensors`, themselves included."""
        reached: set[str] = set()
        waiting = list(tensors)
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += [out for layer in self.readers.get(name, []) for out in layer.outputs]
        return reached

    @functools.cached_property
    def readers(self) -> dict[str, list[Layer]]:
        """The layers whose results depend on a tensor, by its name."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for name in self.dependencies(layer):
                found.setdefault(name, []).append(layer)
        return found

    def dependencies(self, layer: Layer) -> list[str]:
        """The tensors that decide what a layer gives, those that it does not list as inputs included."""
        names = [name for name in layer.inputs if name is not None]
        if layer.kind == "CONDITIONAL_OUTPUT":
            names.append(self.conditions[layer.native.conditional.name])
        if layer.kind == "LOOP_OUTPUT":
            limits = [peer for peer in self.loops[layer.native.loop.name] if peer.kind == "TRIP_LIMIT"]
            names += [name for limit in limits for name in limit.inputs if name is not None]
        return names


def read_constant(layer: Layer) -> Tensor:
    """The value of a CONSTANT layer, in memory of its own: an engine bakes its constants too."""
    shape = dims(layer.native.shape)
    return layer.weights("weights", layer.outputs[0], layer.name).reshape(shape)


class BranchStep:
    """One output of a conditional."""

    def __init__(self, graph: Graph, layer: Layer) -> None:
        self.name = layer.name
        condition = graph.conditions[layer.native.conditional.name]
        self.inputs: list[str | None] = [condition]
        self.outputs = layer.outputs
        self.shapes = layer.output_shapes
        self.dtypes = [layer.dtype]
        self.branches = [(str(name), graph.plan([str(name)])) for name in layer.inputs]
        self.uses = frozenset({condition}).union(*(closure(plan, [name]) for name, plan in self.branches))
        self.condition = condition

    def execute(self, frame: Frame) -> None:
        condition = frame[self.condition]
        # Both branches have the same shape, so without values either will do.
        name, plan = self.branches[0 if condition.is_meta or bool(condition) else 1]
        for step in plan:
            if not all(frame.knows(output) for output in step.outputs):
                step.execute(frame)
        value = frame[name]
        if not fits(value.shape, self.shapes[0]):
            raise ConversionError(
                f"conditional output {self.name!r} has the shape {tuple(value.shape)}, not {self.shapes[0]}"
            )
        frame[self.outputs[0]] = value


def closure(plan: Sequence[Runnable], targets: Iterable[str]) -> frozenset[str]:
    """Every tensor that running `plan` may read or make."""
    return frozenset(targets).union(*(step.uses | set(step.outputs) for step in plan))


class LoopStep:
    """A whole loop: all its outputs at once."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.name = name
        layers = graph.loops[name]
        of_kind = {kind: [layer for layer in layers if layer.kind == kind] for kind in (*BOUNDARIES, "LOOP_OUTPUT")}
        self.states = [
            (layer.outputs[0], str(layer.inputs[0]), str(layer.inputs[1])) for layer in of_kind["RECURRENCE"]
        ]
        self.iterators = [
            (layer.outputs[0], str(layer.inputs[0]), layer.native.axis, layer.native.reverse)
            for layer in of_kind["ITERATOR"]
        ]
        self.results = [LoopResult(layer, {state[0] for state in self.states}) for layer in of_kind["LOOP_OUTPUT"]]
        self.outputs = [result.output for result in self.results]
        self.shapes = [result.shape for result in self.results]
        self.dtypes = [result.dtype for result in self.results]
        limits = {layer.native.kind.name: str(layer.inputs[0]) for layer in layers if layer.kind == "TRIP_LIMIT"}
        self.count, self.condition = limits.get("COUNT"), limits.get("WHILE")
        self.make_plans(graph)

    def make_plans(self, graph: Graph) -> None:
        """Plans of the body and of the condition; what they need from outside becomes this step's inputs."""
        starts = [state[0] for state in self.states] + [iterator[0] for iterator in self.iterators]
        varying = graph.reached_from(starts)
        outside: dict[str, None] = {}

        def find(tensor: str) -> Runnable | None:
            if tensor in varying:
                return graph.find(tensor)
            outside[tensor] = None
            return None

        self.test = order([self.condition], find) if self.condition else []
        body = [result.tensor for result in self.results] + [state[2] for state in self.states]
        self.body = order(body, find)
        needed = [state[1] for state in self.states] + [iterator[1] for iterator in self.iterators]
        needed += [name for name in [self.count, *(result.length for result in self.results)] if name is not None]
        self.inputs: list[str | None] = [*dict.fromkeys([*needed, *outside])]
        self.uses = frozenset(needed) | closure(self.body, body) | closure(self.test, []) | frozenset(outside)

    def execute(self, frame: Frame) -> None:
        if frame.device.type == "meta" and self.count is not None and frame[self.count].is_meta:
            raise DataDependent(f"loop {self.name!r} runs as often as the values say")
        limit = None if self.count is None else max(int(frame[self.count]), 0)
        states = {output: frame[initial] for output, initial, _ in self.states}
        gathered: list[list[Tensor]] = [[] for _ in self.results]
        trip = 0
        while limit is None or trip < limit:
            inner = frame.inner()
            inner.update(states)
            if self.condition is not None and not self.goes_on(inner):
                break
            for output, source, axis, reverse in self.iterators:
                inner[output] = self.element(frame[source], axis, reverse, trip, limit)
            run_plan([step for step in self.body if not all(name in inner for name in step.outputs)], inner)
            for kept, result in zip(gathered, self.results, strict=True):
                if result.length is not None:
                    kept.append(inner[result.tensor])
            states = {output: inner[update] for output, _, update in self.states}
            trip += 1
        for kept, result in zip(gathered, self.results, strict=True):
            frame[result.output] = states[result.tensor] if result.length is None else result.stacked(kept, frame)

    def goes_on(self, inner: Frame) -> bool:
        run_plan(self.test, inner)
        condition = inner[str(self.condition)]
        if condition.is_meta:
            raise DataDependent(f"loop {self.name!r} runs as often as the values say")
        return bool(condition)

    def element(self, source: Tensor, axis: int, reverse: bool, trip: int, limit: int | None) -> Tensor:
        if reverse and limit is None:
            raise EngineError(f"loop {self.name!r} iterates in reverse without a trip count")
        index = trip if not reverse or limit is None else limit - 1 - trip
        if not 0 <= index < source.shape[axis]:
            raise EngineError(f"loop {self.name!r} iterates past the end: {index} of {source.shape[axis]}")
        return source.select(axis, index)


class LoopResult:
    """A loop output: the last value of a recurrence, or the values of a tensor in all iterations."""

    def __init__(self, layer: Layer, recurrences: set[str]) -> None:
        self.kind = layer.native.kind.name
        self.axis = layer.native.axis
        self.tensor = str(layer.inputs[0])
        self.output = layer.outputs[0]
        self.length = layer.inputs[1] if self.kind != "LAST_VALUE" and layer.has_input(1) else None
        self.shape = layer.output_shapes[0]
        self.dtype = layer.dtype
        if self.kind == "LAST_VALUE" and self.tensor not in recurrences:
            raise Unsupported(f"loop output {layer.name!r}: TensorRT gives the last value of a recurrence only")
        if self.kind != "LAST_VALUE" and self.length is None:
            raise ConversionError(f"loop output {layer.name!r} lacks its length")

    def stacked(self, values: list[Tensor], frame: Frame) -> Tensor:
        length = int(frame[str(self.length)])
        if len(values) > length:
            raise EngineError(f"loop output {self.output!r} has room for {length} iterations and gets {len(values)}")
        if not values:
            shape = [length if i == self.axis else max(dim, 0) for i, dim in enumerate(self.shape)]
            return torch.zeros(shape, dtype=self.dtype, device=frame.device)
        # What a loop leaves without a value is undefined in TensorRT; zeros here.
        values = values + [torch.zeros_like(values[0])] * (length - len(values))
        return torch.stack(values[::-1] if self.kind == "REVERSE" else values, self.axis)


@evaluates("CONDITIONAL_INPUT", exact=True)
def conditional_input(layer: Layer) -> Run:
    return lambda x: x


@evaluates("ASSERTION", exact=True)
def assertion(layer: Layer) -> Run:
    name, message = layer.name, layer.native.message

    def run(condition: Tensor) -> tuple[Tensor, ...]:
        if not condition.is_meta and not bool(condition.all()):
            raise EngineError(f"assertion {name!r} does not hold: {message}")
        return ()

    return run
