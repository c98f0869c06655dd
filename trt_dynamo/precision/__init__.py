"""The setting `precision`: what a segment's engine computes in a half type.

Comes in: a `Segment` in the model's own types, and its weights. Goes out: the graph that its engine is made of. The
segment's own graph, which eager runs, stays what it is, and so do the types of its arguments and results. The tables
are in `tables`, the rules in `choice`, the casts in `casts`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from trt_dynamo.aten_converters.walker import source_line
from trt_dynamo.partition.support import judge
from trt_dynamo.precision.casts import with_casts
from trt_dynamo.precision.choice import Choice, choose, float32_operands, has_float32
from trt_dynamo.precision.magnitudes import Findings, weight_misfit
from trt_dynamo.precision.tables import Role, role_of
from trt_dynamo.settings import Settings

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "auto": torch.float16}

# Rounds of asking the converters, each of which can only take nodes back to float32.
ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Kept:
    """A node that computes in float32, and why, where that is not what its op always does."""

    node: str
    target: str
    reason: str
    source: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """The graph for the engine; how many nodes compute in the half type, and how many in float32; which ones were kept
    there, and why.
    """

    module: GraphModule
    low: int = 0
    wide: int = 0
    kept: tuple[Kept, ...] = ()


class Precision:
    """The precision of one segment.

    Args:
        module: the segment's graph, which is left as it is.
        weights: its placeholders that are parameters and buffers.
        settings: `precision`, `precision_keep`, `strict`.
        findings: what was recorded of its values, for `precision=auto`.
    """

    def __init__(
        self, module: GraphModule, weights: Sequence[str], settings: Settings, findings: Findings | None = None
    ) -> None:
        self.module = module
        self.weights = tuple(weights)
        self.settings = settings
        self.findings = findings or Findings()
        self.chosen = functools.lru_cache(maxsize=8)(self.choose)
        self.usual: tuple[tuple[str, str], ...] = ()  # the misfits of the weights that it saw first

    def graph(self, values: Sequence[torch.Tensor] | None) -> Chosen:
        """What to make the engine of for weights of these values; None: the engine takes them as inputs, and they are
        taken to be like those that were seen first.
        """
        if self.settings.precision == "native":
            return Chosen(self.module)
        if values is None:
            return self.chosen(self.usual)
        low = TYPES[self.settings.precision]
        found = ((n, weight_misfit(value, low)) for n, value in zip(self.weights, values, strict=True))
        return self.chosen(tuple((name, reason) for name, reason in found if reason))

    def see(self, values: Sequence[torch.Tensor]) -> None:
        """Notes which of the weights that the model has now do not fit into the half type."""
        if self.settings.precision != "native":
            low = TYPES[self.settings.precision]
            found = ((n, weight_misfit(value, low)) for n, value in zip(self.weights, values, strict=True))
            self.usual = tuple((name, reason) for name, reason in found if reason)

    def choose(self, misfits: tuple[tuple[str, str], ...]) -> Chosen:
        """The graph for weights of which these do not fit."""
        low, refused = TYPES[self.settings.precision], dict[Node, str]()
        for _ in range(ROUNDS):
            choice = choose(
                self.module,
                low,
                weights=self.weights,
                keep=self.settings.precision_keep,
                misfits={**self.findings.misfits, **dict(misfits)},
                refused=refused,
            )
            if not choice.nodes:
                break
            written, origins = with_casts(self.module, choice)
            new = self.refusals(written, origins)
            if not new:
                return described(written, choice, self.module)
            refused |= new
        return described(self.module, dataclasses.replace(choice, nodes=frozenset()), self.module)

    def refusals(self, module: GraphModule, origins: Mapping[Node, Node]) -> dict[Node, str]:
        """What the converters refuse of the graph; they take all of it in float32."""
        weights = [node for node in module.graph.nodes if node.op == "placeholder" and node.name in self.weights]
        verdicts = judge(module, weights, strict=self.settings.strict)
        return {
            origins[node]: verdict.reason for node, verdict in verdicts.items() if not verdict.ok and node in origins
        }


def described(written: GraphModule, choice: Choice, module: GraphModule) -> Chosen:
    """The graph with what there is to say of it."""
    computing = [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
        and (has_float32(node) or float32_operands(node))
        and role_of(node) not in (Role.MOVEMENT, Role.CAST, Role.CREATION)
        and hasattr(node.target, "_schema")
    ]
    kept = [
        Kept(node.name, name_of(node), reason, source_line(node))
        for node, reason in choice.reasons.items()
        if node not in choice.nodes
    ]
    low = sum(node in choice.nodes for node in computing)
    return Chosen(written, low, len(computing) - low, tuple(kept))


def name_of(node: Node) -> str:
    """The op, or a weight's qualified name."""
    return str(node.meta.get("weight_name", node.target))


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentPrecision:
    """What a segment's engine computes in, for people. `recorded` is False where `precision=auto` has no values yet."""

    segment: str
    precision: str
    chosen: Chosen
    recorded: bool = True

    def __str__(self) -> str:
        """The counts, then what was kept in float32, by reason."""
        if not self.recorded:
            return f"{self.segment}: precision=auto has recorded no values yet; the first calls do, in eager"
        name = "fp16" if self.precision == "auto" else self.precision
        lines = [f"{self.segment}: {self.chosen.low} nodes compute in {name}, {self.chosen.wide} in float32"]
        groups: dict[tuple[str, str], list[Kept]] = {}
        for kept in self.chosen.kept:
            groups.setdefault((kept.target, kept.reason), []).append(kept)
        for (target, reason), nodes in sorted(groups.items(), key=lambda item: -len(item[1])):
            where = f"  [{nodes[0].source}]" if nodes[0].source else ""
            lines.append(f"  float32: {len(nodes)} x {target}: {reason}{where}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "segment": self.segment,
            "precision": self.precision,
            "recorded": self.recorded,
            "low": self.chosen.low,
            "float32": self.chosen.wide,
            "kept": [dataclasses.asdict(kept) for kept in self.chosen.kept],
        }


__all__ = ["TYPES", "Chosen", "Findings", "Kept", "Precision", "SegmentPrecision"]
