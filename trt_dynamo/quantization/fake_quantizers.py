"""Modules of quantization-aware training, with the scales that training gave them, for an engine.

Comes in: a trained model with `FakeQuantize` modules, torch.ao's or torchao's. Goes out: the same model, each of them
in its final form. As they are, they look at switches and statistics at every call, which ends a compiled graph.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class FrozenFakeQuantize(nn.Module):
    """Rounds to `scale * (code - zero_point)`, codes from `low` to `high`; one scale, or one per index of `axis`."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("zero_point", zero_point.detach().round().to(torch.int32))
        self.low, self.high, self.axis = low, high, axis

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, self.low, self.high)

    def extra_repr(self) -> str:
        return f"codes {self.low} to {self.high}, axis {self.axis}"


def freeze_fake_quantize(model: Model) -> Model:
    """Gives the model's `FakeQuantize` modules their final form, so that `torch.compile` takes them into its graphs.

    The model is changed in place and returned; a copy is `freeze_fake_quantize(copy.deepcopy(model))`. A module whose
    fake quantization is switched off is left out. Models that went through `convert_pt2e` need none of this.

    Raises:
        ValueError: a module has seen no data, and so has no scale yet.
    """
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            if is_fake_quantizer(child):
                setattr(parent, child_name, frozen(child, f"{name}.{child_name}".lstrip(".")))
    return model


def is_fake_quantizer(module: Any) -> bool:
    """By what it has: torch.ao's and torchao's classes have no common parent."""
    return all(
        hasattr(module, name) for name in ("fake_quant_enabled", "scale", "zero_point", "quant_min", "quant_max")
    )


def frozen(module: Any, name: str) -> nn.Module:
    if not int(module.fake_quant_enabled.flatten()[0]):
        return nn.Identity()
    observer = getattr(module, "activation_post_process", None)
    smallest = getattr(observer, "min_val", None)
    if smallest is not None and (smallest.numel() == 0 or bool(smallest.isinf().any())):
        raise ValueError(f"{name} has seen no data: train or calibrate the model first")
    several = module.scale.numel() > 1 or getattr(module, "qscheme", None) in PER_CHANNEL
    axis = int(module.ch_axis) if several else None
    return FrozenFakeQuantize(module.scale, module.zero_point, int(module.quant_min), int(module.quant_max), axis)


PER_CHANNEL = (torch.per_channel_symmetric, torch.per_channel_affine, torch.per_channel_affine_float_qparams)
