"""Layers of transformers: ATTENTION_INPUT and ATTENTION_OUTPUT, ROTARY_EMBEDDING, KV_CACHE_UPDATE."""

from __future__ import annotations

import torch
from torch import Tensor

from trt_dynamo.reference.layer import Layer, Run, evaluates


@evaluates("ATTENTION_INPUT")
def attention(layer: Layer) -> Run:
    """norm(query @ key^T + mask) @ value, in dims [batch, heads, tokens, head size]; no scale. This layer does all the
    work, and ATTENTION_OUTPUT, which only marks the end, passes it on.
    """
    native = layer.native.attention
    kind = native.causal_kind.name if hasattr(native, "causal_kind") else "UPPER_LEFT" if native.causal else "NONE"
    normalize = native.norm_op.name == "SOFTMAX"
    if layer.has_input(4):
        raise layer.unsupported("a quantized normalization")
    forms = {getattr(native, form).name for form in ("query_form", "key_value_form") if hasattr(native, form)}
    if "PACKED_NHD" in forms:
        raise layer.unsupported("packed queries or keys")

    def run(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *lengths: Tensor | None
    ) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else scores + mask
        if kind != "NONE":
            scores = scores.masked_fill(hidden(scores, kind), -float("inf"))
        kept = lengths[2] if len(lengths) > 2 else None
        if kept is not None:
            past = torch.arange(scores.shape[-1], device=scores.device) >= kept.reshape(-1, 1, 1, 1)
            scores = scores.masked_fill(past, -float("inf"))
        return (torch.softmax(scores, -1) if normalize else scores) @ value

    return run


def hidden(scores: Tensor, kind: str) -> Tensor:
    """Which keys a causal attention hides from which queries."""
    queries, keys = scores.shape[-2:]
    shift = keys - queries if kind == "LOWER_RIGHT" else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(shift + 1)


@evaluates("ATTENTION_OUTPUT", exact=True)
def attention_output(layer: Layer) -> Run:
    return lambda x: x
