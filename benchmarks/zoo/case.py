"""What the zoo knows of a model: how to make it, and its inputs at any batch and size."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo. `inputs(batch, size)` gives arguments and keywords; `sizes` are two values of `size` (of an
    image, a sequence), equal where the model takes one size only. What differs between two batches and sizes are the
    dims that vary. `breaks`: the model's own code has ops whose results' sizes depend on data, or Python that Dynamo
    cannot trace, so that it is more than one graph whatever the backend. `reads_numbers`: its code calls `item`, and
    torch's flag `capture_scalar_outputs` keeps it in one graph."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sizes: tuple[int, int]
    breaks: str = ""
    reads_numbers: bool = False
    batches: tuple[int, int] = (2, 3)


CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    if case.name in CASES:
        raise ValueError(f"two models are called {case.name}")
    CASES[case.name] = case


def load(module: str, name: str) -> Callable[..., Any]:
    """A class or function of a library that may be missing, loaded when it is needed."""
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, with batch-norm statistics that are not the identity, and no weight left at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
                mean.normal_(0, 0.1, generator=generator)
                variance.uniform_(0.5, 1.5, generator=generator)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model.eval()


def image(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 3, size, size),), {}


def token_ids(batch: int, length: int, words: int = 90) -> torch.Tensor:
    return (torch.arange(batch * length).reshape(batch, length) * 7 + 3) % words


def text(batch: int, length: int) -> Inputs:
    """Token ids and a mask that shortens the first sequence."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length * 2 // 3 :] = 0
    return (), {"input_ids": token_ids(batch, length), "attention_mask": mask}


def varying_dims(first: Inputs, second: Inputs) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """The tensors of `first`, each with its dims that are of another size in `second`."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return [
        (a, tuple(d for d in range(a.ndim) if a.shape[d] != b.shape[d]))
        for a, b in pairs
        if isinstance(a, torch.Tensor)
    ]
