"""The walk over a graph: arguments are looked up and bound, the converter runs, its result is checked against FX."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from trt_dynamo import log
from trt_dynamo.aten_converters.layout import memory_order
from trt_dynamo.aten_converters.left_to_eager import why_none
from trt_dynamo.aten_converters.network import CARRIED, HALVES, MAX_RANK, NamedWeight, Network, Tensor
from trt_dynamo.aten_converters.refittable import WeightBinding, weight_bindings
from trt_dynamo.aten_converters.registry import lookup
from trt_dynamo.aten_converters.size_floats import size_float
from trt_dynamo.aten_converters.stored_weights import put, stored_weights
from trt_dynamo.errors import ConversionError, TrtDynamoError, Unsupported
from trt_dynamo.profiles import Dim, Range, dim_of
from trt_dynamo.trt import TYPES, to_torch, to_trt, trt


@dataclasses.dataclass(frozen=True)
class Binding:
    """One input or output of an engine.

    `order` is the order of dims in memory: the engine sees `tensor.permute(order)`. `position` counts among the
    segment's arguments (inputs) or results (outputs). A `size` is a Python int that goes in as a host shape tensor.
    """

    name: str
    position: int
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    order: tuple[int, ...]
    size: bool = False
    value: Dim = 0  # of a size: its expression


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedNetwork:
    """A network that is complete, and what its inputs and outputs are. `constants`: layer name to the tensor behind
    it. `weights`: those that can be refitted, none where that was not asked for.
    """

    network: Network
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    constants: Mapping[str, torch.Tensor]
    weights: tuple[WeightBinding, ...] = ()


class Walker:
    """Converts nodes one by one into a `Network`. `place` makes the value of a node that was not converted here."""

    def __init__(self, net: Network, place: Callable[[Node], Any]) -> None:
        self.net = net
        self.place = place
        self.values: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        if node not in self.values:
            self.values[node] = self.place(node)
        return self.values[node]

    def argument(self, argument: Any) -> Any:
        """An FX argument as a converter gets it."""
        if isinstance(argument, Node):
            value = argument.meta.get("val")
            if isinstance(value, torch.SymInt):
                return dim_of(value)
            if isinstance(value, torch.SymFloat):
                return size_float(self.net, value)
            if isinstance(value, torch.Tensor | tuple | list):
                return self.value(argument)
            if isinstance(value, int | float | bool):
                return value
            raise Unsupported(f"an argument of type {type(value).__name__}")
        if isinstance(argument, list | tuple):
            return [self.argument(item) for item in argument]
        if isinstance(argument, torch.SymInt):
            return dim_of(argument)
        return argument

    def run(self, node: Node) -> None:
        """Converts one `call_function` node.

        Raises:
            Unsupported: it cannot be converted; the reason is for the user.
            ConversionError: its converter is wrong.
        """
        if node.target is operator.getitem:
            self.values[node] = self.argument(node.args[0])[node.args[1]]
            return
        converter = lookup(node.target)
        if converter is None:
            reason = why_none(node.target)
            raise Unsupported(f"no converter: {reason}" if reason else "no converter")
        expected = node.meta["val"]
        single = isinstance(expected, torch.Tensor)
        values = (expected,) if single else tuple(expected)
        used = used_results(node, len(values))
        for value, is_used in zip(values, used, strict=True):
            if is_used:
                refuse_type(value)
        net = self.net
        net.scope, net.source, net.expected, net.used, net.node = node.name, source_line(node), values, used, node
        try:
            bound = converter.bind(self.argument(node.args), {k: self.argument(v) for k, v in node.kwargs.items()})
            result = converter.function(net, **bound)
        except TrtDynamoError:
            raise
        except Exception as error:
            if any(isinstance(n.meta.get("val"), torch.SymFloat) for n in node.all_input_nodes):
                raise Unsupported(
                    f"a float that was made of a symbolic size, where a number must be known ({error})"
                ) from error
            raise ConversionError(
                f"the converter of {node.target} failed at {node.format_node()}: {type(error).__name__}: {error}"
            ) from error
        results = tuple(result) if isinstance(result, tuple | list) else (result,)
        if len(results) != len(values):
            raise ConversionError(f"{node.target} has {len(values)} results, its converter made {len(results)}")
        wrong = [r for r, is_used in zip(results, used, strict=True) if is_used and not isinstance(r, Tensor)]
        if wrong:
            raise ConversionError(f"the converter of {node.target} made no tensor but {wrong[0]!r}")
        checked = tuple(
            net.check(r, v, tuple(dim_of(d) for d in v.shape)) if u else None
            for r, v, u in zip(results, values, used, strict=True)
        )
        self.values[node] = checked[0] if single else checked


def used_results(node: Node, count: int) -> tuple[bool, ...]:
    """Which results of a node anybody reads."""
    if isinstance(node.meta["val"], torch.Tensor):
        return (True,)
    if any(user.target is not operator.getitem for user in node.users):
        return (True,) * count
    read = {user.args[1] for user in node.users}
    return tuple(index in read for index in range(count))


def refuse_type(value: Any) -> None:
    """Raises `Unsupported` for a value that no network can hold."""
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"a result of type {type(value).__name__}")
    if value.dtype not in TYPES and value.dtype not in CARRIED:
        raise Unsupported(f"TensorRT has no {str(value.dtype).removeprefix('torch.')}")
    if value.ndim > MAX_RANK:
        raise Unsupported(f"rank {value.ndim}: TensorRT's largest is {MAX_RANK}")
    if value.layout is not torch.strided:
        raise Unsupported(f"layout {value.layout}")


def source_line(node: Node) -> str:
    """The user's line that made the node, as `file:line, code`."""
    return last_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=64)
def last_line(trace: str) -> str:
    """Where a stack trace ends. The nodes that come of one line follow one another."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    return f"{found[-1][0]}:{found[-1][1]}, {found[-1][2].strip()}" if found else ""


def convert(
    graph: GraphModule,
    weights: Mapping[str, torch.Tensor],
    ranges: Mapping[sympy.Symbol, Range] | None = None,
    *,
    refit: bool = False,
    wide_products: bool = False,
) -> ConvertedNetwork:
    """Converts a segment's graph. `weights`: the placeholders that become constants, with their values; `ranges`: the
    sizes that the engine shall take; `refit`: whether the weights of its engine shall be replaceable; `wide_products`:
    whether matrix products of float16 shall add up in float32.

    Raises:
        Unsupported: a node cannot be converted after all, or a weight cannot be made replaceable.
        ConversionError: a converter is wrong.
    """
    net = Network(ranges, refit=refit, wide_products=wide_products)
    net.baked = weights
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs: dict[str, Binding] = {}
    named: list[tuple[Node, NamedWeight]] = []

    def weight_of(node: Node, dtype: torch.dtype | None = None) -> Tensor:
        value = weights[node.name]
        weight, name = net.weight(value.to(dtype or value.dtype), node.meta.get("weight_name", node.name))
        if name is not None:
            named.append((node, name))
        return weight

    def place(node: Node) -> Tensor:
        if node.op == "get_attr":
            return net.constant(getattr_path(graph, str(node.target)))
        if node.name in weights:
            return weight_of(node)
        value = node.meta["val"]
        order = memory_order(value) or tuple(range(value.ndim))
        shape = tuple(dim_of(d) for d in value.shape)
        tensor = net.input(node.name, value.dtype, [shape[axis] for axis in order])
        inputs[node.name] = Binding(node.name, placeholders.index(node), value.dtype, shape, order)
        return net.permute(tensor, [order.index(axis) for axis in range(len(order))])

    walker = Walker(net, place)

    def size_input(node: Node) -> Callable[[], trt.ITensor]:
        def read() -> trt.ITensor:
            tensor = net.input(node.name, torch.int64, ())
            inputs[node.name] = Binding(
                node.name, placeholders.index(node), torch.int64, (), (), size=True, value=dim_of(node.meta["val"])
            )
            return net.reshape(tensor, (1,)).raw

        return read

    with log.collected():
        for node in placeholders:
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and node.name not in weights:
                order = memory_order(value) or tuple(range(value.ndim))
                for axis, size in enumerate(value.shape):
                    net.sizes.declare(dim_of(size), lambda n=node: network_input(walker, n), order.index(axis))  # type: ignore[misc]
        for node in placeholders:
            if isinstance(node.meta["val"], torch.SymInt):
                net.sizes.declare_value(dim_of(node.meta["val"]), size_input(node))
        coded, unread = stored_weights(net, graph.graph.nodes)
        for node in graph.graph.nodes:
            if node.op != "call_function" or isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat):
                continue
            if node in unread:
                continue
            source = narrowed(node)
            if node in coded:
                net.scope, net.source = node.name, source_line(node)
                walker.values[node] = put(net, node, coded[node])
            elif source is not None and source.name in weights:
                walker.values[node] = weight_of(source, node.meta["val"].dtype)
            elif source is not None and source.op == "get_attr":
                value = getattr_path(graph, str(source.target))
                walker.values[node] = net.constant(value.to(node.meta["val"].dtype))
            else:
                walker.run(node)
        outputs = mark_outputs(net, walker, graph)
    # TensorRT wants a number that shapes nothing where all else is, in the memory of the device.
    for name, binding in inputs.items():
        inputs[name] = dataclasses.replace(binding, size=binding.size and net.inputs[name].is_shape_tensor)
    bindings = tuple(sorted(inputs.values(), key=lambda binding: binding.position))
    refittable = weight_bindings(net, placeholders, weights, named)
    return ConvertedNetwork(net, bindings, outputs, dict(net.constants), refittable)


def narrowed(node: Node) -> Node | None:
    """What the node casts from float32 to a half type. Of a weight the network then holds the small form alone."""
    if node.target not in (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default):
        return None
    source = node.args[0]
    if not isinstance(source, Node) or source.meta["val"].dtype is not torch.float32:
        return None
    return source if node.meta["val"].dtype in HALVES else None


def network_input(walker: Walker, node: Node) -> trt.ITensor:
    """The network's input for a placeholder, made now if nothing asked for it before."""
    walker.value(node)
    return walker.net.inputs[node.name]


def getattr_path(module: Any, path: str) -> Any:
    return operator.attrgetter(path)(module)


def mark_outputs(net: Network, walker: Walker, graph: GraphModule) -> tuple[Binding, ...]:
    """Marks the graph's results as outputs; each is a tensor of its own, in the memory order that FX states."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    bindings = []
    net.scope, net.source = "output", ""
    for position, node in enumerate(output.args[0]):
        tensor, value = walker.value(node), node.meta["val"]
        order = memory_order(value) or tuple(range(value.ndim))
        raw = net.permute(tensor, order).raw
        # A cast brings a carried type home; else an identity, because an input or a constant cannot be an output.
        if to_torch(raw.dtype) is not tensor.dtype:
            raw = net.raw_out(net.raw.add_cast(raw, to_trt(tensor.dtype)))
        else:
            raw = net.raw_out(net.raw.add_identity(raw))
        raw.name = f"result_{position}"
        net.raw.mark_output(raw)
        bindings.append(Binding(raw.name, position, tensor.dtype, tensor.shape, order))
    return tuple(bindings)
