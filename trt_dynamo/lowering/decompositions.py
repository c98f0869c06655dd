"""Which ATen ops are taken apart before partitioning: torch's core table, less what has a converter, plus a short
list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload

from trt_dynamo.aten_converters.registry import CONVERTERS
from trt_dynamo.lowering.fast_paths import encoder_layer, multi_head_attention
from trt_dynamo.lowering.modelopt import taken_apart

aten = torch.ops.aten

# Outside torch's core table, but a decomposition of torch's ends in ops that have converters.
FURTHER = [
    aten.addcdiv,
    aten.addcmul,
    aten.lerp,
    aten.mse_loss,
    aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
    aten.trace,
    aten.unsafe_split,
]


def native_batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """As the op that says what it writes; torch's own decomposition ends in a dozen of small ones."""
    if running_mean is None or running_var is None:
        results = aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    elif training:
        *results, mean, var = aten._native_batch_norm_legit_functional(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        running_mean.copy_(mean)
        running_var.copy_(var)
    else:
        results = aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_var, momentum, eps)
    return tuple(results)


def multilabel_margin_loss(x: torch.Tensor, target: torch.Tensor, reduction: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's, whose result for a single sample has a dim that the op's has not."""
    function = core_table()[aten.multilabel_margin_loss_forward.default]
    loss, is_target = function(x, target, reduction)
    return (loss.reshape(()) if x.ndim < 2 else loss), is_target


def index_fill(x: torch.Tensor, dim: int, index: torch.Tensor, value: torch.Tensor | complex) -> torch.Tensor:
    """torch's, which before 2.13 writes to a tensor of its own making where `x` is not row-major: AOTAutograd wants no
    writes.
    """
    filler = value if isinstance(value, torch.Tensor) else torch.scalar_tensor(value, dtype=x.dtype, device=x.device)
    rows = x if x.ndim else x.unsqueeze(0)
    places = [None] * (dim % rows.ndim) + [index.reshape(-1)]
    filled: torch.Tensor = aten.index_put(rows, places, filler.to(x.dtype))
    return filled if x.ndim else filled.squeeze(0).clone()


PIECES = 64  # of a window, each a few layers


def unfold_backward(grad: torch.Tensor, input_sizes: list[int], dim: int, size: int, step: int) -> torch.Tensor:
    """The sum of windows where they overlap, as the inverse of `stft` has it: each window is cut into pieces as long as
    the step, and the pieces that come first in their windows, second, ... are rows to be added. torch's own adds each
    element to its place.
    """
    pieces = -(-size // step)
    if not input_sizes or not 0 < pieces <= PIECES:
        found: torch.Tensor = core_table()[aten.unfold_backward.default](grad, input_sizes, dim, size, step)
        return found
    windows = torch.constant_pad_nd(grad.movedim(dim % len(input_sizes), -2), (0, pieces * step - size))
    rows = [
        torch.constant_pad_nd(windows.narrow(-1, i * step, step).flatten(-2), (i * step, (pieces - 1 - i) * step))
        for i in range(pieces)
    ]
    total = functools.reduce(torch.add, rows)
    rest = input_sizes[dim] - total.shape[-1]  # what no window reaches, or what the last pieces have too much
    return torch.constant_pad_nd(total, (0, rest)).movedim(-1, dim % len(input_sizes))


# Ours, in the place of torch's.
OWN: dict[OpOverload, Callable[..., Any]] = {
    aten.native_batch_norm.default: native_batch_norm,
    aten.multilabel_margin_loss_forward.default: multilabel_margin_loss,
    aten.unfold_backward.default: unfold_backward,
    aten.index_fill.int_Scalar: index_fill,
    aten.index_fill.int_Tensor: index_fill,
    aten._native_multi_head_attention.default: multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}


@functools.cache
def core_table() -> dict[Any, Callable[..., Any]]:
    """torch's core table. To read it as a mapping has torch look for the composite ops of all other libraries, for
    longer than all of our passes take; a trace takes those apart without a table.
    """
    table = core_aten_decompositions()
    return dict(getattr(table, "decomp_table", table))


@functools.cache
def torch_table() -> dict[OpOverload, Callable[..., Any]]:
    table = dict(core_table())
    table.update({op: f for op, f in get_decompositions(FURTHER).items() if op not in table})
    return {op: function for op, function in (table | OWN).items() if isinstance(op, OpOverload)}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The table for AOTAutograd. Made anew per graph: users may have registered converters meanwhile, or loaded
    ModelOpt.
    """
    return {op: function for op, function in (torch_table() | taken_apart()).items() if op not in CONVERTERS}
