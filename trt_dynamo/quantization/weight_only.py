"""Linear layers and embeddings whose weights alone are codes, by torchao's `quantize_`; nothing is calibrated for it.

Comes in: a model in floats. Goes out: a copy whose weights are torchao's tensors of int8 or int4 codes, with scales.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

# The types, with the number of weights of a row that share a scale; None: the whole row.
GROUPS: Mapping[str, int | None] = {"int8wo": None, "int4wo": 32}


def quantize_weights(model: nn.Module, dtype: str, group: int | None = None, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of the model with the weights of linear layers in int8 or int4, and those of embeddings in int8 (one scale
    per row); for inference.

    Args:
        dtype: of `GROUPS`.
        group: how many weights of a row share a scale; rows that it does not divide have one scale.
        keep: patterns over the names of modules that stay as they are.
    """
    group = GROUPS[dtype] if group is None else group
    result = copy.deepcopy(model).eval().requires_grad_(False)
    with_linear_layers(result)
    for name, module in list(result.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and is_plain(module) and not kept(name, keep):
            linear = isinstance(module, nn.Linear)
            small = dtype == "int4wo" and linear
            divides = group is not None and linear and module.weight.shape[1] % group == 0
            codes = torch.int4 if small else torch.int8  # type: ignore[attr-defined]
            replace_weight(module, codes, group if divides else None)
    return result


def is_plain(module: Any) -> bool:
    """Whether its weight is a parameter in floats, of no tensor class, and not computed from others."""
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.numel() > 0


def kept(name: str, patterns: Sequence[str]) -> bool:
    """Whether the module, or one that it is in, matches."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(one, pattern) for one in names for pattern in patterns)


def replace_weight(module: nn.Module, dtype: torch.dtype, group: int | None) -> None:
    """Quantizes the weight of one module: symmetric codes, a scale per group of a row or per row."""
    torchao = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    each = granularity.PerAxis(0) if group is None else granularity.PerGroup(group)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=each)
    torchao.quantize_(module, config, filter_fn=lambda *_: True)


def with_linear_layers(model: nn.Module) -> None:
    """Gives transformers' `Conv1D` modules, linear layers with a transposed weight (GPT-2 has them), torch's form."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Conv1D" and hasattr(child, "nf") and is_plain(child):
                setattr(parent, name, linear_layer(child))


def linear_layer(module: Any) -> nn.Linear:
    inputs, outputs = module.weight.shape
    with torch.device("meta"):
        made = nn.Linear(inputs, outputs, bias=module.bias is not None)
    made.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    made.bias = module.bias
    return made.train(module.training)
