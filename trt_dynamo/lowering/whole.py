"""Keeps some functions whole through AOTAutograd, which would take them apart into dozens of nodes.

Comes in: Dynamo's graph. Goes out: the same graph with our ops in it, each torch's function under another name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from trt_dynamo.operators import attention, recurrent, resampling

# What takes the place of a function; NotImplemented says: not for these arguments.
WHOLE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention.attend,
    F.interpolate: resampling.interpolate,
    F.pad: resampling.pad,
    torch._C._nn.pad: resampling.pad,
    **recurrent.WHOLE,
}

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch._C._set_grad_enabled)


class KeepWhole(TorchFunctionMode):
    """While it is entered, what `WHOLE` names is called as one op."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return whole(function)(*args, **(kwargs or {})) if function in WHOLE else function(*args, **(kwargs or {}))


@functools.cache
def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as an op where that can be."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = WHOLE[function](*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    return call


def named(index: int, function: Callable[..., Any]) -> str:
    """Makes what takes the place of one of torch's functions an attribute of this module, so that a graph with it can
    be written down. Returns its full name.
    """
    call, name = whole(function), f"whole_{index}_{getattr(function, '__name__', 'op').partition('.')[0]}"
    call.__module__, call.__name__, call.__qualname__ = __name__, name, name
    globals()[name] = call
    return f"{__name__}.{name}"


# All of them, by their full names.
NAMED = tuple(named(index, function) for index, function in enumerate(WHOLE))


def keep_whole(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph in which those functions are ops; the graph itself where autocast meddles."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return module
    targets = {node.target for node in module.graph.nodes if node.op == "call_function"}
    if not targets & WHOLE.keys() or targets & set(AUTOCAST):
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function" and node.target in WHOLE:
            node.target = whole(node.target)
    copy = GraphModule(module, graph)
    copy.meta = module.meta
    return copy
