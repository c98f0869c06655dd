"""The cut itself. Comes in: a graph and groups of its nodes. Goes out: a graph for each group, and the outer graph that
calls them.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from trt_dynamo.aten_converters.walker import getattr_path
from trt_dynamo.partition.levels import sources_of
from trt_dynamo.partition.sizes import edges, inner_sizes, is_size, read_outside, with_floats
from trt_dynamo.partition.support import makes_tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A part of the graph for one engine. `module` is its own graph, with placeholders for all that comes in;
    `weights` names those that are baked; `nodes` are the names of the nodes in the whole graph."""

    name: str
    module: GraphModule
    nodes: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """The names of what comes in, in order."""
        return [node.name for node in self.module.graph.find_nodes(op="placeholder")]

    @property
    def weight_positions(self) -> list[int]:
        """The places of the weights among the arguments."""
        arguments = self.arguments
        return [arguments.index(name) for name in self.weights]


def split(
    module: GraphModule, groups: list[list[Node]], baked: Mapping[Node, str], prefix: str = "segment"
) -> tuple[tuple[Segment, ...], GraphModule]:
    """Makes a graph of each group, and the outer graph that calls them, by `prefix` and number."""
    insides = [{*nodes, *inner_sizes(set(nodes))} for nodes in groups]
    unit_of = {node: index for index, inside in enumerate(insides) for node in inside}
    shared = {n for n, index in unit_of.items() if is_size(n) and read_outside(n, insides[index])}
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    outer = Graph()
    copies: dict[Node, Node] = {}
    root = attributes_of(module)
    segments: list[Segment] = []
    for unit in ordered_units(module.graph, unit_of, shared):
        if isinstance(unit, Node):
            copies[unit] = outer.node_copy(unit, lambda n: copies[n])
            continue
        nodes = sorted(insides[unit], key=order.__getitem__)
        segment, inputs, results = make_segment(f"{prefix}_{unit}", nodes, root, baked)
        segments.append(segment)
        root[segment.name] = segment.module
        call = outer.call_module(segment.name, tuple(copies[n] for n in inputs))
        for position, node in enumerate(results):
            copies[node] = outer.call_function(operator.getitem, (call, position))
            copies[node].meta = dict(node.meta)
    result = GraphModule(root, outer)
    return tuple(segments), result


def attributes_of(module: GraphModule) -> dict[str, Any]:
    """What the graph's nodes may name, by its path."""
    paths = [str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")]
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
        **{path: getattr_path(module, path) for path in paths},
    }


def ordered_units(graph: Graph, unit_of: Mapping[Node, int], shared: Collection[Node]) -> list[Node | int]:
    """Outer nodes and segments (by index) in an order in which each comes after what it reads. For `unit_of` and
    `shared` see `edges`.
    """
    nodes = list(graph.nodes)
    first: dict[Node | int, int] = {}
    for index, node in enumerate(nodes):
        first[node] = index
        first.setdefault(unit_of.get(node, node), index)
    waiting: dict[Node | int, int] = {}
    readers: dict[Node | int, list[Node | int]] = {}
    for unit, sources in edges(sources_of(graph), unit_of, shared):
        waiting[unit] = waiting.get(unit, 0) + len(sources)
        for source in sources:
            readers.setdefault(source, []).append(unit)
    ready = [(first[unit], unit) for unit, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order: list[Node | int] = []
    while ready:
        _, unit = heapq.heappop(ready)
        order.append(unit)
        for reader in readers.get(unit, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, (first[reader], reader))
    placeholders: list[Node | int] = [node for node in nodes if node.op == "placeholder"]
    rest = [unit for unit in order if not (isinstance(unit, Node) and unit.op in ("placeholder", "output"))]
    return [*placeholders, *rest, nodes[-1]]


def make_segment(
    name: str, nodes: list[Node], root: Mapping[str, Any], baked: Mapping[Node, str]
) -> tuple[Segment, list[Node], list[Node]]:
    """A segment's own graph of these nodes, in order, the outer nodes that go in, and those that come out."""
    nodes = with_floats(nodes)
    inside = set(nodes)
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs = [
        n
        for n in dict.fromkeys(s for node in nodes for s in node.all_input_nodes)
        if n not in inside and n.op != "get_attr"
    ]
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {**node.meta, "weight_name": baked.get(node, node.name)}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in copies and source.op == "get_attr":
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    results = [n for n in nodes if isinstance(n.meta["val"], torch.Tensor) and read_outside(n, inside)]
    graph.output(tuple(copies[n] for n in results))
    weights = tuple(copies[n].name for n in inputs if n in baked)
    attributes = {str(n.target): root[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    # Its Python code is written and compiled when eager first needs it: with a cached engine, mostly never.
    own = _LazyGraphModule(attributes, graph)
    segment = Segment(name, own, tuple(n.name for n in nodes if makes_tensors(n)), weights)
    return segment, inputs, results
