"""What a node computes from weights and constants alone, by torch, for converters that need the numbers.

In: a network whose `baked` has the values of the weights, and a node of its graph. Out: the value, or None.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from trt_dynamo.aten_converters.network import Network
from trt_dynamo.errors import Unsupported


class Unknown(Exception):
    """The value follows from what the network gets at each call."""


def constant_of(net: Network, node: Node) -> Any:
    """The value of the node on the CPU, or None where it is not known: it depends on an input, or this is a dry run.

    Raises:
        Unsupported: it depends on a weight, and the engine's weights shall be replaceable: the numbers that are made of
            this one would stay what they are.
    """
    found: dict[Node, Any] = {}
    try:
        with torch.no_grad():
            return evaluated(net, node, found)
    except Unknown:
        return None


def evaluated(net: Network, node: Node, found: dict[Node, Any]) -> Any:
    if node in found:
        return found[node]
    if node.op == "get_attr":
        module: Any = node.graph.owning_module
        value = operator.attrgetter(str(node.target))(module).detach().cpu()
    elif node.op == "placeholder" and node.name in net.baked:
        if net.refit:
            raise Unsupported(f"{node.name} is quantized when the engine is built, and cannot be replaced in it")
        value = net.baked[node.name].detach().cpu()
    elif node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        if not node.all_input_nodes or node.is_impure():  # numbers made of nothing: on which device is not ours to say
            raise Unknown
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: evaluated(net, source, found))
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    else:
        raise Unknown
    found[node] = value
    return value
