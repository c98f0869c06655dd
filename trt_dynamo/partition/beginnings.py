"""The little that comes before an op of eager's at the beginning of a graph: in an engine it would cut the graph in
two, since all that needs nothing of eager's goes there with it.

Comes in: a lowered graph and verdicts. Goes out: the nodes for TensorRT that eager could run as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch.fx import Graph, Node

from trt_dynamo.partition.support import Verdict


def small_beginnings(
    graph: Graph, verdicts: Mapping[Node, Verdict], baked: Collection[Node], smallest: int, work: Callable[[Node], int]
) -> set[Node]:
    """What the nodes of eager's are computed from, where that is less work than `smallest` and no weight takes part."""
    found: set[Node] = set()
    early: set[Node] = set()  # the nodes of eager's of which that holds
    for node in graph.nodes:
        if node in verdicts and not verdicts[node].ok:
            above = beginning_of(node, verdicts, baked, smallest, work, early)
            if above is not None:
                early.add(node)
                found |= above
    return found


def beginning_of(
    node: Node,
    verdicts: Mapping[Node, Verdict],
    baked: Collection[Node],
    smallest: int,
    work: Callable[[Node], int],
    early: Collection[Node],
) -> set[Node] | None:
    """The nodes for TensorRT from which `node` is computed, or None where they are too much."""
    above: set[Node] = set()
    seen: set[Node] = set()
    waiting, total = list(node.all_input_nodes), 0
    while waiting:
        source = waiting.pop()
        if source in seen or source in early:
            continue
        seen.add(source)
        if source in baked or (source in verdicts and not verdicts[source].ok):
            return None
        if source in verdicts:
            above.add(source)
            total += work(source)
        if total >= smallest:
            return None
        waiting += source.all_input_nodes
    return above
