"""torch's fused kernels for `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, taken apart.

These modules call them in eval mode without gradients, so every evaluation of a model that has one meets them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trt_dynamo.operators.attention import scaled_dot_product_attention

# The kind of mask that lies over the keys of each batch; others broadcast to the scores as they are.
OVER_KEYS = 1


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`aten._native_multi_head_attention`: tensors are [batch, positions, features]; a mask is True at what is left
    out.
    """
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        matrices = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(x, weight, bias) for x, weight, bias in matrices)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in projected)
    weights = None
    if mask is None and not need_weights:
        mixed = scaled_dot_product_attention(q, k, v)
    else:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        weights = masked(scores, mask, mask_type).softmax(-1)
        mixed = weights @ v
    result = F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if weights is None or not need_weights:
        return result, None
    return result, weights.mean(1) if average_attn_weights else weights


def masked(scores: torch.Tensor, mask: torch.Tensor | None, mask_type: int | None) -> torch.Tensor:
    """A row without anything left is NaN, as the kernel has it."""
    if mask is None:
        return scores
    mask = mask.to(torch.bool)
    return scores.masked_fill(mask[:, None, None, :] if mask_type == OVER_KEYS else mask, -math.inf)


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """`aten._transformer_encoder_layer_fwd`: `src` is [batch, positions, features]."""

    def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    attended, _ = multi_head_attention(
        x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
    )
    x = attended + src
    between = x if norm_first else norm(x, norm_weight_1, norm_bias_1)
    x = norm(between, norm_weight_2, norm_bias_2) if norm_first else between
    x = F.linear(x, ffn_weight_1, ffn_bias_1)
    x = F.linear(F.gelu(x) if use_gelu else F.relu(x), ffn_weight_2, ffn_bias_2) + between
    return x if norm_first else norm(x, norm_weight_2, norm_bias_2)
