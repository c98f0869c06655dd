"""From a segment's graph to a network that is complete, and what its inputs, outputs and weights are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import sympy
import torch
from torch.fx import GraphModule, Node

from trt_dynamo import log
from trt_dynamo.aten_converters.layout import engine_order
from trt_dynamo.aten_converters.network import HALVES, NamedWeight, Network, Tensor
from trt_dynamo.aten_converters.refittable import WeightBinding, weight_bindings
from trt_dynamo.aten_converters.stored_weights import put, stored_weights
from trt_dynamo.aten_converters.walker import Walker, getattr_path, source_line
from trt_dynamo.profiles import Dim, Range, dim_of
from trt_dynamo.trt import to_torch, to_trt, trt


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
    conversion = Conversion(net, graph, weights)
    with log.collected():
        conversion.declare_sizes()
        conversion.convert_nodes()
        outputs = conversion.mark_outputs()
    refittable = weight_bindings(net, conversion.placeholders, weights, conversion.named)
    return ConvertedNetwork(net, conversion.bindings(), outputs, dict(net.constants), refittable)


class Conversion(Walker):
    """A segment's graph on its way into a network. `inputs` are those that something has asked for, `named` the weights
    that can be refitted, by their placeholders.
    """

    def __init__(self, net: Network, graph: GraphModule, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(net)
        self.graph, self.weights = graph, weights
        self.placeholders: list[Node] = graph.graph.find_nodes(op="placeholder")
        self.inputs: dict[str, Binding] = {}
        self.named: list[tuple[Node, NamedWeight]] = []

    def place(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            return self.net.constant(getattr_path(self.graph, str(node.target)))
        return self.weight(node) if node.name in self.weights else self.input(node)

    def weight(self, node: Node, dtype: torch.dtype | None = None) -> Tensor:
        """A placeholder as a constant, perhaps of another type."""
        value = self.weights[node.name]
        weight, name = self.net.weight(value.to(dtype or value.dtype), node.meta.get("weight_name", node.name))
        if name is not None:
            self.named.append((node, name))
        return weight

    def input(self, node: Node) -> Tensor:
        """A placeholder as an input, which lies in memory as FX states."""
        value = node.meta["val"]
        order, shape = engine_order(value), tuple(dim_of(d) for d in value.shape)
        tensor = self.net.input(node.name, value.dtype, [shape[axis] for axis in order])
        self.inputs[node.name] = Binding(node.name, self.placeholders.index(node), value.dtype, shape, order)
        return self.net.permute(tensor, [order.index(axis) for axis in range(len(order))])

    def raw_input(self, node: Node) -> trt.ITensor:
        """The network's input for a placeholder, made now if nothing asked for it before."""
        self.value(node)
        return self.net.inputs[node.name]

    def size_input(self, node: Node) -> trt.ITensor:
        """A size as an input: a one-element shape tensor."""
        tensor = self.net.input(node.name, torch.int64, ())
        self.inputs[node.name] = Binding(
            node.name,
            self.placeholders.index(node),
            torch.int64,
            (),
            (),
            size=True,
            value=dim_of(node.meta["val"]),
        )
        return self.net.reshape(tensor, (1,)).raw

    def declare_sizes(self) -> None:
        """Says where sizes can be read: off shapes of inputs, and what those do not tell off inputs of their own."""
        for node in self.placeholders:
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and node.name not in self.weights:
                order, read = engine_order(value), functools.partial(self.raw_input, node)
                for axis, size in enumerate(value.shape):
                    self.net.sizes.declare(dim_of(size), read, order.index(axis))
        for node in self.placeholders:
            if isinstance(node.meta["val"], torch.SymInt):
                self.net.sizes.declare_value(dim_of(node.meta["val"]), functools.partial(self.size_input, node))

    def convert_nodes(self) -> None:
        """Makes the value of each node that computes tensors; sizes are computed where something needs them."""
        coded, unread = stored_weights(self.net, self.graph.graph.nodes)
        for node in self.graph.graph.nodes:
            if node.op != "call_function" or node in unread:
                continue
            if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat):
                continue
            source = narrowed(node)
            if node in coded:
                self.net.scope, self.net.source = node.name, source_line(node)
                self.values[node] = put(self.net, coded[node])
            elif source is not None and source.name in self.weights:
                self.values[node] = self.weight(source, node.meta["val"].dtype)
            elif source is not None and source.op == "get_attr":
                value = getattr_path(self.graph, str(source.target))
                self.values[node] = self.net.constant(value.to(node.meta["val"].dtype))
            else:
                self.run(node)

    def mark_outputs(self) -> tuple[Binding, ...]:
        """Marks the graph's results as outputs; each is a tensor of its own, in the memory order that FX states."""
        net = self.net
        (output,) = self.graph.graph.find_nodes(op="output")
        bindings = []
        net.scope, net.source = "output", ""
        for position, node in enumerate(output.args[0]):
            tensor, order = self.value(node), engine_order(node.meta["val"])
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

    def bindings(self) -> tuple[Binding, ...]:
        """The inputs, in the order of the segment's arguments."""
        # TensorRT wants a number that shapes nothing where all else is, in the memory of the device.
        settled = [
            dataclasses.replace(binding, size=binding.size and self.net.inputs[name].is_shape_tensor)
            for name, binding in self.inputs.items()
        ]
        return tuple(sorted(settled, key=lambda binding: binding.position))


def narrowed(node: Node) -> Node | None:
    """What the node casts from float32 to a half type. Of a weight the network then holds the small form alone."""
    if node.target not in (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default):
        return None
    source = node.args[0]
    if not isinstance(source, Node) or source.meta["val"].dtype is not torch.float32:
        return None
    return source if node.meta["val"].dtype in HALVES else None
