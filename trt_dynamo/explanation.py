"""Says, without building anything, what would run where: which nodes in how many engines, and why the others do not."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from trt_dynamo import graph_breaks
from trt_dynamo import trt as tensorrt_module
from trt_dynamo.explained import EngineToBe, PlacedNode, engines_to_be, placed_nodes
from trt_dynamo.known_ranges import use_known_ranges
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.lowering.lengths import keeps_lengths
from trt_dynamo.partition import Partitioned, Segment, Verdict, partition
from trt_dynamo.partition.eager_parts import eager_parts
from trt_dynamo.precision import SegmentPrecision
from trt_dynamo.reports import Build, builds_so_far
from trt_dynamo.settings import Settings
from trt_dynamo.sparsity.products import SegmentSparsity

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found. `segments` are the engines to be (each with its `nodes`); `converted` counts the nodes in
    them; `eager` are the verdicts (`node`, `target`, `reason`, `source`) on the others; `graphs` counts Dynamo's
    graphs, `breaks` says what Dynamo left to eager before any graph was made; `sizes` says for which sizes each
    engine would be built, where they vary; `cuts` names those whose range was cut because a tensor would be too
    large; `builds` are the engines that this process has made so far, for whatever model, each with the reason for
    it; `inductor` has the nodes of each part that Inductor would compile, the whole of a graph where TensorRT takes
    no node of it; `precision` says what each engine computes in, where the setting asks for another type than the
    model's; `sparsity`, with `sparse_weights`, which of its products have 2:4 weights; `nodes` and `engines` are
    all of them in full."""

    segments: tuple[Segment, ...]
    converted: int
    eager: tuple[Verdict, ...]
    graphs: int
    broken: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    builds: tuple[Build, ...] = ()
    inductor: tuple[tuple[str, ...], ...] = ()
    precision: tuple[SegmentPrecision, ...] = ()
    sparsity: tuple[SegmentSparsity, ...] = ()
    nodes: tuple[PlacedNode, ...] = ()
    engines: tuple[EngineToBe, ...] = ()

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        """Tables, for `rich.print`."""
        from trt_dynamo.explanation_tables import tables

        yield from tables(self)

    def html(self, path: str | Path, title: str = "") -> Path:
        """Writes one page that needs nothing else: the model's modules beside its engines, each node with the reason
        for its place. Returns the path.

        Raises:
            OSError: the file cannot be written.
        """
        from trt_dynamo.explanation_page import page

        path = Path(path)
        path.write_text(page(self.as_dict(), title), encoding="utf-8")
        return path

    def __str__(self) -> str:
        total, engines, graphs = self.converted + len(self.eager), len(self.segments), self.graphs
        lines = [
            f"{self.converted} of {total} nodes in {engines} TensorRT engine{'s' * (engines != 1)}, "
            f"from {graphs} graph{'s' * (graphs != 1)}"
        ]
        lines += [
            f"  {segment.name}: {len(segment.nodes)} nodes, {len(segment.weights)} weights" for segment in self.segments
        ]
        lines += [f"  {told}" for told in self.sizes]
        reasons: dict[tuple[str, str], list[Verdict]] = collections.defaultdict(list)
        for verdict in self.eager:
            reasons[verdict.target, verdict.reason].append(verdict)
        lines += [f"  Inductor: {len(nodes)} of the nodes in eager, {', '.join(nodes)}" for nodes in self.inductor]
        if reasons:
            lines.append("eager:")
        for (target, reason), verdicts in sorted(reasons.items(), key=lambda item: -len(item[1])):
            where = f"  [{verdicts[0].source}]" if verdicts[0].source else ""
            lines.append(f"  {len(verdicts)} x {target}: {reason}{where}")
        lines += [str(told) for told in (*self.precision, *self.sparsity)]
        lines += list(self.cuts)
        lines += [f"graph not lowered: {reason}" for reason in self.broken]
        lines += [f"not traced by Dynamo: {reason}" for reason in self.breaks]
        if self.builds:
            lines.append("engines of this process so far:")
        lines += [f"  {build}" for build in self.builds]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "graphs": self.graphs,
            "converted": self.converted,
            "segments": [{"name": s.name, "nodes": list(s.nodes), "weights": list(s.weights)} for s in self.segments],
            "eager": [dataclasses.asdict(verdict) for verdict in self.eager],
            "broken": list(self.broken),
            "breaks": list(self.breaks),
            "sizes": list(self.sizes),
            "cuts": list(self.cuts),
            "inductor": [list(nodes) for nodes in self.inductor],
            "precision": [told.as_dict() for told in self.precision],
            "sparsity": [told.as_dict() for told in self.sparsity],
            "builds": [dataclasses.asdict(build) for build in self.builds],
            "nodes": [dataclasses.asdict(node) for node in self.nodes],
            "engines": [engine.as_dict() for engine in self.engines],
        }


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Traces `model(*args, **kwargs)` as the backend would for inference, and judges every node by its converter's
    dry run.

    The model runs once in eager, without gradients; nothing is built or cached. `options` are those of `torch.compile`,
    `dynamic` is handed to it.

    Raises:
        TensorRTMissing: no TensorRT is installed, whose layers are the judge.
        SettingsError: an option is unknown or does not parse.
    """
    settings = Settings.from_env().merge(options)
    tensorrt_module.load()
    looks: list[Look] = []
    broken: list[str] = []

    def take(lowered: Lowered) -> Callable[..., Any]:
        original = lowered.module.forward
        looks.append(look(lowered, len(looks), settings))
        return original

    @keeps_lengths
    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            use_known_ranges(module, inputs, settings)
            return lower(module, inputs, take, settings)
        except graph_breaks.ANOTHER_GO:
            raise
        except Exception as error:  # noqa: BLE001  the report must say it; the model still runs
            broken.append(f"{type(error).__name__}: {error}")
            return module.forward

    with torch.no_grad(), graph_breaks.noted() as breaks:
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    foreseen = graph_breaks.foreseen(model, (*args, *kwargs.values()))
    return explanation_of(looks, broken, list(dict.fromkeys([*breaks, *foreseen])))


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What was seen of one graph."""

    parts: Partitioned
    inductor: list[tuple[str, ...]]
    nodes: list[PlacedNode]
    engines: list[EngineToBe]


def look(lowered: Lowered, number: int, settings: Settings) -> Look:
    """Cuts a graph, Dynamo's `number`-th, as the backend would."""
    with unset_fake_temporarily(), torch.no_grad():
        parts = partition(lowered.module, lowered.names, settings)
        return Look(
            parts,
            inductor_nodes(parts, settings),
            placed_nodes(lowered, parts, number),
            engines_to_be(lowered, parts, settings, number),
        )


def explanation_of(looks: Sequence[Look], broken: Sequence[str], breaks: Sequence[str]) -> Explanation:
    """What to say of all graphs together. Where there are several, an engine's name says which its graph is."""
    engines = [engine for each in looks for engine in each.engines]
    nodes = [node for each in looks for node in each.nodes]
    if len(looks) > 1:
        engines = [each.named(f"graph_{each.graph}.{each.name}") for each in engines]
        nodes = [dataclasses.replace(n, engine=n.engine and f"graph_{n.graph}.{n.engine}") for n in nodes]
    segments = [segment for each in looks for segment in each.parts.segments]
    verdicts = [verdict for each in looks for verdict in each.parts.verdicts]
    refused = tuple(verdict for verdict in verdicts if not verdict.ok)
    return Explanation(
        tuple(dataclasses.replace(s, name=engine.name) for s, engine in zip(segments, engines, strict=True)),
        len(verdicts) - len(refused),
        refused,
        len(looks) + len(broken),
        tuple(broken),
        breaks=tuple(breaks),
        sizes=tuple(f"{each.name} for sizes {ranges_told(each)}" for each in engines if each.ranges),
        cuts=tuple(f"{each.name}: {each.cut}" for each in engines if each.cut),
        builds=builds_so_far(),
        inductor=tuple(part for each in looks for part in each.inductor),
        precision=tuple(each.precision for each in engines if each.precision is not None),
        sparsity=tuple(each.sparsity for each in engines if each.sparsity is not None),
        nodes=tuple(nodes),
        engines=tuple(engines),
    )


def inductor_nodes(parts: Partitioned, settings: Settings) -> list[tuple[str, ...]]:
    """The nodes of each part that Inductor would be given, by their names in the graph that is cut."""
    if settings.fallback == "eager":
        return []
    eager = eager_parts(parts.module).segments
    if eager and not parts.segments:
        return [tuple(verdict.node for verdict in parts.verdicts)]
    return [part.nodes for part in eager]


def ranges_told(engine: EngineToBe) -> str:
    """The first ranges in words."""
    return ", ".join(f"{name} {low} to {high} (best: {best})" for name, (low, best, high) in engine.ranges.items())
