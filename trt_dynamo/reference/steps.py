"""One step of a plan: a layer's function between named tensors.

In: a `Layer`, then a `Frame` of tensors by name. Out: the layer's outputs, put in the frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trt_dynamo.errors import ConversionError, EngineError, TrtDynamoError
from trt_dynamo.reference.layer import LOW_FLOATS, RULES, STORAGE, Layer, Run

CPU = torch.device("cpu")

# Integer constants up to this size stay on the host, as TensorRT's shape tensors do, so that reading one needs no GPU.
HOST_ELEMENTS = 64


class DataDependent(TrtDynamoError):
    """A shape depends on values that are not there when only shapes are inferred."""


class Frame(dict[str, Tensor]):
    """The tensors of one call, or of one iteration of a loop, by name; what it lacks comes from its parent."""

    def __init__(self, parent: Mapping[str, Tensor], device: torch.device, moved: dict[str, Tensor]) -> None:
        super().__init__()
        self.parent = parent
        self.device = device
        self.moved = moved

    def __missing__(self, name: str) -> Tensor:
        try:
            return self.parent[name]
        except KeyError:
            raise DataDependent(f"the tensor {name!r} is not known") from None

    def knows(self, name: str) -> bool:
        return name in self or (self.parent.knows(name) if isinstance(self.parent, Frame) else name in self.parent)

    def inner(self) -> Frame:
        """A frame for one iteration of a loop."""
        return Frame(self, self.device, self.moved)

    def on_device(self, name: str, value: Tensor) -> Tensor:
        """A host tensor on the call's device. The copy of a constant is kept for the calls to come."""
        kept = self.moved.get(name)
        if kept is not None:
            return kept
        result = value.to(self.device, non_blocking=True)
        if self.is_constant(name):
            self.moved[name] = result
        return result

    def is_constant(self, name: str) -> bool:
        if name in self:
            return False
        return self.parent.is_constant(name) if isinstance(self.parent, Frame) else name in self.parent


class Runnable(Protocol):
    """What a plan is made of: `inputs` are known before, `outputs` afterwards; `uses` is all that it may read."""

    name: str
    inputs: list[str | None]
    outputs: list[str]
    uses: frozenset[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]

    def execute(self, frame: Frame) -> None: ...


def run_plan(plan: Sequence[Runnable], frame: Frame) -> None:
    for step in plan:
        step.execute(frame)


class Step:
    """A layer, prepared. Its own weights go into `constants`, as float32 where they are floats."""

    def __init__(self, layer: Layer, constants: dict[str, Tensor]) -> None:
        rule = RULES.get(layer.kind)
        if rule is None:
            raise layer.unsupported("this kind of layer has no evaluation")
        self.name = layer.name
        self.kind = layer.kind
        self.inputs = layer.inputs
        self.outputs = layer.outputs
        self.uses = frozenset(name for name in layer.inputs if name is not None)
        self.host = rule.host
        self.places = rule.places
        self.exact = rule.exact
        self.data_dependent = rule.data_dependent
        self.shapes = layer.output_shapes
        self.fitting: list[tuple[int, ...]] = [*self.shapes]  # the last shapes seen that fit
        self.dtypes = [STORAGE[name] for name in layer.output_types]
        self.weights: dict[str, str] = {}
        for role in rule.weights:
            value = layer.weights(role)
            if value.numel():
                self.weights[role] = f"<{role} of {layer.name}>"
                constants[self.weights[role]] = value.float()
        run = rule.prepare(layer)
        self.run = run if rule.exact or LOW_FLOATS.isdisjoint(layer.input_types) else widened(run)

    def execute(self, frame: Frame) -> None:
        if self.data_dependent and frame.device.type == "meta":
            raise DataDependent(f"layer {self.name!r} ({self.kind}) makes as much as it finds")
        arguments = [None if name is None else frame[name] for name in self.inputs]
        if frame.device != CPU:
            arguments = self.placed(arguments, frame)
        keywords: dict[str, Any] = {role: frame[name] for role, name in self.weights.items()}
        if self.places:
            keywords["device"] = frame.device
        try:
            found = self.run(*arguments, **keywords)
        except TrtDynamoError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            given = ", ".join("none" if x is None else f"{x.dtype} {tuple(x.shape)}" for x in arguments)
            raise EngineError(f"layer {self.name!r} ({self.kind}) cannot run on {given}: {error}") from error
        results = found if isinstance(found, tuple) else (found,)
        for index, value in enumerate(results):
            frame[self.outputs[index]] = self.settled(index, value)

    def placed(self, arguments: list[Tensor | None], frame: Frame) -> list[Tensor | None]:
        """The arguments on one device: the host if all are there; what is read on the host, always on the host."""
        device = any(x is not None and x.device != CPU for i, x in enumerate(arguments) if i not in self.host)
        placed: list[Tensor | None] = []
        for index, (name, value) in enumerate(zip(self.inputs, arguments, strict=True)):
            if value is None or name is None:
                placed.append(None)
            elif index in self.host:
                if value.is_meta:
                    raise DataDependent(f"layer {self.name!r} reads the values of {name!r}")
                placed.append(value.cpu())
            elif device and value.device == CPU:
                placed.append(frame.on_device(name, value))
            else:
                placed.append(value)
        return placed

    def settled(self, index: int, value: Tensor) -> Tensor:
        """The value in the output's dtype, its shape compared with what TensorRT infers."""
        dtype, shape = self.dtypes[index], self.shapes[index]
        if value.dtype != dtype:
            if self.exact:
                raise ConversionError(f"layer {self.name!r} ({self.kind}) gives {value.dtype}; TensorRT infers {dtype}")
            value = value.to(dtype)
        if value.shape == self.fitting[index]:
            return value
        if not fits(value.shape, shape):
            raise ConversionError(
                f"layer {self.name!r} ({self.kind}) gives the shape {tuple(value.shape)}; TensorRT infers {shape}"
            )
        self.fitting[index] = value.shape
        return value


def fits(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    """Whether `shape` is what `pattern` says, where -1 in the pattern stands for any dim."""
    return len(shape) == len(pattern) and all(want in (-1, dim) for dim, want in zip(shape, pattern, strict=True))


def widened(run: Run) -> Run:
    """`run`, given its low floats as float32."""

    @functools.wraps(run)
    def wide(*arguments: Tensor | None, **keywords: Any) -> Any:
        return run(*[widen(x) for x in arguments], **keywords)

    return wide


def widen(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.is_floating_point() else x


Find = Callable[[str], Runnable | None]


def order(targets: Sequence[str], find: Find) -> list[Runnable]:
    """The steps that `targets` need, each after those that it needs.

    `find` gives the step that makes a tensor, or None for one that is there already.
    """
    plan: list[Runnable] = []
    state: dict[int, bool] = {}  # by id of the step: False while its inputs are visited, True when it is in the plan
    stack = [(step, False) for target in reversed(targets) if (step := find(target)) is not None]
    while stack:
        step, visited = stack.pop()
        if visited:
            state[id(step)] = True
            plan.append(step)
            continue
        if id(step) in state:
            continue
        state[id(step)] = False
        stack.append((step, True))
        for name in reversed(step.inputs):
            needed = None if name is None else find(name)
            if needed is None or state.get(id(needed)):
                continue
            if id(needed) in state:
                raise ConversionError(f"the network has a cycle through {step.name!r} outside of a loop")
            stack.append((needed, False))
    return plan
