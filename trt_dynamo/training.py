"""The way of graphs that a backward pass may follow: no engine, no lost gradient.

Comes in: Dynamo's graph. Goes out: a callable that computes and differentiates as torch does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from trt_dynamo.fallback import compile_graph
from trt_dynamo.settings import Settings, warn_once

# Functions that are told whether the model trains, and by which of their parameters.
TOLD = {
    F.dropout: "training",
    F.dropout1d: "training",
    F.dropout2d: "training",
    F.dropout3d: "training",
    F.alpha_dropout: "training",
    F.feature_alpha_dropout: "training",
    F.batch_norm: "training",
}

HINT = (
    "a graph whose dropouts and batch norms are in eval mode runs in eager, because a backward pass may follow. If "
    "this is an evaluation, call the model under torch.no_grad() or torch.inference_mode(), and it goes to TensorRT"
)


def needs_gradients(inputs: Sequence[Any]) -> bool:
    """Whether a backward pass may follow: autograd is on, and an input asks for it."""
    return torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)


def train(module: GraphModule, inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    """The graph for training: as it is, or compiled by Inductor with the setting `training=inductor`."""
    if evaluates(module):
        warn_once(HINT)
    return module.forward if settings.training == "eager" else compile_graph(module, inputs, settings)


def evaluates(module: GraphModule) -> bool:
    """Whether the graph's own dropouts and batch norms say that the model does not train."""
    told = [flag for node in module.graph.nodes if (flag := trains(node)) is not None]
    return bool(told) and not any(told)


def trains(node: Node) -> bool | None:
    """What the node's function is told of training; None where it is told nothing."""
    if node.op != "call_function" or node.target not in TOLD:
        return None
    bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bool(bound.arguments[TOLD[node.target]])
