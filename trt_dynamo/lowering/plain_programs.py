"""An exported graph as a functional ATen graph, without AOTAutograd, which takes ten times as long.

In: a graph with everything that its program holds among the placeholders. Out: the graph that AOTAutograd would make of
it, or None where there is more to do: sizes that vary, writes to an input, functions that are no plain ops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from trt_dynamo.lowering.passes import run_passes
from trt_dynamo.lowering.recording import OF_ITS_OWN, Recorder
from trt_dynamo.lowering.whole import keep_whole
from trt_dynamo.profiles import shape_env_of
from trt_dynamo.settings import Settings

aten = torch.ops.aten

log = logging.getLogger(__name__)

NUMBERS = (torch.Tensor, torch.SymInt)


class Tracer(Recorder):
    """Records what the nodes of another graph come down to; `origin` is the one at work."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self.table and is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func is aten.as_strided_.default:
            return self.lie_otherwise(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def lie_otherwise(self, value: torch.Tensor, *form: Any) -> torch.Tensor:
        """A new tensor gets another form in memory, in code of torch's that is not made functional."""
        before = self.nodes[id(value)]
        before.meta["val"] = aten.alias.default(value)
        aten.as_strided_.default(value, *form)
        self.call(aten.as_strided.default, (before, *form), {}, value)
        return value

    def describe(self, node: Node, value: Any) -> None:
        node.meta = {**{key: v for key, v in self.origin.meta.items() if key not in OF_ITS_OWN}, "val": value}
        self.track(node)


def functional(module: GraphModule, settings: Settings) -> GraphModule | None:
    """The lowered graph, its placeholders those of `module`, in order."""
    if not is_plain(module):
        return None
    try:
        traced = recorded(keep_whole(module))
    except Exception as error:  # noqa: BLE001  AOTAutograd knows how, or says better why not
        log.debug("a program is left to AOTAutograd: %s: %s", type(error).__name__, error)
        return None
    return run_passes(traced, settings)


def is_plain(module: GraphModule) -> bool:
    """Whether the graph has nothing but ops on fake tensors whose sizes are numbers."""
    nodes = list(module.graph.nodes)
    leaves = tree_leaves([node.meta.get("val") for node in nodes])
    if any(isinstance(leaf, torch.Tensor) and type(leaf) is not FakeTensor for leaf in leaves):
        return False
    if shape_env_of([leaf for leaf in leaves if isinstance(leaf, NUMBERS)]) is not None:
        return False
    return all(node.op in ("placeholder", "output") or is_op(node) for node in nodes)


def is_op(node: Node) -> bool:
    known = isinstance(node.target, OpOverload) or getattr(node.target, "__module__", "") == "_operator"
    return node.op == "call_function" and known


def is_composite(target: Any) -> bool:
    """Whether an op is other ops in torch's own code, which AOTAutograd puts before any decomposition."""
    return isinstance(target, OpOverload) and target.namespace != "prim" and target._can_decompose()


def recorded(module: GraphModule) -> GraphModule:
    graph = Graph()
    inputs = module.graph.find_nodes(op="placeholder")
    for position, node in enumerate(inputs):  # by names that nothing else has, as AOTAutograd gives them
        graph.placeholder(f"arg{position}_1").meta = dict(node.meta)
    output = graph.output(())
    mode = detect_fake_mode([node.meta.get("val") for node in inputs])
    if mode is None:
        raise ValueError("no tensor goes in")
    result = GraphModule(module, graph)
    tracer = Tracer(result, mode)
    for node in graph.find_nodes(op="placeholder"):
        tracer.track(node)
    with tracer.at(output):
        run = torch.func.functionalize(interpreter(module, tracer), remove="mutations")
        found = run(*(node.meta.get("val") for node in inputs))
    output.args = (tuple(tracer.argument(value) for value in found),)
    return result


def interpreter(module: GraphModule, tracer: Tracer) -> Callable[..., tuple[Any, ...]]:
    """Calls the ops of the graph, one by one."""

    def run(*values: Any) -> tuple[Any, ...]:
        known = dict(zip(module.graph.find_nodes(op="placeholder"), values, strict=True))
        results: tuple[Any, ...] = ()
        for node in module.graph.nodes:
            if node.op == "call_function":
                tracer.origin = node
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
                # What such code writes to, it has made: taken apart here, that is made functional too.
                call = node.target.decompose if is_composite(node.target) else node.target
                known[node] = call(*args, **kwargs)
            elif node.op == "output":
                results = tuple(torch.fx.map_arg(node.args[0], known.__getitem__))
        return results

    return run


__all__ = ["functional"]
