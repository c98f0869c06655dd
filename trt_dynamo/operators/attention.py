"""An op for `scaled_dot_product_attention`, for which AOTAutograd would pick a device's kernel.

The op `trt_dynamo::scaled_dot_product_attention` is torch's function under a name of ours: the same arguments,
results and strides on every device, and one node for the converter instead of five kernels' different ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def attention(
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


scaled_dot_product_attention = torch.library.custom_op(
    "trt_dynamo::scaled_dot_product_attention", attention, mutates_args=()
)
scaled_dot_product_attention.register_fake(attention)


def attend(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Any:
    """Stands for torch's function, where there is no dropout."""
    dropout = args[4] if len(args) > 4 else dropout_p
    return NotImplemented if dropout else scaled_dot_product_attention(*args, **kwargs)
