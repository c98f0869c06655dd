"""Which products of a segment read 2:4 weights, for `explain`. In: a graph and its weights. Out: `SegmentSparsity`.

TensorRT looks at the constants of a network by itself when it builds; this says beforehand what it will find.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from trt_dynamo.aten_converters.walker import source_line
from trt_dynamo.sparsity.pattern import GROUP, share_of_dense_groups

# The operands of each product, by their places, with the dim of each that is added up.
LEFT_RIGHT = {
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "matmul": ((0, -1), (1, -2)),
    "addmm": ((1, -1), (2, -2)),
    "_addmm_activation": ((1, -1), (2, -2)),
    "baddbmm": ((1, -1), (2, -2)),
    "addbmm": ((1, -1), (2, -2)),
    "mv": ((0, -1),),
    "addmv": ((1, -1),),
    "linear": ((1, -1),),
    "convolution": ((1, 1),),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a constant: its node, the names of the weights that it reads, and what TensorRT sees of them.
    `reason` says why it does not qualify for sparse kernels; empty: it does.
    """

    node: str
    weight: str
    shape: tuple[int, ...]
    reason: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class SegmentSparsity:
    """The products of a segment's engine that read constants."""

    segment: str
    products: tuple[Product, ...]

    def __str__(self) -> str:
        """Those that qualify in one line, the others by reason."""
        qualify = [product.weight for product in self.products if not product.reason]
        lines = [f"{self.segment}: {len(qualify)} of {len(self.products)} products have 2:4 weights that qualify"]
        lines += [f"  qualify: {', '.join(qualify)}"] if qualify else []
        groups: dict[str, list[Product]] = {}
        for product in self.products:
            if product.reason:
                groups.setdefault(product.reason, []).append(product)
        for reason, products in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines.append(f"  not: {', '.join(product.weight for product in products)}: {reason}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {"segment": self.segment, "products": [dataclasses.asdict(product) for product in self.products]}


def sparsity_of(
    segment: str, module: GraphModule, weights: Mapping[str, Tensor], *, as_inputs: bool = False
) -> SegmentSparsity:
    """What there is to say of a segment's products, with these values of its weights (by placeholder).

    `as_inputs`: the engine is given the weights at each call, so none is a constant.
    """
    constants = Constants(module, weights)
    found = []
    for node in module.graph.nodes:
        for operand, dim in operands(node):
            if constants.known[operand]:
                value = constants.value(operand)
                reason = why_not(node, value, dim, constants.is_dequantized(operand))
                reason = "the engine takes the weights as inputs" if as_inputs else reason
                found.append(
                    Product(node.name, constants.names(operand), tuple(value.shape), reason, source_line(node))
                )
    return SegmentSparsity(segment, tuple(found))


def operands(node: Node) -> Iterator[tuple[Node, int]]:
    """The operands of a product that may be a weight, each with the dim that is added up."""
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        for place, dim in LEFT_RIGHT.get(str(node.target.overloadpacket).split(".")[-1], ()):
            operand = node.args[place] if place < len(node.args) else None
            if isinstance(operand, Node):
                yield operand, dim


def why_not(node: Node, weight: Tensor, dim: int, dequantized: bool) -> str:
    """Why TensorRT's sparse kernels do not fit this product; empty where they do."""
    if node.target is torch.ops.aten.convolution.default and node.args[6]:
        return "a transposed convolution"
    if weight.ndim < 2:
        return "a product with a vector"
    if weight.shape[dim] % GROUP:
        return f"{weight.shape[dim]} input channels are not divisible by {GROUP}"
    dense = share_of_dense_groups(weight, dim)
    if dense:
        # Of at least one percent: a single group is enough for a no.
        return f"{max(1, round(100 * dense))} % of its groups of four have more than two values other than 0"
    if weight.dtype in (torch.float32, torch.float64) and not dequantized:
        return "2:4, but it computes in float32; TensorRT's sparse kernels want float16 or INT8 (precision=fp16)"
    return ""


class Constants:
    """The values of a graph that depend on its weights alone; `known` says of each node whether it does. They are
    computed when they are asked for, and not kept: together they may be as large as the model.
    """

    def __init__(self, module: GraphModule, weights: Mapping[str, Tensor]) -> None:
        self.module = module
        self.weights = weights
        self.known: dict[Node, bool] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = node.name in weights
            else:
                sources = node.all_input_nodes
                self.known[node] = node.op == "get_attr" or (bool(sources) and all(self.known[s] for s in sources))

    def ancestors(self, node: Node) -> list[Node]:
        """The node and all that it is computed from, what is computed first coming first."""
        found: dict[Node, None] = {}
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [source for source in last.all_input_nodes if source not in found]
            waiting += missing
            if not missing:
                found[waiting.pop()] = None
        return list(found)

    def value(self, node: Node) -> Any:
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for each in self.ancestors(node):
                values[each] = self.computed(each, values)
        return values[node]

    def computed(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == "placeholder":
            return self.weights[node.name].detach()
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)

    def names(self, node: Node) -> str:
        """The names of the weights that a value is computed from, without constants such as scales."""
        sources = [each for each in self.ancestors(node) if each.op != "call_function"]
        weights = [each for each in sources if each.op == "placeholder"] or sources
        return ", ".join(str(each.meta.get("weight_name", each.name)) for each in weights)

    def is_dequantized(self, node: Node) -> bool:
        """Whether the value comes out of a dequantize op: such a product computes in INT8 or FP8."""
        return any("dequantize" in str(each.target) for each in self.ancestors(node))
