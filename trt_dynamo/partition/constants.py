"""Where what depends on weights alone is computed: in the segment that reads it, not in the first that could.

Comes in: a lowered graph, verdicts, and levels as `partition.levels` counts them. Goes out: higher levels for such
nodes, and a copy of those that move elements only for each segment that reads them, so that no segment gives another a
transposed weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from torch.fx import Graph, Node

from trt_dynamo.partition.sizes import is_size
from trt_dynamo.partition.support import Verdict, node_symbols


def constants_of(graph: Graph, verdicts: Mapping[Node, Verdict], baked: Collection[Node]) -> set[Node]:
    """The nodes for TensorRT that are computed from weights, or from nothing, whatever the call."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node not in verdicts or not verdicts[node].ok or is_size(node) or node.is_impure():
            continue
        known = all(source in baked or source in found for source in node.all_input_nodes)
        if known and not any(True for _ in node_symbols(node)):
            found.add(node)
    return found


def sink(graph: Graph, level: dict[Node, int], constants: Collection[Node]) -> None:
    """Raises the levels of constants to that of their first reader; they are at odd ones, as segments are."""
    for node in reversed(graph.nodes):
        if node in constants and level[node] % 2 == 1 and node.users:
            first = min(level[user] - (level[user] % 2 == 0) for user in node.users)
            level[node] = max(level[node], first)


def copy_for_readers(
    graph: Graph,
    verdicts: dict[Node, Verdict],
    level: Mapping[Node, int],
    constants: Collection[Node],
    moves: Callable[[Node], bool],
) -> bool:
    """Gives each further segment that reads a moved weight a copy of the node. Whether there was one to give."""
    copied = False
    for node in reversed(list(graph.nodes)):
        if node not in constants or not moves(node):
            continue
        readers: dict[int, list[Node]] = {}
        for user in node.users:
            # A copy that was made just now has no level, and waits for the next round.
            if user in verdicts and level.get(user, 0) % 2 == 1:
                readers.setdefault(level[user], []).append(user)
        for place in sorted(readers)[1:]:
            with graph.inserting_after(node):
                twin = graph.node_copy(node)
            twin.meta = dict(node.meta)
            verdicts[twin] = dataclasses.replace(verdicts[node])
            for reader in readers[place]:
                reader.replace_input_with(node, twin)
            copied = True
    return copied
