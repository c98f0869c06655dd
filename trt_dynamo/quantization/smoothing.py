"""Channels that reach far are made smaller, and the weights that read them larger: one scale then serves all channels.

Comes in: a graph with observers, calibrated. Goes out: the same, where `linear(x, w)` is `linear(x / s, w * s)`. The
idea is SmoothQuant's (Xiao et al., 2022): in transformers a few channels of a hidden state are a hundred times the
others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from trt_dynamo.quantization.observers import Observed, buffer
from trt_dynamo.quantization.ranges import LargestPerChannel

aten = torch.ops.aten


def smooth(model: GraphModule, strength: float) -> None:
    """Moves range from inputs into weights: with a strength of 0 nothing, with 1 all, with 0.5 they share it."""
    for node in list(model.graph.nodes):
        look = observer_of(model, node)
        if look is None or not isinstance(look.range, LargestPerChannel) or look.range.value is None:
            continue
        readers = [user for user in node.users if user.target is aten.linear.default and user.args[0] is node]
        weights = [weight_of(model, reader) for reader in readers]
        if len(readers) == len(node.users) and all(weight is not None for weight in weights):
            divide(model, node, look.range, [weight for weight in weights if weight is not None], strength)
    model.graph.lint()
    model.recompile()


def observer_of(model: GraphModule, node: Any) -> Observed | None:
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    return module if isinstance(module, Observed) else None


def weight_of(model: GraphModule, linear: Node) -> tuple[Node, Node, Tensor] | None:
    """The observer of a linear layer's weight, the node of the weight, and its value, where nothing else reads it."""
    look = linear.args[1]
    if observer_of(model, look) is None or not isinstance(look, Node) or len(look.users) != 1:
        return None
    source = look.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    return look, source, operator.attrgetter(str(source.target))(model).detach()


def divide(
    model: GraphModule,
    node: Node,
    reach: LargestPerChannel,
    weights: list[tuple[Node, Node, Tensor]],
    strength: float,
) -> None:
    """Puts the division in front of the observer, and new weights behind the others; both know their new ranges."""
    assert reach.value is not None
    largest = torch.stack([value.float().abs().amax(0) for _, _, value in weights]).amax(0)
    factor = (reach.value.clamp(min=1e-5) ** strength) / (largest.clamp(min=1e-5) ** (1 - strength))
    factor = torch.where((reach.value > 0) & (largest > 0), factor, torch.ones_like(factor)).clamp(1e-4, 1e4)
    source = node.args[0]
    assert isinstance(source, Node)
    with model.graph.inserting_before(node):
        dtype = weights[0][2].dtype
        inverse = buffer(model, f"{node.target}_smoothing", (1 / factor).to(dtype))
        divided = model.graph.call_function(aten.mul.Tensor, (source, inverse))
        divided.meta = dict(source.meta)
    node.update_arg(0, divided)
    reach.value = reach.value / factor
    for look, _, value in weights:
        larger = (value.float() * factor).to(value.dtype)
        with model.graph.inserting_before(look):
            stored = buffer(model, f"{look.target}_smoothed", larger)
            stored.meta = dict(look.args[0].meta) if isinstance(look.args[0], Node) else {}
        look.update_arg(0, stored)
        seen = observer_of(model, look)
        assert seen is not None
        seen.range.value = larger.float().abs().amax(1)  # type: ignore[union-attr]
