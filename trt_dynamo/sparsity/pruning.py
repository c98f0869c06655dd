"""`sparsify`: prunes the weights of linear layers and convolutions 2:4 by magnitude, in place.

torch's own tools do not serve: `torch.ao.pruning` prunes along the last dim, which for a convolution is the kernel's
width, and `SparseSemiStructuredTensor` is a type of tensor for CUDA kernels, where TensorRT wants plain weights with
zeros in them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trt_dynamo.sparsity.pattern import GROUP, largest_two

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

PRUNED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class PrunedWeight:
    """What became of a weight: its qualified `name`, its `shape`, the `dim` along which each four in a row now have two
    zeros, the share of elements `kept` (other than 0), and the `lost` norm: |before - after| / |before|.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    kept: float
    lost: float


@dataclasses.dataclass(frozen=True, eq=False)
class Sparsified:
    """What `sparsify` did. `skipped` has the weights that it left as they are, each with the reason."""

    weights: tuple[PrunedWeight, ...]
    skipped: tuple[tuple[str, str], ...]
    masks: dict[str, Tensor] = dataclasses.field(repr=False)
    model: weakref.ref[nn.Module] = dataclasses.field(repr=False)

    def reapply(self, *_: Any) -> None:
        """Sets to 0 again what was pruned, for training that goes on: `optimizer.register_step_post_hook(it.reapply)`.

        Raises:
            RuntimeError: the model is gone.
        """
        model = self.model()
        if model is None:
            raise RuntimeError("the model that was pruned is gone")
        with torch.no_grad():
            for name, mask in self.masks.items():
                weight = model.get_parameter(name)
                weight.masked_fill_(~mask.to(weight.device), 0)

    def __str__(self) -> str:
        """A line for each weight."""
        lines = [f"{len(self.weights)} weights pruned 2:4, {len(self.skipped)} left as they are"]
        lines += [f"  {w.name} {list(w.shape)}: {w.kept:.1%} kept, {w.lost:.1%} of its norm lost" for w in self.weights]
        lines += [f"  {name}: left, {reason}" for name, reason in self.skipped]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "weights": [dataclasses.asdict(weight) for weight in self.weights],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }


def sparsify(model: nn.Module, *, only: Sequence[str] = ("*",), keep: Sequence[str] = ()) -> Sparsified:
    """Prunes the model's weights 2:4 by magnitude, in place: of each four in a row along the dim that a product adds up
    (the input channels), the two smallest become 0. Linear layers, convolutions (not transposed ones), the projections
    of `MultiheadAttention` and transformers' `Conv1D` are pruned.

    A weight stays as it is where that dim is not divisible by 4, where something else reads it too (an embedding that
    shares it), or where it is not a plain parameter. This costs accuracy; see docs/sparsity.md.

    Args:
        model: whatever its device; its weights in floats.
        only, keep: patterns (`*` and `?`) over the names of modules, which stand for all that is in them: what to prune
            (by default everything), and what not.

    Raises:
        ValueError: a pattern names no module.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    check_patterns(model, (*only, *keep))
    pruned: list[PrunedWeight] = []
    skipped: list[tuple[str, str]] = []
    masks: dict[str, Tensor] = {}
    found, readers = list(candidates(model)), readers_of(model)
    known = {(id(module), attribute) for _, module, attribute, _ in found}
    done: set[int] = set()
    for path, module, attribute, dim in found:
        name = f"{path}.{attribute}".lstrip(".")
        if not named(path, only) or named(path, keep):
            continue
        weight = getattr(module, attribute)
        reason = why_not(module, attribute, dim)
        if reason is None and not readers[id(weight)] <= known:
            reason = "something other than a linear layer or convolution reads it too"
        if reason is not None:
            skipped.append((name, reason))
        elif id(weight) not in done:
            done.add(id(weight))
            masks[name] = largest_two(weight, dim)
            pruned.append(prune(name, weight, dim, masks[name]))
    return Sparsified(tuple(pruned), tuple(skipped), masks, weakref.ref(model))


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """The weights that products read: the module's path, the module, the weight's name in it, its reduced dim."""
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            yield path, module, "weight", 1
        elif isinstance(module, nn.MultiheadAttention):
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            yield from ((path, module, name, 1) for name in names if getattr(module, name) is not None)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': [inputs, outputs]
            yield path, module, "weight", 0


def readers_of(model: nn.Module) -> dict[int, set[tuple[int, str]]]:
    """For each parameter by its id, all modules that hold it, and its name there."""
    readers: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            readers.setdefault(id(weight), set()).add((id(module), name))
    return readers


def why_not(module: nn.Module, attribute: str, dim: int) -> str | None:
    """Why this weight cannot be pruned in place, or None."""
    if attribute not in module._parameters:
        return "it is computed, not a parameter (a parametrization or weight norm): prune what it is computed from"
    weight = getattr(module, attribute)
    if is_lazy(weight):
        return "it has no shape yet"
    if weight.is_meta or weight.dtype not in PRUNED_TYPES or is_traceable_wrapper_subclass(weight):
        return f"it is no plain tensor of floats ({weight.dtype} on {weight.device})"
    if weight.shape[dim] % GROUP:
        return f"its dim {dim}, which is added up, has {weight.shape[dim]} elements: not divisible by {GROUP}"
    return None


def prune(name: str, weight: Tensor, dim: int, mask: Tensor) -> PrunedWeight:
    """Sets to 0 what is not in the mask."""
    with torch.no_grad():
        before = torch.linalg.vector_norm(weight, dtype=torch.float64)
        lost = torch.linalg.vector_norm(weight.masked_fill(mask, 0), dtype=torch.float64)
        weight.masked_fill_(~mask, 0)
        kept = (weight != 0).double().mean()
    return PrunedWeight(name, tuple(weight.shape), dim, float(kept), float(lost / before) if before else 0.0)


def named(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the module, or one that it is in."""
    parts = path.split(".")
    inside = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch.fnmatchcase(name, pattern) for name in inside for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [path for path, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"the pattern {pattern!r} names no module of the model")
