"""Whether two answers to a call are the same, but for rounding.

Comes in: an engine's results, eager's, and how far they may be apart. Goes out: an `Agreement`, with the numbers of the
result that is worst. Where they are further apart than the tolerance, eager runs a few times more with the rounding
that the precision makes after each op: what rounding alone moves as far is no fault of the engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

# The largest relative error (L2, over a result as a whole), and what one rounding makes of a value, by the least exact
# type that an engine computes in. An error of e leaves a cosine of at least sqrt(1 - e**2): 0.9987 for bf16.
TOLERANCES: dict[str, tuple[float, float]] = {
    "float32": (1e-3, 2.0**-20),
    "tf32": (1e-2, 2.0**-11),
    "fp16": (1e-2, 2.0**-11),
    "bf16": (5e-2, 2.0**-8),
    "8 bits": (5e-2, 2.0**-8),
}

# A single element may be further off than the whole, measured by the largest one.
ELEMENT = 10

# Rounding counts as the cause of errors up to so many times those that it made, in so many trials.
EXCUSED, TRIALS = 4, 3


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How far an engine may be from eager. `name` is that of the type; `decided` says of each result whether it is of
    floats, or of integers that comparisons of floats decide: such integers may differ in that share of them, others
    not at all. `rigid`: the user set the tolerance, and rounding is no excuse.
    """

    name: str
    tolerance: float
    unit: float
    decided: tuple[bool, ...]
    rigid: bool = False


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two tensors: the L2 norm of their difference over that of the second (of integers, the share that differs), the
    largest difference over the largest element, the cosine, and how many elements are NaN or infinite in one alone;
    `off` and `peak` are that norm and that largest difference themselves. `why` says that they cannot be compared.
    """

    error: float = 0.0
    worst: float = 0.0
    cosine: float = 1.0
    strange: int = 0
    elements: int = 0
    integers: bool = False
    off: float = 0.0
    peak: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return self.why
        if self.integers:
            return f"{self.error:.3%} of {self.elements} integers differ"
        odd = f"{self.strange} of {self.elements} elements are NaN or infinite on one side alone, " * bool(self.strange)
        return f"{odd}relative error {self.error:.2g}, of one element {self.worst:.2g}, cosine {self.cosine:.6f}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The worst of the results: which, its difference, and whether all are near enough."""

    agrees: bool
    result: int
    difference: Difference
    compared: bool  # there were any elements


def accuracy_of(module: GraphModule, precision: str, tf32: bool, tolerance: float | None) -> Accuracy:
    """What may be asked of an engine for the graph: by the setting `precision`, the model's own types, and TF32."""
    names = {"fp16": "fp16", "auto": "fp16", "bf16": "bf16"}
    kinds = {names.get(precision, "tf32" if tf32 else "float32")}
    floats: set[Node] = set()
    for node in module.graph.nodes:
        dtypes = {v.dtype for v in values_of(node)}
        if any(d.is_floating_point for d in dtypes) or floats & {*node.all_input_nodes}:
            floats.add(node)
        kinds |= {kind for dtype, kind in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")) if dtype in dtypes}
        if any(d.is_floating_point and d.itemsize == 1 for d in dtypes) or "quantize" in str(node.target):
            kinds.add("8 bits")
    (output,) = module.graph.find_nodes(op="output")
    name = max(kinds, key=lambda kind: TOLERANCES[kind])
    usual, unit = TOLERANCES[name]
    decided = tuple(node in floats for node in output.args[0])
    return Accuracy(name, usual if tolerance is None else tolerance, unit, decided, rigid=tolerance is not None)


def values_of(node: Node) -> list[torch.Tensor]:
    """The fake tensors of a node."""
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, torch.Tensor)]


def compare(
    results: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    accuracy: Accuracy,
    rounded: Callable[[], Sequence[torch.Tensor]],
) -> Agreement:
    """Compares an engine's results with eager's. `rounded` gives eager's with the errors of rounding in it."""
    if len(results) != len(expected):
        odd = Difference(why=f"there are {len(results)} results, eager has {len(expected)}")
        return Agreement(False, 0, odd, compared=True)
    found = [difference(a, e) for a, e in zip(results, expected, strict=True)]
    bad = [i for i, each in enumerate(found) if not near(each, accuracy, accuracy.decided[i])]
    if bad and not accuracy.rigid and all(excusable(found[i], accuracy.decided[i]) for i in bad):
        for _ in range(TRIALS):
            try:
                trial = rounded()
            except torch.OutOfMemoryError:  # then nothing excuses it
                break
            bad = [i for i in bad if not excused(found[i], difference(trial[i], expected[i]))]
            if not bad:
                break
    worst = max(bad or range(len(found)), key=lambda i: badness(found[i]), default=0)
    told = found[worst] if found else Difference()
    return Agreement(not bad, worst, told, any(each.elements for each in found))


def near(found: Difference, accuracy: Accuracy, decided: bool = True) -> bool:
    """Whether the tolerance covers the difference."""
    if found.why or found.strange:
        return False
    if found.integers:
        return found.error <= accuracy.tolerance * decided
    return found.error <= accuracy.tolerance and found.worst <= ELEMENT * accuracy.tolerance


def excusable(found: Difference, decided: bool = True) -> bool:
    """Whether rounding can have made it at all."""
    return not found.why and decided


def excused(found: Difference, noise: Difference) -> bool:
    """Whether rounding alone makes about as much."""
    return (
        found.off <= EXCUSED * noise.off
        and found.peak <= EXCUSED * noise.peak
        and found.strange <= EXCUSED * noise.strange
    )


def badness(found: Difference) -> tuple[bool, int, float]:
    return bool(found.why), found.strange, found.error


def difference(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """How far two tensors are apart; waits for the device once.

    What is within 1 % of the end of the type counts as infinite: rounding decides there. NaN is equal to NaN.
    """
    if (actual.shape, actual.dtype, actual.device) != (expected.shape, expected.dtype, expected.device):
        mine, theirs = (f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" for t in (actual, expected))
        return Difference(why=f"it is {mine}, eager's is {theirs}")
    count = expected.numel()
    if expected.is_complex():
        return difference(torch.view_as_real(actual), torch.view_as_real(expected))
    if not expected.is_floating_point():
        share = float((actual != expected).sum()) / max(count, 1)
        return Difference(share, elements=count, integers=True, off=share)
    if not count:
        return Difference()
    end = torch.finfo(expected.dtype).max * 0.99
    a, e = (torch.where(t.abs() >= end, t.sign() * math.inf, t) for t in (actual.double(), expected.double()))
    plain = a.isfinite() & e.isfinite()
    strange = ~plain & (a != e) & ~(a.isnan() & e.isnan())
    a, e = (torch.where(plain, t, 0.0) for t in (a, e))
    d, norm = a - e, torch.linalg.vector_norm
    numbers = [strange.sum().double(), norm(d), norm(e), norm(a), (a * e).sum(), d.abs().max(), e.abs().max()]
    odd, off, whole, mine, dot, peak, largest = torch.stack(numbers).tolist()
    cosine = dot / (mine * whole) if mine * whole else float(mine == whole)
    return Difference(ratio(off, whole), ratio(peak, largest), cosine, int(odd), count, off=off, peak=peak)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


class Rounded(Interpreter):
    """Runs a graph in eager, each float off by up to `unit` of itself, at random. Keeps all values where `kept` is a
    dict, by node. torch's own generators are not touched.
    """

    def __init__(self, module: GraphModule, unit: float, kept: dict[Node, Any] | None = None) -> None:
        super().__init__(module, garbage_collect_values=kept is None)
        self.unit = unit
        self.kept = kept
        self.generators: dict[torch.device, torch.Generator] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        if self.unit:
            value = torch.utils._pytree.tree_map_only(torch.Tensor, self.moved, value)
        if self.kept is not None:
            self.kept[n] = value
        return value

    def moved(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or value.dtype.itemsize == 1 or not value.numel():
            return value
        generator = self.generators.get(value.device)
        if generator is None:
            generator = self.generators[value.device] = torch.Generator(value.device).manual_seed(0x5EED)
        noise = torch.empty(value.shape, device=value.device).uniform_(-self.unit, self.unit, generator=generator)
        wide = value.detach() + value.detach() * noise.to(value.dtype if value.dtype.itemsize > 4 else torch.float32)
        ends = torch.finfo(value.dtype)
        inside = torch.where(value.isfinite(), wide.clamp(ends.min, ends.max), wide)
        return inside.to(value.dtype)
