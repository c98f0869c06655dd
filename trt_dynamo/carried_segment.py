"""A segment as an exported program carries it. In: a segment and its weights. Out: a manifest (JSON) and the engine's
bytes; and from them, in another process, what answers the segment's calls.

The manifest holds the segment's own graph, written by `torch.export.save`. So what answers has all that a segment has:
it falls back to eager, follows changes of weights and sizes, and builds an engine where the one that came does not fit.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.value_ranges import ValueRanges

from trt_dynamo.aten_converters.layout import engine_order
from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER, STAYS_FLOAT32
from trt_dynamo.cache.entry import Plan, recorded
from trt_dynamo.cache.packing import pack, unpack
from trt_dynamo.cache.signing import signing_of
from trt_dynamo.errors import EngineError, Unsupported
from trt_dynamo.exported_inputs import is_in_order
from trt_dynamo.model_file import plain, platform_of, program_in, usable
from trt_dynamo.partition import Segment
from trt_dynamo.profiles import shape_env_of, symbols_of
from trt_dynamo.settings import Settings

KIND = "trt_dynamo segment"
FORMAT = 1

# What of a node's meta later stages read, and torch writes down; and what it does not.
WRITTEN = ("val", "stack_trace", "nn_module_stack")
MARKS = (STAYS_EAGER, STAYS_FLOAT32)

Order = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CarriedSegment:
    """What a manifest says. `numbers`: which arguments are no tensors; `results`: the memory order of each result, and
    whether eager would make it a view of an argument or of another result."""

    segment: Segment
    options: Mapping[str, Any]
    platform: Mapping[str, str]
    numbers: frozenset[int]
    results: tuple[tuple[Order, bool], ...]

    def arguments(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[Any]:
        """The segment's arguments in their order."""
        left, right = iter(tensors), iter(numbers)
        total = len(tensors) + len(numbers)
        return [next(right) if position in self.numbers else next(left) for position in range(total)]

    def like_results(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[torch.Tensor]:
        """Empty tensors like the results, of whatever sizes the arguments have."""
        made = self.segment.module.forward(*self.arguments(tensors, numbers))
        return [empty_in_order(value, order) for value, (order, _) in zip(made, self.results, strict=True)]

    def own(self, made: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The results in their memory order, none of them a view."""
        return [
            value if is_in_order(value, order) and not view else copied_in_order(value, order)
            for value, (order, view) in zip(made, self.results, strict=True)
        ]


# -- writing ----------------------------------------------------------------------------------------------------------


def written(segment: Segment, options: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> str:
    """The manifest of a segment; `tensors` are those of its weights.

    Raises:
        Unsupported: torch cannot write its graph, or an argument is neither a tensor nor an int.
    """
    placeholders = segment.module.graph.find_nodes(op="placeholder")
    seen = {storage_of(node) for node in placeholders}
    results = []
    for node in results_of(segment.module.graph):
        value = node.meta["val"]
        results.append([list(engine_order(value)), storage_of(node) in seen])
        seen.add(storage_of(node))
    nodes = segment.module.graph.nodes
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "name": segment.name,
        "options": plain(options),
        "platform": platform_of(list(tensors)),
        "sizes": sizes_of(segment.module),
        "inputs": [[node.meta["weight_name"], node.name in segment.weights] for node in placeholders],
        "results": results,
        "nodes": list(segment.nodes),
        "marks": {node.name: marks for node in nodes if (marks := {k: node.meta[k] for k in MARKS if k in node.meta})},
        "graph": base64.b64encode(zlib.compress(graph_bytes(segment))).decode(),
    }
    return json.dumps(manifest)


def results_of(graph: Graph) -> list[Any]:
    """What the graph gives out: nodes, as a rule."""
    results: Any = graph.output_node().args[0]
    return list(results)


def storage_of(node: Node) -> int | None:
    value = node.meta["val"]
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def sizes_of(module: GraphModule) -> dict[str, list[int | None]]:
    """The symbols in a graph: from, to (None: any), and the number that was seen.

    Raises:
        Unsupported: one that only the data tells.
    """
    leaves, env = symbolic_values(module)
    found: dict[str, list[int | None]] = {}
    for symbol in sorted(symbols_of(leaves), key=str):
        span, seen = env.var_to_range.get(symbol), env.backed_var_to_val.get(symbol)
        if span is None or seen is None:
            raise Unsupported(f"the size {symbol} depends on data, which an exported program's engine cannot have")
        bounds = [int(each) if each.is_Integer else None for each in map(sympy.sympify, (span.lower, span.upper))]
        found[str(symbol)] = [*bounds, int(seen)]
    return found


def symbolic_values(module: GraphModule) -> tuple[list[Any], Any]:
    """The values in a graph that may have symbols, and the ShapeEnv of these, if there is one."""
    values = pytree.tree_leaves([node.meta.get("val") for node in module.graph.nodes])
    leaves = [value for value in values if isinstance(value, torch.Tensor | torch.SymInt)]
    return leaves, shape_env_of(leaves)


def graph_bytes(segment: Segment) -> bytes:
    file = io.BytesIO()
    try:
        torch.export.save(program_of(segment), file)
    except Exception as error:
        raise Unsupported(f"torch cannot write the graph of {segment.name}: {type(error).__name__}: {error}") from error
    return file.getvalue()


def program_of(segment: Segment) -> ExportedProgram:
    """The segment's graph as a program that holds nothing."""
    graph, copies = Graph(), dict[Node, Node]()
    inputs, outputs = [], []
    for node in segment.module.graph.nodes:
        copies[node] = copy = graph.node_copy(node, lambda each: copies[each])
        copy.meta = {key: node.meta[key] for key in WRITTEN if key in node.meta}
        if node.op == "placeholder":
            inputs.append(InputSpec(InputKind.USER_INPUT, argument_of(copy), None))
        elif node.op == "output":
            outputs = [
                OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(each.name), None) for each in results_of(graph)
            ]
        elif node.op != "call_function":
            raise Unsupported(f"the graph has a {node.op} of {node.target}")
    in_spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
    out_spec = pytree.tree_structure(tuple(range(len(outputs))))
    leaves, env = symbolic_values(segment.module)
    ranges = {symbol: env.var_to_range[symbol] for symbol in symbols_of(leaves)}
    call = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))
    return ExportedProgram(
        torch.nn.Module(), graph, ExportGraphSignature(inputs, outputs), {}, ranges, [call], constants={}
    )


def argument_of(node: Node) -> TensorArgument | SymIntArgument:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    if isinstance(value, torch.SymInt):
        return SymIntArgument(node.name)
    raise Unsupported(f"the argument {node.name} is a {type(value).__name__}")


def packed_plans(plans: Mapping[str, Plan], settings: Settings) -> torch.Tensor:
    """Plans as one stream, signed where a key is set."""
    file, signing = io.BytesIO(), usable(signing_of(settings))
    pack(file, [recorded(key, plan, signing) for key, plan in plans.items()])
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


# -- reading ----------------------------------------------------------------------------------------------------------


def plans_in(engine: torch.Tensor, settings: Settings) -> dict[str, Plan]:
    """The plans in the stream by key.

    Raises:
        Damaged: a checksum differs, or a plan is not signed with our key.
        FileError: the key for signatures cannot be had.
    """
    signing = usable(signing_of(settings))
    stream = io.BytesIO(engine.detach().cpu().contiguous().numpy().tobytes())
    records = [each.checked(signing) for each in unpack(stream)]
    return {record.key: record.plan for record in records}


@functools.lru_cache(maxsize=256)
def segment_in(text: str) -> CarriedSegment:
    """What a manifest says.

    Raises:
        EngineError: it is of another format, or this torch cannot read the graph in it.
    """
    manifest = json.loads(text)
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        found = f"{manifest.get('kind')} {manifest.get('format')}"
        raise EngineError(f"the program has an engine of format {found!r}, this trt_dynamo reads {KIND} {FORMAT}")
    with _disable_current_modes():  # it may be asked for while a model is traced
        module = graph_in(manifest)
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, (weight, _) in zip(placeholders, manifest["inputs"], strict=True):
        node.meta["weight_name"] = weight
    for node in module.graph.nodes:
        node.meta.update(manifest["marks"].get(node.name, {}))
    set_sizes(module, manifest["sizes"])
    weights = tuple(n.name for n, (_, baked) in zip(placeholders, manifest["inputs"], strict=True) if baked)
    numbers = frozenset(i for i, n in enumerate(placeholders) if not isinstance(n.meta["val"], torch.Tensor))
    return CarriedSegment(
        Segment(manifest["name"], module, tuple(manifest["nodes"]), weights),
        manifest["options"],
        manifest["platform"],
        numbers,
        tuple((tuple(order), view) for order, view in manifest["results"]),
    )


def graph_in(manifest: Mapping[str, Any]) -> GraphModule:
    where, wrote = f"of {manifest['name']}", manifest["platform"]["torch"]
    try:
        archive = io.BytesIO(zlib.decompress(base64.b64decode(manifest["graph"])))
    except (ValueError, zlib.error) as error:
        raise EngineError(f"the graph {where} is damaged: {error}") from error
    program = program_in(archive, where, wrote, EngineError)
    # As segments have it: torch adds what nobody reads of an op's results, and describes the results of the graph.
    program.graph.eliminate_dead_code()
    program.graph.output_node().meta.clear()
    return GraphModule({}, program.graph)


def set_sizes(module: GraphModule, sizes: Mapping[str, Sequence[int | None]]) -> None:
    """Says of the symbols in the graph what was known of them: torch writes it down of those only that are the whole
    size of an argument.
    """
    leaves, env = symbolic_values(module)
    if env is None:
        return
    for key in [key for key in env.backed_var_to_val if not isinstance(key, sympy.Symbol)]:
        del env.backed_var_to_val[key]
    for symbol in symbols_of(leaves):
        low, high, seen = sizes[str(symbol)]
        env.backed_var_to_val[symbol] = sympy.Integer(seen)
        env.var_to_range[symbol] = ValueRanges(
            -sympy.oo if low is None else low, ValueRanges.unknown_int().upper if high is None else high
        )


# -- memory -----------------------------------------------------------------------------------------------------------


def empty_in_order(value: torch.Tensor, order: Order) -> torch.Tensor:
    """A dense tensor of the same sizes, its dims in this order."""
    shape = [value.shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]
    return torch.empty(shape, dtype=value.dtype, device=value.device).permute(back)


def copied_in_order(value: torch.Tensor, order: Order) -> torch.Tensor:
    back = [order.index(axis) for axis in range(len(order))]
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
