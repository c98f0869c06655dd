"""Sizes that a segment can tell by itself: those of tensors that it makes.

A size that depends on data is known once TensorRT has found it. Where the same segment needs it, it is computed there;
all else reads it off the engine's result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch.fx import Node

aten = torch.ops.aten


def is_size(node: Node) -> bool:
    """Whether the node makes a symbolic size out of shapes and sizes, without a look at any element."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.SymInt):
        return False
    return node.target is aten.sym_size.int or not any(
        isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes
    )


def inner_sizes(nodes: Collection[Node]) -> set[Node]:
    """The sizes that these nodes read, directly or through others, and that follow from tensors among them."""
    found: dict[Node, bool] = {}

    def follows(source: Node) -> bool:
        if source in nodes or not is_size(source):
            return source in nodes
        if source not in found:
            each = [follows(s) for s in source.all_input_nodes]
            found[source] = any(each)
        return found[source]

    for node in nodes:
        for source in node.all_input_nodes:
            follows(source)
    return {size for size, inner in found.items() if inner}


def with_floats(nodes: list[Node]) -> list[Node]:
    """These nodes, each after the floats made of sizes that it reads: a segment computes those for itself."""
    found: dict[Node, None] = {}

    def add(node: Node) -> None:
        for source in node.all_input_nodes:
            if is_float(source) and source not in found:
                add(source)
        found[node] = None

    for node in nodes:
        add(node)
    return list(found)


def is_float(node: Node) -> bool:
    """Whether the node makes a float out of sizes and other such floats."""
    made = node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymFloat)
    return made and not any(isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes)


def read_outside(node: Node, inside: Collection[Node]) -> bool:
    """Whether anything outside of a segment reads the node, if only for its size."""
    return any(user not in inside or (is_size(user) and read_outside(user, inside)) for user in node.users)


def edges(
    sources: Mapping[Node, list[Node]], unit_of: Mapping[Node, int], shared: Collection[Node]
) -> Iterator[tuple[Node | int, list[Node | int]]]:
    """The units of the outer graph (nodes, and segments by their index), each with units that it must come after.

    `unit_of` has the segment of each node in one. `shared` are the sizes that a segment computes for itself and that
    others read too: they stand in both places.
    """

    def unit(node: Node) -> Node | int:
        return node if node in shared else unit_of.get(node, node)

    for node, before in sources.items():
        if node in unit_of:
            yield unit_of[node], [unit(s) for s in before if unit_of.get(s) != unit_of[node]]
        if node in shared or node not in unit_of:
            yield node, [unit(s) for s in before]
