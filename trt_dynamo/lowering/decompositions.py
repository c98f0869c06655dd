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

aten = torch.ops.aten

# Outside torch's core table, but a decomposition of torch's ends in ops that have converters.
FURTHER = [
    aten.addcdiv,
    aten.addcmul,
    aten.baddbmm,
    aten.addmv,
    aten.lerp,
    aten.mse_loss,
    aten.native_batch_norm,
    aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
    aten.std,
    aten.std_mean,
    aten.var_mean,
    aten.trace,
    aten.unsafe_split,
]


@functools.cache
def torch_table() -> dict[OpOverload, Callable[..., Any]]:
    table = dict(core_aten_decompositions())
    table.update({op: f for op, f in get_decompositions(FURTHER).items() if op not in table})
    return {op: function for op, function in table.items() if isinstance(op, OpOverload)}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The table for AOTAutograd. Made anew per graph: users may have registered converters meanwhile."""
    return {op: function for op, function in torch_table().items() if op not in CONVERTERS}
