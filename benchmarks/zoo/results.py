"""The figures of the zoo: a dataclass, a line of JSON each, and the measure of a difference."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results.jsonl"

# Why a node at a graph's end is eager's though an engine could compute it: it makes a view of what an engine gives out.
VIEWS = ("a view that shares memory", "a result whose strides are not dense")


@dataclasses.dataclass
class Figures:
    """Of one model in one mode. `eager`: target, reason and number of the nodes that no engine has. `error` is the
    largest over all results, relative to the result's largest value; `other_error` the same for a second batch and
    size; `moved`, where the error is large, is how much eager itself answers otherwise when its input changes by a
    millionth. `recompiled` counts the graphs that the second sizes needed. `specialized` are torch's words where the
    model's own code fixes a dim. Memory is in MB; `clock` says which time the seconds are; `first_call_s` is wall time
    always. `failure` is empty for what ran.
    """

    name: str
    family: str
    mode: str
    failure: str = ""
    nodes: int = 0
    eager: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)
    graphs: int = 0
    eager_graphs: int = 0
    why_eager: dict[str, int] = dataclasses.field(default_factory=dict)
    breaks: list[str] = dataclasses.field(default_factory=list)
    engines: int = 0
    layers: int = 0
    first_call_s: float = 0.0
    lower_s: float = 0.0
    partition_s: float = 0.0
    convert_s: float = 0.0
    build_s: float = 0.0
    peak_mb: float = 0.0
    weights_mb: float = 0.0
    error: float | None = None
    other_error: float | None = None
    moved: float | None = None
    recompiled: int = 0
    eager_calls: int = 0
    specialized: str = ""
    clock: str = "wall"
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def stages(self, seconds: Mapping[str, float]) -> None:
        self.lower_s, self.partition_s = seconds["lower"], seconds["partition"]
        self.convert_s, self.build_s = seconds["convert"], seconds["build"]

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.mode

    @property
    def whole(self) -> bool:
        """One engine, nothing but views beside it, and no call of it left to eager."""
        computing = [reason for _, reason, _ in self.eager if not reason.startswith(VIEWS)]
        alone = self.engines == 1 and self.graphs == 1 and not computing and not self.eager_graphs
        return not self.failure and alone and not self.breaks and not self.recompiled and not self.eager_calls


def as_line(figures: Figures) -> str:
    plain = {
        key: float(f"{value:.3g}") if isinstance(value, float) else value
        for key, value in dataclasses.asdict(figures).items()
    }
    return re.sub(r"/[^\s\"`']*/site-packages/", "", json.dumps(plain))  # where packages lie is this machine's own


def read(path: Path = RESULTS) -> dict[tuple[str, str], Figures]:
    """The last line of each model and mode."""
    lines = path.read_text().splitlines() if path.exists() else []
    made = (Figures(**json.loads(line)) for line in lines)
    return {figures.key: figures for figures in made}


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a model's output, whatever classes they lie in, in order."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "to_tuple"):
            yield from tensors_of(leaf.to_tuple())
        elif hasattr(leaf, "__dict__"):
            yield from tensors_of([value for _, value in sorted(vars(leaf).items())])


def largest_error(actual: Any, expected: Any) -> float:
    """The largest difference over all tensors, each relative to the largest value of the expected one; infinite where
    shapes, dtypes, numbers of tensors, or what is not finite, differ.
    """
    given, wanted = list(tensors_of(actual)), list(tensors_of(expected))
    if len(given) != len(wanted):
        return float("inf")
    return max((error_of(a, e) for a, e in zip(given, wanted, strict=True)), default=float("inf"))


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    actual, expected = actual.double(), expected.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if not torch.equal(actual.isfinite() | same, expected.isfinite() | same):
        return float("inf")
    difference = torch.where(same, 0.0, (actual - expected).abs())
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.tensor(1.0)
    return float(difference.max() / scale.clamp_min(1e-12))
