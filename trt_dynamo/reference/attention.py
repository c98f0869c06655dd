"""Layers of transformers: ATTENTION_INPUT and ATTENTION_OUTPUT, ROTARY_EMBEDDING, KV_CACHE_UPDATE, MOE."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trt_dynamo.errors import EngineError
from trt_dynamo.reference.layer import Layer, Run, evaluates


@dataclass(frozen=True)
class Attention:
    """softmax(query @ key^T + mask) @ value without any scale, in dims [batch, heads, tokens, head size]."""

    normalize: bool
    causal: str  # the name of a trt.CausalMaskKind

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """`lengths`: how many keys each item of the batch has; the others are padding."""
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.mT
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask
        for hidden in self.hidden(scores, mask, lengths):
            scores = scores.masked_fill(hidden, -float("inf") if self.normalize else 0.0)
        return (torch.softmax(scores, -1) if self.normalize else scores) @ value

    def hidden(self, scores: Tensor, mask: Tensor | None, lengths: Tensor | None) -> list[Tensor]:
        """Which scores do not count."""
        queries, keys = scores.shape[-2:]
        found = []
        if mask is not None and mask.dtype == torch.bool:
            found.append(~mask)
        if self.causal != "NONE":
            shift = keys - queries if self.causal == "LOWER_RIGHT" else 0
            found.append(torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(shift + 1))
        if lengths is not None:
            found.append(torch.arange(keys, device=scores.device) >= lengths.reshape(-1, 1, 1, 1))
        return found


@evaluates("ATTENTION_INPUT", host=(5,))
def attention(layer: Layer) -> Run:
    """All of an IAttention; ATTENTION_OUTPUT only marks its end. A row without a key to attend to gives NaN."""
    native = layer.native.attention
    older = "UPPER_LEFT" if native.causal else "NONE"
    causal = native.causal_kind.name if hasattr(native, "causal_kind") else older
    packed_query, packed_key = (is_packed(native, form) for form in ("query_form", "key_value_form"))
    function = Attention(native.norm_op.name == "SOFTMAX", causal)
    if layer.has_input(4):
        raise layer.unsupported("a quantized normalization: its rounding inside the kernel is not documented")
    if packed_query or packed_key:
        if layer.has_input(3):
            raise layer.unsupported("a mask with packed queries or keys is not documented")
        return packed_attention(function, packed_query, packed_key)
    if layer.has_input(6) and causal == "LOWER_RIGHT":
        raise layer.unsupported(
            "LOWER_RIGHT with key_value_lengths: whether padding shifts the diagonal is not documented"
        )

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Tensor | None) -> Tensor:
        return function(query, key, value, mask, rest[2] if len(rest) > 2 else None)

    return run


def is_packed(native: object, form: str) -> bool:
    """Whether the queries, or the keys, are packed; TensorRT before 11 has no such form."""
    return hasattr(native, form) and getattr(native, form).name == "PACKED_NHD"


def packed_attention(function: Attention, packed_query: bool, packed_key: bool) -> Run:
    """Attention over sequences laid end to end ([tokens, heads, head size]), whose bounds the lengths give."""

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> Tensor:
        lengths = [*rest, None, None, None, None]
        queries = sequences(query, lengths[2], packed_query)
        keys = sequences(key, lengths[3], packed_key)
        values = sequences(value, lengths[3], packed_key)
        results = [function(q, k, v, None, None) for q, k, v in zip(queries, keys, values, strict=True)]
        if packed_query:
            return torch.cat([result[0].transpose(0, 1) for result in results])
        return torch.cat(results)

    return run


def sequences(x: Tensor, lengths: Tensor | None, packed: bool) -> list[Tensor]:
    """Each sequence as [1, heads, tokens, head size], without padding."""
    if not packed:
        sizes = [x.shape[2]] * x.shape[0] if lengths is None else lengths.tolist()
        return [item[:, :size].unsqueeze(0) for item, size in zip(x, sizes, strict=True)]
    if lengths is None:
        raise EngineError("packed tokens without the lengths of the sequences")
    ends = lengths.tolist()
    return [x[start:end].transpose(0, 1).unsqueeze(0) for start, end in itertools.pairwise(ends)]


@evaluates("ATTENTION_OUTPUT", exact=True)
def attention_output(layer: Layer) -> Run:
    return lambda x: x


@evaluates("ROTARY_EMBEDDING")
def rotary_embedding(layer: Layer) -> Run:
    """Turns pairs of elements of the last dim of [batch, heads, tokens, head size].

    The first `rotary_embedding_dim` elements (0: all) are paired as neighbours or as two halves. Positions, where
    given, look up the rows of the caches.
    """
    interleaved, part = layer.native.interleaved, layer.native.rotary_embedding_dim

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        size = part or x.shape[-1]
        if positions is not None:
            cos, sin = cos[positions.long()], sin[positions.long()]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turning, rest = x[..., :size], x[..., size:]
        first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
        pair = (first * cos - second * sin, first * sin + second * cos)
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1)

    return run


@evaluates("KV_CACHE_UPDATE", exact=True, host=(2, 3))
def kv_cache_update(layer: Layer) -> Run:
    """The cache [batch, heads, longest, head size] with each sequence's new tokens written from its index on."""
    native = layer.native
    packed = is_packed(native, "update_form")
    if native.cache_mode.name != "LINEAR":
        raise layer.unsupported(f"cache mode {native.cache_mode.name}")

    def run(cache: Tensor, update: Tensor, starts: Tensor, lengths: Tensor | None = None) -> Tensor:
        result = cache.clone()
        news = sequences(update, lengths if packed else None, packed)
        for item, (new, start) in enumerate(zip(news, starts.tolist(), strict=True)):
            end = start + new.shape[2]
            if start < 0 or end > cache.shape[2]:
                raise EngineError(f"tokens {start} to {end} are written to a cache of {cache.shape[2]}")
            result[item, :, start:end] = new[0]
        return result

    return run


@evaluates("MOE")
def mixture_of_experts(layer: Layer) -> Run:
    """The sum over each token's experts of score * (activation(x @ gate) * (x @ up)) @ down, with biases if given."""
    native = layer.native
    silu = native.activation_type.name == "SILU"
    defaults = (float("inf"), 1.0, 0.0)
    if (native.swiglu_param_limit, native.swiglu_param_alpha, native.swiglu_param_beta) != defaults:
        raise layer.unsupported("SwiGLU parameters, whose formula is not documented")
    if layer.has_input(9):
        raise layer.unsupported("quantization between the projections, whose rounding is not documented")

    def run(x: Tensor, chosen: Tensor, scores: Tensor, *weights: Tensor | None) -> Tensor:
        gate, up, down, gate_bias, up_bias, down_bias = [*weights, None, None, None][:6]
        result = torch.zeros_like(x)
        for place in range(chosen.shape[-1]):
            expert = chosen[..., place].long()
            gated = projected(x, gate, gate_bias, expert)
            hidden = (functional.silu(gated) if silu else gated) * projected(x, up, up_bias, expert)
            result = result + scores[..., place : place + 1] * projected(hidden, down, down_bias, expert)
        return result

    return run


def projected(x: Tensor, weights: Tensor | None, bias: Tensor | None, expert: Tensor) -> Tensor:
    """x @ weights[expert] + bias[expert], token by token."""
    if weights is None:
        raise EngineError("an expert without weights")
    result = torch.einsum("...i,...io->...o", x, weights[expert])
    return result if bias is None else result + bias[expert]
