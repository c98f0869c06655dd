"""From a lowered graph to segments: `partition` groups the nodes that TensorRT takes into acyclic segments.

Levels make the grouping acyclic by construction and linear in time: a node's level is the largest of its inputs', one
more where eager reads what TensorRT made; the TensorRT nodes of one level are one segment. So the eager nodes of a
level need only segments of lower levels, and its segment only eager nodes of its own level or lower.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from trt_dynamo.aten_converters.layout import memory_order, numbers
from trt_dynamo.partition.beginnings import small_beginnings
from trt_dynamo.partition.constants import constants_of, copy_for_readers, sink
from trt_dynamo.partition.sizes import edges, inner_sizes, is_size, read_outside, with_floats
from trt_dynamo.partition.support import Verdict, judge, main_device, makes_tensors, node_symbols
from trt_dynamo.profiles import shape_env_of
from trt_dynamo.settings import Settings
from trt_dynamo.tracing import readable, trace

log = logging.getLogger(__name__)

aten = torch.ops.aten

# Moving elements is not work worth an engine.
FREE = {
    "view", "_unsafe_view", "reshape", "permute", "t", "transpose", "expand", "squeeze", "unsqueeze", "slice", "select",
    "alias", "detach", "getitem", "clone", "split", "split_with_sizes", "unbind", "as_strided", "_to_copy", "full",
    "arange", "scalar_tensor",
}  # fmt: skip

# A recurrent layer stands for as many nodes as its sequences have steps, and is worth an engine alone.
RECURRENT = {
    "trt_dynamo.lstm.default", "trt_dynamo.rnn.default", "aten.mkldnn_rnn_layer.default", "aten._cudnn_rnn.default",
}  # fmt: skip
MUCH = 50

LEADS = "too little for an engine, before an op that runs in eager"


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


@dataclasses.dataclass(frozen=True, eq=False)
class Partitioned:
    """The graph with each segment as one `call_module` node, the segments, and a verdict on every node."""

    module: GraphModule
    segments: tuple[Segment, ...]
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        """A line for each segment, and for each node in eager with the reason."""
        engines = [f"{s.name}: {', '.join(s.nodes)}; weights: {', '.join(s.weights) or '-'}" for s in self.segments]
        return "\n".join(engines + [str(verdict) for verdict in self.verdicts if not verdict.ok])


def partition(module: GraphModule, weights: Mapping[int, str], settings: Settings) -> Partitioned:
    """Cuts the graph. `weights`: position of each placeholder that may be baked, and its qualified name."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    baked = {placeholders[position]: name for position, name in weights.items()}
    verdicts = judge(module, baked.keys(), eager_ops=settings.eager_ops, strict=settings.strict)
    for node, reason in aliasing_outputs(module).items():
        if node in verdicts and verdicts[node].ok:
            verdicts[node] = dataclasses.replace(verdicts[node], ok=False, reason=reason)
    keep_tuples_whole(verdicts)
    constants = constants_of(module.graph, verdicts, baked)
    while copy_for_readers(
        module.graph, verdicts, levels_of(module.graph, verdicts, (), constants), constants, lambda n: not work(n)
    ):
        constants = constants_of(module.graph, verdicts, baked)
    groups = group(module.graph, verdicts, settings.min_segment_nodes, constants=constants)
    if len(groups) > 1:
        beginnings = small_beginnings(module.graph, verdicts, baked, settings.min_segment_nodes, work)
        without = {**verdicts, **{n: dataclasses.replace(verdicts[n], ok=False, reason=LEADS) for n in beginnings}}
        keep_tuples_whole(without)
        fewer = group(module.graph, without, settings.min_segment_nodes, constants=constants - beginnings)
        if len(fewer) < len(groups):
            verdicts, groups, constants = without, fewer, constants - beginnings
    while kept := gaps_for_eager(groups, verdicts):
        verdicts.update(kept)
        keep_tuples_whole(verdicts)
        groups = group(module.graph, verdicts, settings.min_segment_nodes, constants=constants)
    grouped = {node for nodes in groups for node in nodes}
    for node, verdict in verdicts.items():
        if verdict.ok and node not in grouped:
            reason = f"in a run of fewer than min_segment_nodes={settings.min_segment_nodes} compute nodes"
            verdicts[node] = dataclasses.replace(verdict, ok=False, reason=reason)
    segments, outer = split(module, groups, baked)
    parts = Partitioned(outer, segments, tuple(verdicts[node] for node in module.graph.nodes if node in verdicts))
    trace(log, "partition", parts.__str__)
    trace(log, "partitioned", lambda: readable(outer))
    return parts


def aliasing_outputs(module: GraphModule) -> dict[Node, str]:
    """The views at the end of the graph that eager must make: those of results that share memory, or have odd
    strides.
    """
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    results = [node for node in dict.fromkeys(flat(output.args[0])) if isinstance(node.meta.get("val"), torch.Tensor)]
    owners: dict[int, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            owners.setdefault(storage_of(node), []).append(node)
    for node in results:
        if node.op != "placeholder":
            owners.setdefault(storage_of(node), []).append(node)
    kept: dict[Node, str] = {}
    for node in results:
        if node.op == "placeholder":
            continue
        shares = len(owners[storage_of(node)]) > 1
        odd = memory_order(node.meta["val"]) is None
        if shares or odd:
            reason = (
                "a view that shares memory with another result or input"
                if shares
                else "a result whose strides are not dense"
            )
            keep_view_chain(node, kept, reason)
    return kept


def gaps_for_eager(groups: list[list[Node]], verdicts: Mapping[Node, Verdict]) -> dict[Node, Verdict]:
    """The views that leave gaps, whose dims lie in another order, and that eager reads: an engine would give out a
    dense copy, row by row, and what eager makes of that lies otherwise than the graph says.
    """
    inside = {node for nodes in groups for node in nodes}
    kept: dict[Node, str] = {}
    for node in inside:
        value = node.meta["val"]
        read = any(user in verdicts and user not in inside for user in node.users)
        if read and isinstance(value, torch.Tensor) and memory_order(value) is None and not row_by_row(value):
            keep_view_chain(node, kept, "a view with gaps, out of order, that eager reads")
    return {n: dataclasses.replace(verdicts[n], ok=False, reason=kept[n]) for n in kept if verdicts[n].ok}


def row_by_row(value: torch.Tensor) -> bool:
    """Whether the dims lie in their order, with whatever gaps; a repeated one lies anywhere."""
    env = shape_env_of([value, *value.stride()])
    sizes, strides = numbers(value.shape, env) or [], numbers(value.stride(), env) or []
    wide = [stride for size, stride in zip(sizes, strides, strict=False) if size != 1 and stride]
    return wide == sorted(wide, reverse=True)


def keep_view_chain(node: Node, kept: dict[Node, str], reason: str) -> None:
    """The node and what it is a view of, up to the tensor that owns the memory, which an engine may make."""
    while node.op == "call_function":
        bases = [
            n
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor) and storage_of(n) == storage_of(node)
        ]
        if not bases and node.target is operator.getitem:
            kept[node] = reason
            (parent,) = node.all_input_nodes
            bases = [
                n
                for n in parent.all_input_nodes
                if isinstance(n.meta.get("val"), torch.Tensor) and storage_of(n) == storage_of(node)
            ]
            if not bases:
                del kept[node]
                return
            node = parent
        if not bases:
            return
        kept[node] = reason
        node = bases[0]


def storage_of(node: Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)


def flat(arguments: Any) -> Iterable[Node]:
    found: list[Node] = []
    torch.fx.map_arg(arguments, found.append)
    return found


def keep_tuples_whole(verdicts: dict[Node, Verdict]) -> None:
    """An op with several results and the `getitem`s that take them apart run on the same side."""
    for node, verdict in list(verdicts.items()):
        if node.target is operator.getitem:
            (parent,) = node.all_input_nodes
            above = verdicts.get(parent)
            if above is not None and above.ok != verdict.ok:
                verdicts[node] = dataclasses.replace(verdict, ok=above.ok, reason=above.reason)
    for node, verdict in verdicts.items():
        value = node.meta["val"]
        whole = isinstance(value, torch.Tensor)
        if not whole and verdict.ok and any(user.target is not operator.getitem for user in node.users):
            verdicts[node] = dataclasses.replace(verdict, ok=False, reason="its results leave the graph as a tuple")


def group(
    graph: Graph,
    verdicts: Mapping[Node, Verdict],
    smallest: int,
    work_of: Callable[[Node], int] | None = None,
    constants: Collection[Node] = (),
) -> list[list[Node]]:
    """The nodes of each segment, in order. What is too small for an engine is left out, until nothing changes.
    `constants` are those that may go to a later segment than the first possible.
    """
    work_of = work_of or work
    rejected: set[Node] = set()
    while True:
        groups = levels(graph, verdicts, rejected, constants)
        small = [nodes for nodes in groups if sum(map(work_of, nodes)) < smallest]
        if not small:
            return groups
        for nodes in small:
            rejected.update(nodes)


def work(node: Node) -> int:
    """What a node counts towards `min_segment_nodes`."""
    if str(node.target) in RECURRENT:
        return MUCH
    packet = getattr(node.target, "overloadpacket", node.target)
    return int(getattr(packet, "__name__", str(packet)).split(".")[-1] not in FREE)


def sources_of(graph: Graph) -> dict[Node, list[Node]]:
    """What each node must come after: its inputs; for random and side-effecting ones, the one before of that kind; and
    the assertions of the sizes that it works on, without which an engine might read past the end of something.
    """
    sources: dict[Node, list[Node]] = {}
    before: Node | None = None
    asserted: dict[sympy.Symbol, Node] = {}
    for node in graph.nodes:
        sources[node] = list(node.all_input_nodes)
        if node.target is aten._assert_scalar.default:
            asserted.update(dict.fromkeys(asserted_symbols(node), node))
        elif asserted and makes_tensors(node):
            symbols = dict.fromkeys(s for n in (node, *node.all_input_nodes) for s in node_symbols(n))
            sources[node] += dict.fromkeys(asserted[symbol] for symbol in symbols if symbol in asserted)
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and (torch.Tag.nondeterministic_seeded in tags or node.is_impure()):
            if before is not None:
                sources[node].append(before)
            before = node
    return sources


def asserted_symbols(node: Node) -> Iterable[sympy.Symbol]:
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    return value.node.expr.free_symbols if isinstance(value, torch.SymBool) else ()


def levels(
    graph: Graph, verdicts: Mapping[Node, Verdict], rejected: Collection[Node], constants: Collection[Node]
) -> list[list[Node]]:
    """The nodes of each segment, in order."""
    groups: dict[int, list[Node]] = {}
    for node, level in levels_of(graph, verdicts, rejected, constants).items():
        if node in verdicts and verdicts[node].ok and node not in rejected:
            groups.setdefault(level, []).append(node)
    return [groups[key] for key in sorted(groups)]


def levels_of(
    graph: Graph, verdicts: Mapping[Node, Verdict], rejected: Collection[Node], constants: Collection[Node]
) -> dict[Node, int]:
    level: dict[Node, int] = {}
    for node, sources in sources_of(graph).items():
        inside = node in verdicts and verdicts[node].ok and node not in rejected
        here = max((level[source] for source in sources), default=0)
        # Engines are at odd levels, all else at even ones: what comes first, inputs and sizes, splits nothing. The size
        # of what a segment makes is at the segment's own level, which may read it too.
        if not is_size(node):
            here += (here % 2 == 1) != inside
        level[node] = here
    sink(graph, level, constants)
    return level


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
    root: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    root |= {
        str(n.target): operator.attrgetter(str(n.target))(module)
        for n in module.graph.nodes
        if n.op in ("get_attr", "call_module")
    }
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


__all__ = ["Partitioned", "Segment", "Verdict", "main_device", "makes_tensors", "partition"]
