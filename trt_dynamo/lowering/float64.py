"""float64 as float32, for who asks for it by the setting `float64`: TensorRT has no float64.

In: a lowered graph. Out: the same graph, in which float64 is float32, and complex128 is complex64. The graph's
arguments and results keep their dtypes: eager casts them. So does what has another meaning in float32: random numbers,
bits, ops of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from trt_dynamo.errors import Unsupported
from trt_dynamo.host_scalars import host_scalars
from trt_dynamo.lowering.recording import fake_mode_of, like
from trt_dynamo.lowering.rewriting import Rewriter

aten = torch.ops.aten

NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}

# What these do hangs on the bits of a float64.
BITS = {aten.view.dtype, aten.nextafter.default, aten.frexp.Tensor}

OURS = ("aten", "prims", "trt_dynamo")


def float64_as_float32(graph: Graph) -> None:
    """Rewrites the graph in place."""
    mode, module = fake_mode_of(graph), graph.owning_module
    wide = any(is_wide(leaf) for node in graph.nodes for leaf in tree_leaves(node.meta.get("val")))
    if wide and mode is not None and module is not None:
        AsFloat32(module, mode, python_floats(graph)).run()
        graph.eliminate_dead_code()


def python_floats(graph: Graph) -> set[Node]:
    """What the host computes from Python's floats; constants that the graph makes are not among it."""
    scalars = host_scalars(graph, ())
    found: set[Node] = set()
    for node in graph.nodes:
        if node in scalars and (node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def is_wide(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in NARROW


def narrowed(argument: Any) -> Any:
    """An argument of an op: a dtype, or a number that float32 would make infinite."""
    if isinstance(argument, torch.dtype):
        return NARROW.get(argument, argument)
    limit = torch.finfo(torch.float32).max
    if isinstance(argument, float) and math.isfinite(argument) and abs(argument) > limit:
        return math.copysign(limit, argument)
    return argument


class AsFloat32(Rewriter):
    """A float32 tensor stands for each float64 tensor. What the host computes from Python's floats stays float64."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode, scalars: set[Node]) -> None:
        super().__init__(module, mode)
        self.scalars = scalars

    def leaves_alone(self, node: Node) -> bool:
        return node in self.scalars

    def carries(self, value: Any) -> bool:
        return is_wide(value)

    def into(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(NARROW[value.dtype])

    def back(self, carried: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return carried.to(wanted.dtype)

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """The least float64, which masks are made of, becomes the least float32."""
        limit = torch.finfo(torch.float32).max
        if not value.is_complex():
            value = torch.where(value.isfinite(), value.clamp(-limit, limit), value)
        return value.to(NARROW[value.dtype])

    def wrapped(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def result(self, node: Node, args: Sequence[Any], kwargs: Any) -> Any:
        target = node.target
        if not isinstance(target, OpOverload) or target.namespace not in OURS or target in BITS:
            raise Unsupported("TensorRT has no float64, and in float32 it would be something else")
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise Unsupported("random numbers of float64 are other ones in float32")
        args, kwargs = tree_map(narrowed, (tuple(args), dict(kwargs)))
        result, wanted = target(*args, **kwargs), node.meta["val"]
        if isinstance(wanted, torch.Tensor):
            return as_stated(result, wanted)
        return [as_stated(r, w) for r, w in zip(result, wanted, strict=True)]


def as_stated(result: Any, wanted: Any) -> Any:
    """A result in the strides that the graph states, and its dtype in float32."""
    if not isinstance(wanted, torch.Tensor):
        return result
    return like(result, wanted, NARROW.get(wanted.dtype, wanted.dtype))
