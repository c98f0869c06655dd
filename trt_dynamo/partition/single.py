"""A compiled graph as a function, with as little Python around its segments as can be: where it is one segment and
nothing else, none.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.fx import Graph, GraphModule


def boxed(module: GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    """What computes the graph from a list of its inputs: the one module that it calls, where that takes all inputs and
    gives all results, in their order, and has a way to take them as a list, `respond`; else the graph.
    """
    only = only_call(module)
    respond = getattr(module.get_submodule(only), "respond", None) if only is not None else None
    if respond is None:
        return make_boxed_func(with_functions(module).forward)
    call = functools.partial(respond)
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def with_functions(module: GraphModule) -> GraphModule:
    """The graph with each module that has a `respond` called by that: to find a submodule and to call it costs torch
    as much as an engine costs us.
    """
    graph = Graph()
    results = graph.graph_copy(module.graph, {})
    for node in [*graph.nodes]:
        respond = getattr(module.get_submodule(node.target), "respond", None) if node.op == "call_module" else None
        if respond is None or node.kwargs:
            continue
        with graph.inserting_before(node):
            called = graph.call_function(respond, (tuple(node.args),))
        called.meta = node.meta
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    graph.output(results)
    return GraphModule(module, graph)


def only_call(module: GraphModule) -> str | None:
    """The name of that module, or None."""
    nodes = [*module.graph.nodes]
    calls = [node for node in nodes if node.op not in ("placeholder", "output")]
    results = nodes[-1].args[0] if nodes[-1].op == "output" else None
    if not calls or calls[0].op != "call_module" or not isinstance(results, list | tuple):
        return None
    first = calls[0]
    if [*first.args] != [node for node in nodes if node.op == "placeholder"] or first.kwargs:
        return None
    taken = [(operator.getitem, (first, index)) for index in range(len(results))]
    if [(node.target, node.args) for node in results if hasattr(node, "target")] != taken or len(results) != len(taken):
        return None
    return str(first.target) if set(calls[1:]) == set(results) else None
