"""Which nodes make a segment together. Comes in: a graph and a verdict on each of its nodes. Goes out: groups of nodes.

Levels make the grouping acyclic by construction and linear in time: a node's level is the largest of its inputs', one
more where eager reads what TensorRT made; the TensorRT nodes of one level are one segment. So the eager nodes of a
level need only segments of lower levels, and its segment only eager nodes of its own level or lower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import sympy
import torch
from torch.fx import Graph, Node

from trt_dynamo.partition.constants import sink
from trt_dynamo.partition.sizes import is_size
from trt_dynamo.partition.support import Verdict, makes_tensors, node_symbols

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
