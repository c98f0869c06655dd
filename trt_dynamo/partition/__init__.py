"""From a lowered graph to segments: `partition` groups the nodes that TensorRT takes into acyclic segments.

The files, in the order in which they are used: `support` judges, `views` and `constants` say what goes where all the
same, `levels` groups, `beginnings` tries with fewer engines, `segments` cuts. `eager_parts` does the same to what is
left for eager.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping

from torch.fx import Graph, GraphModule, Node

from trt_dynamo.partition.beginnings import small_beginnings
from trt_dynamo.partition.constants import constants_of, copy_for_readers
from trt_dynamo.partition.levels import group, levels_of, work
from trt_dynamo.partition.segments import Segment, split
from trt_dynamo.partition.support import Verdict, judge, keep_tuples_whole, main_device, makes_tensors, refuse
from trt_dynamo.partition.views import aliasing_outputs, gaps_for_eager, memory_for_eager
from trt_dynamo.settings import Settings
from trt_dynamo.tracing import readable, trace

log = logging.getLogger(__name__)

LEADS = "too little for an engine, before an op that runs in eager"


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
    placeholders = module.graph.find_nodes(op="placeholder")
    baked = {placeholders[position]: name for position, name in weights.items()}
    verdicts = judge(module, baked.keys(), eager_ops=settings.eager_ops, strict=settings.strict)
    refuse(verdicts, aliasing_outputs(module))
    refuse(verdicts, memory_for_eager(verdicts))
    keep_tuples_whole(verdicts)
    constants = settled_constants(module.graph, verdicts, baked)
    groups = grouped(module.graph, verdicts, baked, constants, settings.min_segment_nodes)
    inside = {node for nodes in groups for node in nodes}
    few = f"in a run of fewer than min_segment_nodes={settings.min_segment_nodes} compute nodes"
    refuse(verdicts, {node: few for node in verdicts if node not in inside})
    segments, outer = split(module, groups, baked)
    parts = Partitioned(outer, segments, tuple(verdicts[node] for node in module.graph.nodes if node in verdicts))
    trace(log, "partition", parts.__str__)
    trace(log, "partitioned", lambda: readable(outer))
    return parts


def settled_constants(graph: Graph, verdicts: dict[Node, Verdict], baked: Collection[Node]) -> set[Node]:
    """What depends on weights alone, each segment that reads a moved weight with a copy of its own."""
    constants = constants_of(graph, verdicts, baked)
    while copy_for_readers(
        graph, verdicts, levels_of(graph, verdicts, (), constants), constants, lambda node: not work(node)
    ):
        constants = constants_of(graph, verdicts, baked)
    return constants


def grouped(
    graph: Graph, verdicts: dict[Node, Verdict], baked: Collection[Node], constants: set[Node], smallest: int
) -> list[list[Node]]:
    """The nodes of each segment. What eager had better make is refused in `verdicts`."""
    groups = group(graph, verdicts, smallest, constants=constants)
    if len(groups) > 1:
        beginnings = small_beginnings(graph, verdicts, baked, smallest, work)
        without = dict(verdicts)
        refuse(without, dict.fromkeys(beginnings, LEADS))
        keep_tuples_whole(without)
        fewer = group(graph, without, smallest, constants=constants - beginnings)
        if len(fewer) < len(groups):
            verdicts.update(without)
            groups, constants = fewer, constants - beginnings
    while kept := gaps_for_eager(groups, verdicts):
        refuse(verdicts, kept)
        keep_tuples_whole(verdicts)
        groups = group(graph, verdicts, smallest, constants=constants)
    return groups


__all__ = ["Partitioned", "Segment", "Verdict", "main_device", "makes_tensors", "partition"]
