"""The views that eager must make: those that share memory with others, and those that do not lie as an engine writes.

Comes in: a graph, and what its segments would be. Goes out: the nodes that stay in eager, each with the reason.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from trt_dynamo.aten_converters.layout import memory_order, numbers
from trt_dynamo.partition.support import Verdict
from trt_dynamo.profiles import shape_env_of

aten = torch.ops.aten

# Ops that read the memory under a tensor, whatever part of it the tensor is.
STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)


def aliasing_outputs(module: GraphModule) -> dict[Node, str]:
    """The views at the end of the graph that eager must make: those of results that share memory, or have odd
    strides.
    """
    (output,) = module.graph.find_nodes(op="output")
    results = [node for node in output.all_input_nodes if is_tensor(node)]
    given = [node for node in module.graph.find_nodes(op="placeholder") if is_tensor(node)]
    owners: collections.Counter[int] = collections.Counter(map(storage_of, dict.fromkeys([*given, *results])))
    kept: dict[Node, str] = {}
    for node in results:
        if node.op == "placeholder":
            continue
        shares = owners[storage_of(node)] > 1
        odd = memory_order(node.meta["val"]) is None
        if shares or odd:
            reason = (
                "a view that shares memory with another result or input"
                if shares
                else "a result whose strides are not dense"
            )
            keep_view_chain(node, kept, reason)
    return kept


def gaps_for_eager(groups: Iterable[Collection[Node]], verdicts: Mapping[Node, Verdict]) -> dict[Node, str]:
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
    return {node: reason for node, reason in kept.items() if verdicts[node].ok}


def row_by_row(value: torch.Tensor) -> bool:
    """Whether the dims lie in their order, with whatever gaps; a repeated one lies anywhere."""
    env = shape_env_of([value, *value.stride()])
    sizes, strides = numbers(value.shape, env) or [], numbers(value.stride(), env) or []
    wide = [stride for size, stride in zip(sizes, strides, strict=False) if size != 1 and stride]
    return wide == sorted(wide, reverse=True)


def memory_for_eager(verdicts: Mapping[Node, Verdict]) -> dict[Node, str]:
    """What lies under the strides that eager puts over a tensor: it reads the memory around a view as well."""
    kept: dict[Node, str] = {}
    for node, verdict in verdicts.items():
        if node.target in STRIDED and not verdict.ok:
            keep_view_chain(node, kept, "eager puts strides over its memory")
    return kept


def keep_view_chain(node: Node, kept: dict[Node, str], reason: str) -> None:
    """The node and what it is a view of, up to the tensor that owns the memory. An engine may make that one, unless it
    has gaps: an engine would write it without.
    """
    first = node
    while node.op == "call_function":
        views, bases = [node], bases_of(node, node)
        if not bases and node.target is operator.getitem:  # of an op with several results
            (parent,) = node.all_input_nodes
            views, bases = [node, parent], bases_of(parent, node)
        if not bases:
            if node is not first and memory_order(node.meta["val"]) is None:
                kept[node] = reason
            return
        kept.update(dict.fromkeys(views, reason))
        node = bases[0]


def bases_of(reader: Node, view: Node) -> list[Node]:
    """What the reader reads that lies in the memory of the view."""
    return [each for each in reader.all_input_nodes if is_tensor(each) and storage_of(each) == storage_of(view)]


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def storage_of(node: Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)
