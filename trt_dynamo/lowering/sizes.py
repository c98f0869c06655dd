"""Computes every symbolic size of a graph from the graph's own arguments, so that no engine gives out a tensor only for
its shape.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy import functions as F
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from trt_dynamo.profiles import dim_of

aten = torch.ops.aten

# The functions of whole numbers; sizes that go through floats (a scale of 1.5) keep the nodes that torch made for them.
INTEGER = (F.FloorDiv, F.CleanDiv, F.Mod, F.PythonMod, F.Max, F.Min, F.PowByNatural, sympy.Max, sympy.Min)


def sizes_from_inputs(graph: Graph) -> None:
    """Computes every symbolic size from the graph's own arguments: no engine must give out a tensor for its shape."""
    sizes = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.SymInt)]
    symbols, last = size_arguments(graph)
    made: dict[sympy.Expr, Node] = {}
    for node in sizes:
        expression = node.meta["val"].node.expr
        known = expression.free_symbols <= symbols.keys() and all(
            isinstance(f, INTEGER) for f in expression.atoms(sympy.Function)
        )
        if not expression.is_number and not known:
            continue
        if expression not in made and not expression.is_number:
            made[expression] = symbols.get(expression) or size_node(graph, last, expression, symbols, node)
            last = made[expression] if expression not in symbols else last
        node.replace_all_uses_with(made.get(expression, int(expression) if expression.is_number else None))
        graph.erase_node(node)


def size_arguments(graph: Graph) -> tuple[dict[sympy.Symbol, Node], Node | None]:
    """For each symbol the argument that gives it, or the size of one, and the last node of all these."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    symbols: dict[sympy.Symbol, Node] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(dim_of(value), sympy.Symbol):
            symbols[value.node.expr] = node
    last = placeholders[-1] if placeholders else None
    for node in placeholders:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            symbol = dim_of(size)
            if isinstance(symbol, sympy.Symbol) and symbol not in symbols:
                with graph.inserting_after(last):
                    last = symbols[symbol] = graph.call_function(aten.sym_size.int, (node, axis))
                last.meta["val"] = size
    return symbols, last


def size_node(
    graph: Graph, after: Node | None, expression: sympy.Expr, symbols: dict[sympy.Symbol, Node], like: Node
) -> Node:
    """Nodes of plain Python arithmetic that compute the expression, put right behind the placeholders."""
    assert after is not None
    with graph.inserting_after(after):
        end = graph.create_node("call_function", operator.pos, (0,))
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    proxies: dict[Any, Any] = {symbol: torch.fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    with graph.inserting_before(end):
        result = sympy_interp(PythonReferenceAnalysis, proxies, expression).node
    result.meta["val"] = like.meta["val"]
    end.replace_all_uses_with(result)
    graph.erase_node(end)
    return result  # type: ignore[no-any-return]
