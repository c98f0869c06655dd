"""Keeps `scaled_dot_product_attention` whole through AOTAutograd, which would pick a device's kernel for it.

The op `trt_dynamo::scaled_dot_product_attention` is torch's function under a name of ours: the same arguments, results and
strides on every device, and one node for the converter instead of five kernels' different ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule


@torch.library.custom_op("trt_dynamo::scaled_dot_product_attention", mutates_args=())
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, opaque to decomposition."""
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    # An op must not return its input: torch gives `value` itself back in no case known, and the check costs nothing.
    return result.clone() if result is value else result


@scaled_dot_product_attention.register_fake
def fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def keep_attention_whole(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph in which attention is the op above; the graph itself where gradients or autocast meddle."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return module
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    meddles = (torch.amp.autocast_mode._enter_autocast, torch._C._set_grad_enabled)
    if F.scaled_dot_product_attention not in targets or any(target in meddles for target in targets):
        return module
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention and not node.kwargs.get("dropout_p"):
            node.target = torch.ops.trt_dynamo.scaled_dot_product_attention.default
    copy = GraphModule(module, graph)
    copy.meta = module.meta
    return copy
