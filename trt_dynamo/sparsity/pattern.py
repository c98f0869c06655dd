"""The pattern itself. In: a weight and its reduced dim. Out: which elements to keep, or how far it follows the pattern.

TensorRT wants it so: for each output channel and each place of a kernel, every four input channels in a row have at
least two zeros ("Structured Sparsity" in NVIDIA's TensorRT documentation).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4
KEPT = 2


def largest_two(weight: Tensor, dim: int) -> Tensor:
    """A mask (bool, the weight's shape): the two largest magnitudes in each four along `dim`, of equal ones the first.

    Raises:
        ValueError: the dim's size is not divisible by 4.
    """
    order = groups(weight.detach().abs(), dim).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :KEPT], True)
    size = weight.movedim(dim, -1).shape
    return mask.view(size).movedim(-1, dim)


def share_of_dense_groups(weight: Tensor, dim: int) -> float:
    """The share, 0 to 1, of the groups of four along `dim` with more than two values other than 0.

    Raises:
        ValueError: the dim's size is not divisible by 4.
    """
    counts = (groups(weight.detach(), dim) != 0).sum(-1)
    return float((counts > KEPT).float().mean()) if counts.numel() else 0.0


def groups(weight: Tensor, dim: int) -> Tensor:
    """The elements as [groups, 4], each group in a row along `dim`."""
    if weight.shape[dim] % GROUP:
        raise ValueError(f"dim {dim} of {list(weight.shape)} is not divisible by {GROUP}")
    return weight.movedim(dim, -1).reshape(-1, GROUP)
