"""Python's floats in a graph: Dynamo hands them over as tensors without dims, of float64, on the CPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node


def host_scalars(graph: Graph, weights: Collection[Node]) -> set[Node]:
    """Nodes that compute with Python floats alone; the host does it for free. `weights` are none."""
    found: set[Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim or value.device.type != "cpu" or node in weights:
            continue
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if node.op == "placeholder" or not sources:
            if value.dtype is torch.float64 and node.op != "get_attr":
                found.add(node)
        elif all(source in found for source in sources):
            found.add(node)
    return found
