"""Writes a choice into a graph. Comes in: a segment's graph and a `Choice`. Goes out: a new graph, with casts where a
value is read in another type than it has; its arguments and results have the types that they had.

A value is cast at most once, right where it is made, and the cast value serves all who want it. What is cast one way is
never cast back: who wants the type that it came from reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map

from trt_dynamo.precision.choice import Choice, Kind, is_float32, low_operands
from trt_dynamo.precision.tables import Role, role_of

aten = torch.ops.aten

# A mask is cut at this part of the largest number, so that a score that is added to it stays finite.
MASKED = 0.5


def with_casts(module: GraphModule, choice: Choice) -> tuple[GraphModule, Mapping[Node, Node]]:
    """The new graph, and for each of its nodes the old one that it stands for; casts stand for none."""
    writer = Writer(choice)
    for node in module.graph.nodes:
        writer.copy(node)
    attributes = {str(n.target): getattr_of(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    return GraphModule(attributes, writer.graph), writer.origins


def getattr_of(module: GraphModule, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


class Writer:
    """Copies nodes one by one. `forms` has the new nodes of each old one by type: as float32, in the half type."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        self.forms: dict[tuple[Node, torch.dtype], Node] = {}
        self.masks: dict[Node, Node] = {}
        self.origins: dict[Node, Node] = {}

    def copy(self, node: Node) -> None:
        runs_low = node in self.choice.nodes
        if self.is_done_by_a_cast(node):
            return
        low = set(low_operands(node)) if runs_low and node.op == "call_function" else set()
        masks = mask_of(node) if runs_low else None

        def form(operand: Node) -> Node:
            if operand is masks:
                return self.mask(operand)
            return self.form(operand, self.choice.low if operand in low else torch.float32)

        new = self.graph.node_copy(node, form)
        self.copies[node] = new
        self.origins[new] = node
        if runs_low:
            self.restate(new, node)
        if is_float32(node):
            self.forms[node, new.meta["val"].dtype] = new

    def form(self, node: Node, dtype: torch.dtype) -> Node:
        """The new node with the value in this type; what is not float32 is as it is."""
        if not is_float32(node):
            return self.copies[node]
        if (node, dtype) not in self.forms:
            (source,) = (self.forms[node, d] for d in (torch.float32, self.choice.low) if (node, d) in self.forms)
            self.forms[node, dtype] = self.after(source, lambda: self.cast(source, dtype))
        return self.forms[node, dtype]

    def after(self, source: Node, make: Callable[[], Node]) -> Node:
        """Makes nodes right behind the value, but behind all arguments of the graph."""
        place = source
        while source.op == "placeholder" and place.next.op == "placeholder":
            place = place.next
        with self.graph.inserting_after(place):
            return make()

    def cast(self, source: Node, dtype: torch.dtype) -> Node:
        return self.call(source, aten._to_copy.default, (source,), {"dtype": dtype}, source.meta["val"].to(dtype))

    def call(self, origin: Node, target: Any, args: Any, kwargs: Any, value: torch.Tensor) -> Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: origin.meta[k] for k in ("stack_trace", "nn_module_stack") if k in origin.meta} | {"val": value}
        return new

    def restate(self, new: Node, node: Node) -> None:
        """The value of a node that computes in the half type, and a type that it names."""
        low, value = self.choice.low, node.meta["val"]
        if role_of(node) is Role.ATTENTION and isinstance(value, tuple | list):
            new.meta["val"] = type(value)((lowered(value[0], low), *value[1:]))  # the others are for a backward pass
        else:
            new.meta["val"] = tree_map(lambda each: lowered(each, low), value)
        if new.kwargs.get("dtype") is torch.float32:
            new.kwargs = {**new.kwargs, "dtype": low}
        if role_of(node) is Role.CODES and (name := result_type(node)) is not None:
            new.args = tuple(low if given is torch.float32 else given for given in new.args)
            new.kwargs = {**new.kwargs, name: low} if torch.float32 not in node.args else new.kwargs

    def is_done_by_a_cast(self, node: Node) -> bool:
        """Whether the model's own cast asks for the half type that its operand is held in already."""
        if node.op != "call_function" or role_of(node) is not Role.CAST or node.meta["val"].dtype != self.choice.low:
            return False
        source = node.args[0]
        if not isinstance(source, Node) or (source, self.choice.low) not in self.forms:
            return False
        self.copies[node] = self.forms[source, self.choice.low]
        return True

    def mask(self, node: Node) -> Node:
        """A mask that is added to scores, in the half type. What that type makes infinite would make a row of nothing
        but such numbers NaN, so it is cut; minus infinity stays.
        """
        if self.choice.kinds.get(node) in (Kind.LOW, Kind.CONSTANT):
            return self.form(node, self.choice.low)
        if node not in self.masks:
            source = self.form(node, torch.float32)
            self.masks[node] = self.after(source, lambda: self.cut(source))
        return self.masks[node]

    def cut(self, source: Node) -> Node:
        value, limit = source.meta["val"], torch.finfo(self.choice.low).max * MASKED
        infinite = self.call(source, aten.isinf.default, (source,), {}, torch.empty_like(value, dtype=torch.bool))
        with self.graph.inserting_after(infinite):
            clamped = self.call(source, aten.clamp.default, (source, -limit, limit), {}, value)
        with self.graph.inserting_after(clamped):
            chosen = self.call(source, aten.where.self, (infinite, source, clamped), {}, value)
        with self.graph.inserting_after(chosen):
            return self.cast(chosen, self.choice.low)


def result_type(node: Node) -> str | None:
    """How an op that reads codes calls the type of what they stand for."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    reads = "dequantize" in str(node.target)
    return next((name for name in names if name in ("out_dtype", "output_dtype")), None) if reads else None


def mask_of(node: Node) -> Node | None:
    """The float32 mask of an attention."""
    if node.op != "call_function" or role_of(node) is not Role.ATTENTION:
        return None
    operands = [n for n in node.all_input_nodes if is_float32(n) and not any(n is each for each in node.args[:3])]
    return operands[0] if operands else None


def lowered(value: Any, low: torch.dtype) -> Any:
    return value.to(low) if isinstance(value, torch.Tensor) and value.dtype is torch.float32 else value
