"""Runs a TensorRT network in PyTorch.

In: an `INetworkDefinition`, then tensors by input name. Out: tensors by output name.

The network is read once, at construction; a call does torch's work only. Half, bfloat16 and fp8 are computed in float32
and rounded to each layer's output dtype.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError
from trt_dynamo.log import collected
from trt_dynamo.reference.control_flow import Graph
from trt_dynamo.reference.layer import STORAGE, shape_of
from trt_dynamo.reference.steps import CPU, HOST_ELEMENTS, DataDependent, Frame, Runnable, Step, fits

Report = Callable[[str, float], None]  # takes a layer's name and its milliseconds, as `IProfiler.report_layer_time`


@dataclass(frozen=True)
class Signature:
    """An input or output of a network: dims (-1 for dynamic), the dims' names ("" for none), dtypes, and its role."""

    shape: tuple[int, ...]
    dim_names: tuple[str, ...]
    dtype: torch.dtype
    trt_dtype: str
    shape_tensor: bool  # its values decide shapes
    host: bool  # an engine reads or writes it on the CPU


class Evaluator:
    """A network, read and ready to run many times. It keeps copies of the weights, and nothing of TensorRT's.

    Args:
        network: an `INetworkDefinition`, complete.
        constants: the tensors behind weights that Python cannot read back (bf16, fp8, int4, fp4), by the name of the
            constant's tensor or layer, or as `<layer>.kernel`, `.bias`, `.scale`, `.shift`, `.power`. INT4 as int8
            values, FP4 as the float32 values. What can be read back is read from the network, whatever is given here.

    Raises:
        Unsupported: a layer that cannot be evaluated; the text names the layer and why.
        ConversionError: TensorRT cannot infer a shape, or the network is not complete.
    """

    def __init__(self, network: Any, constants: Mapping[str, Tensor] | None = None) -> None:
        with collected():
            graph = Graph(network, constants or {})
            try:
                self.read(network, graph)
            finally:
                for layer in graph.layers:
                    layer.let_go()
        self.unused = last_uses(self.plan, [*self.outputs])
        self.constants = {CPU: graph.constants}
        self.replaceable: set[str] = set()
        self.device: torch.device | None = None  # where calls run, if not on the inputs' device
        self.moved: dict[torch.device, dict[str, Tensor]] = {}
        self.kept: dict[torch.device, set[int]] = {}

    def read(self, network: Any, graph: Graph) -> None:
        """Makes the plan: what the outputs need, then the assertions."""
        self.inputs = signatures([network.get_input(i) for i in range(network.num_inputs)])
        self.outputs = signatures([network.get_output(i) for i in range(network.num_outputs)])
        self.plan: list[Runnable] = graph.plan(list(self.outputs))
        asserted = graph.assertions()
        checks = graph.plan([str(layer.inputs[0]) for layer in asserted])
        self.plan += [step for step in checks if step not in self.plan]
        self.plan += [Step(layer, graph.constants) for layer in asserted]

    def __call__(
        self, inputs: Mapping[str, Tensor], intermediates: bool = False, report: Report | None = None
    ) -> dict[str, Tensor]:
        """The network's outputs by name, on the inputs' device; see `evaluate`. `report` is told of each layer, and a
        GPU is then waited for after each.
        """
        inputs_on = self.check(inputs)
        device = self.device or inputs_on
        frame = Frame(self.constants_on(device), device, self.moved.setdefault(device, {}))
        frame.update(inputs)
        with plain_arithmetic():
            for step, unused in zip(self.plan, self.unused, strict=True):
                if report is None:
                    step.execute(frame)
                else:
                    execute_timed(step, frame, report)
                if not intermediates:
                    for name in unused:
                        frame.pop(name, None)
        names = [*frame] if intermediates else []
        found = {name: frame[name].to(device) for name in [*names, *self.outputs]}
        # What is a constant, or a view of one, is copied, so that nobody can write into the constants.
        kept = self.storages(device)
        return {name: value.clone() if address_of(value) in kept else value for name, value in found.items()}

    def make_replaceable(self, names: Iterable[str], device: torch.device) -> None:
        """Lets `replace` change these constants. From now on there is one copy of each, and calls run on `device`."""
        self.replaceable, self.device = {*names}, device
        self.constants = {CPU: self.constants[CPU]}
        self.constants[CPU].update({name: self.constants[CPU][name].to(device) for name in self.replaceable})

    def replace(self, name: str, value: Tensor) -> None:
        """Copies `value`, flat, over a constant's memory: on a GPU in the order of the present stream."""
        constant = self.constants[CPU][name]
        with torch.inference_mode():  # the constant may come from there
            constant.copy_(value.reshape(constant.shape))

    def storages(self, device: torch.device) -> set[int]:
        """The addresses of the constants' memory, on the CPU and on the device."""
        if device not in self.kept:
            places = {CPU, device}
            self.kept[device] = {address_of(value) for place in places for value in self.constants[place].values()}
        return self.kept[device].union(address_of(value) for value in self.moved[device].values())

    def check(self, inputs: Mapping[str, Tensor]) -> torch.device:
        """The device to run on, after the inputs' names, dtypes and shapes are compared with the network's."""
        if inputs.keys() != self.inputs.keys():
            raise EngineError(f"the network's inputs are {sorted(self.inputs)}; given are {sorted(inputs)}")
        named: dict[str, int] = {}
        for name, signature in self.inputs.items():
            value = inputs[name]
            if value.dtype != signature.dtype:
                raise EngineError(f"input {name!r} is {value.dtype}; the network says {signature.dtype}")
            if not fits(value.shape, signature.shape):
                raise EngineError(
                    f"input {name!r} has the shape {tuple(value.shape)}; the network says {signature.shape}"
                )
            check_dim_names(name, value.shape, signature.dim_names, named)
        return next((value.device for value in inputs.values() if value.device != CPU), CPU)

    def shapes(self, inputs: Mapping[str, Tensor], largest: bool = False) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes for these inputs; -1 where a dim depends on values. With `largest`, as they are when
        every element is found.

        Of the inputs only the shapes count, but of shape tensors the values, on the CPU.

        Raises:
            EngineError: the inputs do not fit the network, or a layer cannot run on these shapes.
        """
        self.check(inputs)
        meta = torch.device("meta")
        given = {name: value if self.inputs[name].shape_tensor else value.to(meta) for name, value in inputs.items()}
        frame = Frame(self.constants_on(meta), meta, self.moved.setdefault(meta, {}))
        frame.update(given)
        with plain_arithmetic():
            for step in self.plan:
                try:
                    step.execute(frame)
                except DataDependent:
                    # Unknown, unless TensorRT knows the shape whatever the values.
                    shapes = largest_shapes(step, frame) if largest else step.shapes
                    for name, shape, dtype in zip(step.outputs, shapes, step.dtypes, strict=True):
                        if -1 not in shape:
                            frame[name] = torch.empty(shape, dtype=dtype, device=meta)
        return {
            name: tuple(frame[name].shape) if frame.knows(name) else found.shape for name, found in self.outputs.items()
        }

    def constants_on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self.constants:
            self.constants[device] = {
                name: value if stays_on_host(value) and name not in self.replaceable else value.to(device)
                for name, value in self.constants[CPU].items()
            }
        return self.constants[device]


def execute_timed(step: Runnable, frame: Frame, report: Report) -> None:
    """Runs a step, on a GPU until it is done, and reports its milliseconds."""
    wait = torch.cuda.current_stream(frame.device).synchronize if frame.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    step.execute(frame)
    wait()
    report(step.name, 1000 * (time.perf_counter() - started))


def largest_shapes(step: Runnable, frame: Frame) -> list[tuple[int, ...]]:
    """The step's output shapes where all that it looks at is found."""
    source = step.inputs[0] if isinstance(step, Step) and step.kind == "NON_ZERO" else None
    if source is None or not frame.knows(source):
        return step.shapes
    return [(frame[source].ndim, frame[source].numel())]


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Without gradients, and without the caller's autocast, which would change what is computed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def address_of(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def stays_on_host(value: Tensor) -> bool:
    return not value.is_floating_point() and value.numel() <= HOST_ELEMENTS


def check_dim_names(name: str, shape: Sequence[int], dim_names: Sequence[str], named: dict[str, int]) -> None:
    """Dims of the same name must be equal across all inputs; `named` remembers those seen."""
    for dim, dim_name in zip(shape, dim_names, strict=True):
        if dim_name and named.setdefault(dim_name, dim) != dim:
            raise EngineError(f"input {name!r}: the dim {dim_name!r} is {dim}, and {named[dim_name]} elsewhere")


def signatures(tensors: Iterable[Any]) -> dict[str, Signature]:
    found = {}
    for tensor in tensors:
        shape = shape_of(tensor, "network")
        names = tuple(tensor.get_dimension_name(i) or "" for i in range(len(shape))) if tensor.is_network_input else ()
        decides = tensor.is_shape_tensor
        found[tensor.name] = Signature(
            shape=shape,
            dim_names=names,
            dtype=STORAGE[tensor.dtype.name],
            trt_dtype=tensor.dtype.name,
            shape_tensor=decides,
            host=decides and (tensor.is_network_input or not tensor.is_execution_tensor),
        )
    return found


def last_uses(plan: Sequence[Runnable], kept: Iterable[str]) -> list[list[str]]:
    """For each step of the plan, the tensors that nothing reads after it."""
    seen = set(kept)
    unused = []
    for step in reversed(plan):
        names = (step.uses | set(step.outputs)) - seen
        seen |= names
        unused.append([*names])
    return unused[::-1]


def evaluate(
    network: Any,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
    intermediates: bool = False,
) -> dict[str, Tensor]:
    """Runs `network` once; use `Evaluator` to run one often.

    Args:
        network: an `INetworkDefinition`.
        inputs: a tensor for every input, of the network's dtype and a shape that it allows; all on one device, but
            that shape tensors may be on the CPU.
        constants: see `Evaluator`.
        intermediates: return every tensor that the outputs needed, by name, inputs included, not only the outputs.

    Raises:
        Unsupported: a layer that cannot be evaluated.
        ConversionError: a layer gives another shape or dtype than TensorRT infers.
        EngineError: wrong inputs, or values that a layer cannot run on (an index out of range, a failed assertion).
    """
    return Evaluator(network, constants)(inputs, intermediates)
