"""What `explain` says of one graph, node by node and engine by engine.

Comes in: a lowered graph and how it was cut. Goes out: plain records, which name sizes by the graph's symbols.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped, unused-ignore]
import torch
from torch.fx import GraphModule, Node

from trt_dynamo.cache import Entry, open_store
from trt_dynamo.errors import Unsupported
from trt_dynamo.identity import Blueprint, Wanted, identity_of
from trt_dynamo.lowering import Lowered
from trt_dynamo.module_paths import modules_around
from trt_dynamo.partition import Partitioned, Segment, main_device
from trt_dynamo.precision import Precision, SegmentPrecision
from trt_dynamo.precision.recording import recall
from trt_dynamo.profiles import Sizes, dim_of, shape_env_of
from trt_dynamo.runtime.slots import takes_inputs
from trt_dynamo.settings import Settings
from trt_dynamo.sparsity.products import SegmentSparsity, sparsity_of
from trt_dynamo.tf32 import allows_tf32

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlacedNode:
    """A node and where it would run: in the engine `engine`, or in eager for `reason` where that is empty.

    `source` is the user's line as `file:line, code`; `modules` are the user's modules around it, the outermost first,
    each a path and a class; `value` is what it gives, type and shape; `bytes` is its size at the sizes seen (None where
    that depends on data, 0 where it is made of weights alone); `weights` maps those it reads itself to their bytes.
    """

    name: str
    target: str
    graph: int
    engine: str
    reason: str
    source: str
    modules: tuple[tuple[str, str], ...]
    value: str
    bytes: int | None
    weights: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class StoredEngine:
    """An engine that the cache has: bytes on disk, seconds since 1970, and how long it took to convert and build."""

    key: str
    bytes: int
    created: int
    build_seconds: float | None


@dataclasses.dataclass(frozen=True)
class EngineToBe:
    """An engine of the model. `inputs` and `outputs` are types and shapes; `weights` maps each weight that it has, or
    takes, to its bytes; `ranges` are the sizes it is built for, (smallest, best, largest) by symbol, and `cut` says
    which ones had to be narrowed; `precision` is what it computes in, where that is not the model's own; `sparsity`
    says which products have 2:4 weights, with `sparse_weights`; `stored` is the engine in the cache, if it is there
    for the weights of now.
    """

    name: str
    graph: int
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int, int]]
    cut: str
    precision: SegmentPrecision | None
    sparsity: SegmentSparsity | None
    stored: StoredEngine | None

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("precision", "sparsity"):
            plain[name] = None if plain[name] is None else plain[name].as_dict()
        return {**plain, "stored": None if self.stored is None else dataclasses.asdict(self.stored)}

    def named(self, name: str) -> EngineToBe:
        """The same under another name."""
        precision = self.precision and dataclasses.replace(self.precision, segment=name)
        sparsity = self.sparsity and dataclasses.replace(self.sparsity, segment=name)
        return dataclasses.replace(self, name=name, precision=precision, sparsity=sparsity)


def placed_nodes(lowered: Lowered, parts: Partitioned, graph: int) -> list[PlacedNode]:
    """Every node that computes something, in the graph's order."""
    engine_of = {node: segment.name for segment in parts.segments for node in segment.nodes}
    verdicts = {verdict.node: verdict for verdict in parts.verdicts}
    placeholders = [node for node in lowered.module.graph.nodes if node.op == "placeholder"]
    weights = {placeholders[i].name: (name, lowered.weights[i].nbytes) for i, name in lowered.names.items()}
    seen = sizes_seen([node.meta.get("val") for node in placeholders])
    made = made_of_weights(lowered.module.graph.nodes, weights.keys())
    return [
        PlacedNode(
            node.name,
            verdicts[node.name].target,
            graph,
            engine_of.get(node.name, ""),
            verdicts[node.name].reason,
            verdicts[node.name].source,
            tuple(modules_around(node)),
            ", ".join(described(value) for value in values_of(node)),
            0 if node in made else bytes_of(values_of(node), seen),
            dict(weights[each.name] for each in node.all_input_nodes if each.name in weights),
        )
        for node in lowered.module.graph.nodes
        if node.name in verdicts
    ]


def engines_to_be(lowered: Lowered, parts: Partitioned, settings: Settings, graph: int) -> list[EngineToBe]:
    """The engines of a graph, with the weights that the model has now."""
    qualified = {n.name: lowered.names.get(i) for i, n in enumerate(lowered.module.graph.find_nodes(op="placeholder"))}
    device = main_device(lowered.module)
    cached = functools.cache(lambda: {each.key: each for each in open_store(settings).entries() if not each.damage})
    found = []
    for segment in parts.segments:
        weights = dict(zip(segment.weights, lowered.weights_of(segment.weights), strict=True))
        nodes = list(segment.module.graph.nodes)
        values = {node.name: node.meta["val"] for node in nodes if node.op == "placeholder"}
        sizes = sizes_of(segment, settings)
        given = None if takes_inputs([values[name] for name in weights], settings) else list(weights.values())
        precision, told, graph_to_be = precision_of(segment, weights, settings)
        found.append(
            EngineToBe(
                segment.name,
                graph,
                segment.nodes,
                tuple(described(value) for name, value in values.items() if name not in weights),
                tuple(described(node.meta.get("val")) for node in nodes[-1].all_input_nodes),
                {str(qualified[name]): value.nbytes for name, value in weights.items()},
                {str(symbol): (span.min, span.opt, span.max) for symbol, span in sizes.first.items()},
                sizes.note,
                told,
                sparsity_of(segment.name, graph_to_be, weights, as_inputs=given is None)
                if settings.sparse_weights
                else None,
                None if precision is None else stored(segment, precision, device, settings, given, sizes, cached),
            )
        )
    return found


def precision_of(
    segment: Segment, weights: Mapping[str, torch.Tensor], settings: Settings
) -> tuple[Precision | None, SegmentPrecision | None, GraphModule]:
    """What a segment's engine would compute in, with these weights (None where precision=auto has no record yet), what
    to say of it (None where that is the model's own), and the graph.
    """
    auto = settings.precision == "auto"
    found = recall(segment.module, weights, settings) if auto else None
    precision = Precision(segment.module, segment.weights, settings, found)
    precision.see(list(weights.values()))
    known = not auto or found is not None
    chosen = precision.graph(list(weights.values()))
    told = SegmentPrecision(segment.name, settings.precision, chosen, recorded=known)
    return precision if known else None, told if settings.precision != "native" else None, chosen.module


def stored(
    segment: Segment,
    precision: Precision,
    device: torch.device,
    settings: Settings,
    weights: Sequence[torch.Tensor] | None,
    sizes: Sizes,
    cached: Callable[[], Mapping[str, Entry]],
) -> StoredEngine | None:
    """The first engine that the backend would look for, if it is among the `cached` ones, by key. `weights` are baked
    in; None: the engine takes them as inputs.
    """
    if settings.cache == "off":
        return None
    blueprint = Blueprint(segment, precision, allows_tf32(segment.module), device, settings)
    try:
        key = identity_of(Wanted(blueprint, weights, sizes.first)).key
    except Unsupported as error:
        log.info("%s: %s", segment.name, error)
        return None
    entry = cached().get(key)
    if entry is None:
        return None
    return StoredEngine(key, entry.size, entry.created, entry.manifest.get("build_seconds"))


def sizes_of(segment: Segment, settings: Settings) -> Sizes:
    """The sizes of the segment's engine."""
    nodes = segment.module.graph.nodes
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    return Sizes(inputs, [node.meta.get("val") for node in nodes], settings.max_tensor_bytes)


def made_of_weights(nodes: Iterable[Node], weights: Collection[str]) -> set[Node]:
    """The nodes that read weights and nothing else, directly or through one another."""
    made: set[Node] = set()
    for node in nodes:
        read = node.all_input_nodes
        if read and all(each in made or each.name in weights for each in read):
            made.add(node)
    return made


def values_of(node: Node) -> list[Any]:
    """A node's results."""
    value = node.meta.get("val")
    return list(value) if isinstance(value, list | tuple) else [value]


def described(value: Any) -> str:
    """`float32 [s0, 64]` for a tensor, `int s0` for a size."""
    if isinstance(value, torch.Tensor):
        dims = ", ".join(str(dim_of(size)) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} [{dims}]"
    if isinstance(value, torch.SymInt | int):
        return f"int {dim_of(value)}"
    return type(value).__name__ if value is not None else "nothing"


def sizes_seen(values: Iterable[Any]) -> Mapping[sympy.Symbol, sympy.Integer]:
    """The sizes with which the graph was traced, by symbol."""
    env = shape_env_of(values)
    return {} if env is None else {symbol: sympy.Integer(size) for symbol, size in env.backed_var_to_val.items()}


def bytes_of(values: Sequence[Any], seen: Mapping[sympy.Symbol, sympy.Integer]) -> int | None:
    """The bytes of all tensors among these, at the sizes seen."""
    total = 0
    for value in values:
        if not isinstance(value, torch.Tensor):
            continue
        dims = [sympy.sympify(dim_of(size)).xreplace(dict(seen)) for size in value.shape]
        if not all(dim.is_number for dim in dims):
            return None
        total += value.element_size() * math.prod(int(dim) for dim in dims)
    return total
