"""Scaled dot-product attention: `IAttention` where the version has it without a known fault, else matrix products.

A row whose mask lets nothing through is all zeros, as in torch; TensorRT's softmax would make it NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

import trt_dynamo.operators.attention  # noqa: F401  it defines the op
from trt_dynamo.aten_converters.network import HALVES, Network, Tensor
from trt_dynamo.aten_converters.reduction import any_of
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import floordiv
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import has, probed, trt

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: tensors `[..., tokens, head size]`, the mask broadcast to `[..., queries, keys]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None

    def replaced(self, query: Tensor, key: Tensor, value: Tensor) -> Attention:
        return dataclasses.replace(self, query=query, key=key, value=value)


@converter(torch.ops.trt_dynamo.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise Unsupported("dropout: each call's is another")
    return attend(net, Attention(query, key, value, attn_mask, is_causal, scale))


@converter(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_for_cpu(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Sequence[Tensor | None]:
    return kernel(net, Attention(query, key, value, attn_mask, is_causal, scale), dropout_p)


@converter(aten._scaled_dot_product_flash_attention.default)
def flash(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Sequence[Tensor | None]:
    return kernel(net, Attention(query, key, value, None, is_causal, scale), dropout_p)


@converter(aten._scaled_dot_product_efficient_attention.default)
def efficient(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Sequence[Tensor | None]:
    return kernel(net, Attention(query, key, value, attn_bias, is_causal, scale), dropout_p)


@converter(aten._scaled_dot_product_cudnn_attention.default)
def cudnn(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Sequence[Tensor | None]:
    return kernel(net, Attention(query, key, value, attn_bias, is_causal, scale), dropout_p)


@converter(aten._scaled_dot_product_fused_attention_overrideable.default)
def overrideable(
    net: Network,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Sequence[Tensor | None]:
    return kernel(net, Attention(query, key, value, attn_bias, is_causal, scale), dropout_p)


def kernel(net: Network, attention: Attention, dropout: float) -> Sequence[Tensor | None]:
    """The first result of one of torch's kernels; the others are for its backward pass."""
    if dropout:
        raise Unsupported("dropout: each call's is another")
    if any(net.used[1:]):
        raise Unsupported("what only a backward pass reads")
    return (attend(net, attention), *(None for _ in net.used[1:]))


def attend(net: Network, attention: Attention) -> Tensor:
    """A row that may look at nothing is 0, as in torch."""
    mask, dtype = attention.mask, attention.query.dtype
    if mask is not None and mask.dtype not in (torch.bool, dtype):
        # torch takes a float32 mask for half queries, and computes in float32 then. In plain layers: at casts in front
        # of the attention layer TensorRT for RTX 1.7's builder crashes.
        wide = attention.replaced(*(net.wide(x) for x in (attention.query, attention.key, attention.value)))
        attention = dataclasses.replace(wide, mask=net.cast(mask, wide.query.dtype))
        result = net.cast(by_products(net, attention), dtype)
    else:
        result = by_layer(net, attention) if fits_layer(attention) else by_products(net, attention)
    if mask is None:
        return result
    return net.where(any_of(net, lets_through(net, mask), [mask.ndim - 1], keepdim=True), result, 0.0)


def lets_through(net: Network, mask: Tensor) -> Tensor:
    """Where a mask is not minus infinity; a NaN in it lets through, to show in the result."""
    if mask.dtype is torch.bool:
        return mask
    return net.logical_not(net.elementwise("EQUAL", mask, -math.inf))


def fits_layer(attention: Attention) -> bool:
    """Whether TensorRT's own layer can take it: three or four dims, heads and head size known, keys shaped like values.

    It has no kernel for float32, and RTX's builder crashes on a float32 attention with a mask and cast queries.
    TensorRT 10's layer, which `add_attention_v2` came after, gets causal masks wrong.
    """
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    if not has("add_attention") or query.dtype not in HALVES or query.ndim not in (3, 4) or key.ndim != query.ndim:
        return False
    if key.shape != value.shape or (attention.causal and not has("add_attention_v2")):
        return False
    if query.shape[-1] != key.shape[-1] or not isinstance(query.shape[-1], int) or query.shape[0] != key.shape[0]:
        return False
    if mask is not None and mask.ndim > query.ndim:
        return False
    if query.ndim == 3:
        return True
    heads, key_heads = query.shape[1], key.shape[1]
    return isinstance(heads, int) and isinstance(key_heads, int) and key_heads > 0 and heads % key_heads == 0


def by_layer(net: Network, attention: Attention) -> Tensor:
    query, key, value, mask = attention.query, attention.key, attention.value, attention.mask
    flat = query.ndim == 3
    if flat:
        query, key, value = (net.unsqueeze(x, [1]) for x in (query, key, value))
        mask = net.unsqueeze(mask, [1]) if mask is not None and mask.ndim == 3 else mask
    # A factor for each channel: of two attentions with one query, scaled by a single number, RTX 1.7's builder crashes.
    factors = torch.full((1, 1, 1, int(query.shape[3])), scale_of(attention), dtype=query.dtype)
    query = net.elementwise("PROD", query, net.constant(factors))
    raw, names = probed(net.raw), probed(trt)
    softmax = names.AttentionNormalizationOp.SOFTMAX
    if has("add_attention_v2"):
        form = names.CausalMaskKind.UPPER_LEFT if attention.causal else names.CausalMaskKind.NONE
        layer = net.made(raw.add_attention_v2(query.raw, key.raw, value.raw, softmax, form))
    else:
        layer = net.made(raw.add_attention(query.raw, key.raw, value.raw, softmax, False))
    layer.decomposable = True
    if mask is not None:
        keys = key.shape[2]
        mask = net.unsqueeze_to(mask, 4)
        layer.mask = (mask if mask.shape[3] == keys else net.expand(mask, (*mask.shape[:3], keys))).raw
    out = net.out(layer, shape=query.shape, dtype=query.dtype)
    return net.squeeze(out, [1]) if flat else out


def scale_of(attention: Attention) -> float:
    size = attention.query.shape[-1]
    return attention.scale if attention.scale is not None else 1 / math.sqrt(int(size)) if size else 1.0


def by_products(net: Network, attention: Attention) -> Tensor:
    """`softmax(query @ key^T * scale + mask) @ value`, the softmax of half types in float32."""
    query, key, value, dtype = attention.query, attention.key, attention.value, attention.query.dtype
    key, value = (repeated(net, x, query) for x in (key, value))
    swapped = net.permute(key, [*range(key.ndim - 2), key.ndim - 1, key.ndim - 2])
    scores = net.wide(net.matmul(scaled(net, attention), swapped))
    mask = attention.mask
    if attention.causal:
        rows, columns = query.shape[-2], key.shape[-2]
        distance = net.linspace((rows, columns), 0, (1, -1))
        mask = net.elementwise("GREATER", distance, -1)
    if mask is not None and mask.dtype is torch.bool:
        scores = net.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = net.elementwise("SUM", scores, net.wide(mask))
    return net.matmul(net.cast(net.softmax(scores, -1), dtype), value)


def scaled(net: Network, attention: Attention) -> Tensor:
    size = attention.query.shape[-1]
    if isinstance(size, int) or attention.scale is not None:
        return net.elementwise("PROD", attention.query, scale_of(attention))
    root = net.unary("SQRT", net.size_tensor(size, torch.float32))
    return net.cast(net.elementwise("DIV", net.wide(attention.query), root), attention.query.dtype)


def repeated(net: Network, x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with each head as often as there are queries for it."""
    if x.ndim < 3 or query.ndim != x.ndim or x.shape[-3] in (1, query.shape[-3]):
        return x
    times: Dim = floordiv(query.shape[-3], x.shape[-3])
    wide = net.unsqueeze(x, [x.ndim - 2])
    wide = net.expand(wide, (*x.shape[:-2], times, *x.shape[-2:]))
    return net.reshape(wide, (*x.shape[:-3], query.shape[-3], *x.shape[-2:]))
