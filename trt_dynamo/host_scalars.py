"""Python's floats in a graph: Dynamo and AOTAutograd hand them over as tensors without dims, of float64, on the CPU."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node


def host_scalars(graph: Graph, weights: Collection[Node]) -> set[Node]:
    """Nodes that compute with Python floats and sizes alone; the host does it for free. `weights` are none.

    What never becomes a float64 is none either: it is as good in an engine.
    """
    numbers: dict[Node, bool] = {}  # whether it is a float64, or made of one
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim or value.device.type != "cpu" or node in weights:
            continue
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        wide = value.dtype is torch.float64
        if node.op == "placeholder" and wide:
            numbers[node] = True
        elif node.op == "call_function" and all(source in numbers for source in sources):
            numbers[node] = wide or any(numbers[source] for source in sources)
    for node in reversed(numbers):
        numbers[node] |= any(numbers.get(user, False) for user in node.users)
    return {node for node, wide in numbers.items() if wide}
