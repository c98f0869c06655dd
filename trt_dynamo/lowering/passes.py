"""The passes over a lowered graph, in the order in which they run. Each takes the graph and changes it in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from trt_dynamo.lowering.complex_numbers import complex_as_pairs
from trt_dynamo.lowering.float64 import float64_as_float32
from trt_dynamo.lowering.sizes import sizes_from_inputs
from trt_dynamo.profiles import dim_of, symbols_of
from trt_dynamo.settings import Settings

aten = torch.ops.aten


def drop_noops(graph: Graph) -> None:
    """Removes detach and alias, which change nothing in a functional graph without autograd."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (
            aten.detach.default,
            aten.alias.default,
            aten.lift_fresh_copy.default,
        ):
            if any(user.op == "output" for user in node.users):
                continue
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def drop_true_assertions(graph: Graph) -> None:
    """Removes what torch asserts of each size that depends on data and what cannot fail: that it is not negative, and
    that no more is found than there is. For those an engine would have to give out a tensor for its size alone.
    """
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        condition = node.args[0]
        if isinstance(condition, Node) and condition.target in (operator.ge, operator.le):
            size, bound = condition.args
            if isinstance(size, Node) and size.target is aten.sym_size.int and isinstance(bound, int):
                most = found_at_most(*size.args)
                if bound <= 0 if condition.target is operator.ge else most is not None and most <= bound:
                    graph.erase_node(node)


def found_at_most(tensor: Any, axis: Any) -> int | None:
    """How many elements a search can find, whose number is the tensor's size; None where that is no number."""
    if tensor.target in (aten.nonzero.default, aten.masked_select.default):
        searched = list(tensor.args)
    elif tensor.target is aten.index.Tensor:
        searched = [i for i in tensor.args[1] if i is not None and i.meta["val"].dtype is torch.bool]
    else:
        return None
    shapes = [node.meta["val"].shape for node in searched]
    if len(shapes) == 0 or not all(isinstance(d, int) for shape in shapes for d in shape):
        return None
    inherited = symbols_of(node.meta["val"] for node in tensor.all_input_nodes)
    if dim_of(tensor.meta["val"].shape[axis]) in inherited:
        return None
    return int(math.prod(torch.broadcast_shapes(*shapes)))


def drop_dead(graph: Graph) -> None:
    """Removes what nobody reads."""
    graph.eliminate_dead_code()


def passes(settings: Settings) -> Iterator[Callable[[Graph], None]]:
    """The passes, in order."""
    yield drop_noops
    if settings.float64 == "float32":
        yield float64_as_float32
    yield complex_as_pairs
    yield drop_true_assertions
    yield sizes_from_inputs
    yield drop_dead


def run_passes(module: GraphModule, settings: Settings) -> GraphModule:
    for change in passes(settings):
        change(module.graph)
    module.recompile()
    return module
