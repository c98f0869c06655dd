"""The eager nodes between the engines, grouped into parts that are worth a compilation by Inductor.

Comes in: the outer graph of `partition`, with each segment as one call. Goes out: the same graph with each part as one
call too. The grouping is that of segments: by levels, so that no part waits for itself.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from trt_dynamo.aten_converters.layout import dense_order, memory_order
from trt_dynamo.host_scalars import host_scalars
from trt_dynamo.partition import Partitioned
from trt_dynamo.partition.levels import group
from trt_dynamo.partition.segments import Segment, split
from trt_dynamo.partition.support import (
    Verdict,
    keep_tuples_whole,
    main_device,
    makes_tensors,
    node_symbols,
    refuse,
    tensors_of,
)
from trt_dynamo.partition.views import aliasing_outputs
from trt_dynamo.profiles import dim_of

aten = torch.ops.aten

# One kernel is one kernel in eager as well.
SMALLEST = 2

# Inductor's own random numbers are others than eager's.
LEFT_ALONE = {
    torch.Tag.nondeterministic_seeded: "random numbers stay eager's own",
    torch.Tag.data_dependent_output: "it reads data to the host",
}


def eager_parts(module: GraphModule) -> Partitioned:
    """The outer graph with its eager nodes in parts. The verdicts, on all eager nodes, say why some are in none."""
    verdicts = judge_eager(module)
    groups = group(module.graph, verdicts, SMALLEST, kernels)
    inside = {node for nodes in groups for node in nodes}
    refuse(verdicts, {node: "too little to compile" for node in verdicts if node not in inside})
    parts, outer = split(module, groups, {}, "part")
    for part in parts:
        settle_strides(outer, part)
        bind_symbols(outer, part)
    outer.recompile()
    return Partitioned(outer, parts, tuple(verdicts.values()))


def judge_eager(module: GraphModule) -> dict[Node, Verdict]:
    """Whether Inductor may take each node of the outer graph that makes tensors."""
    device = main_device(module)
    aliasing = aliasing_outputs(module)
    scalars = host_scalars(module.graph, ())
    verdicts: dict[Node, Verdict] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or not makes_tensors(node):
            continue
        if node.target is operator.getitem and node.all_input_nodes[0].op == "call_module":
            continue  # a result of an engine
        reason = aliasing.get(node) or why_not_inductor(node, device)
        reason = "a number of the host" if node in scalars else reason
        verdicts[node] = Verdict(node.name, str(node.target), not reason, reason)
    keep_tuples_whole(verdicts)
    return verdicts


def kernels(node: Node) -> int:
    """How many kernels eager runs for the node: none for a view."""
    if node.target is operator.getitem or node.target is aten._unsafe_view.default:
        return 0
    assert isinstance(node.target, OpOverload)
    return int(not any(result.alias_info for result in node.target._schema.returns))


def why_not_inductor(node: Node, device: torch.device) -> str:
    """Why the node stays in eager even where Inductor is wanted; empty if nothing speaks against it."""
    if node.target is operator.getitem:
        return ""  # as the op whose result it takes apart
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
        return "not an op of ATen"
    if node.is_impure() or node.target._schema.is_mutable:
        return "it has side effects"
    for tag, reason in LEFT_ALONE.items():
        if tag in node.target.tags:
            return reason
    if {*node_symbols(node)} - {symbol for source in node.all_input_nodes for symbol in node_symbols(source)}:
        return "the size of its result depends on data"
    read = [value for source in node.all_input_nodes for value in tensors_of(source)]
    if any(v.device != device for v in tensors_of(node)):
        return f"its result is not on {device}"
    if any(v.device != device and (v.ndim or v.device.type != "cpu") for v in read):
        return f"it reads what is not on {device}"
    if any(v.is_complex() or v.is_quantized or v.layout != torch.strided for v in (*read, *tensors_of(node))):
        return "a kind of tensor that Inductor has no code for"
    return ""


def bind_symbols(outer: GraphModule, part: Segment) -> None:
    """Gives the part, as inputs, the symbolic sizes that none of its inputs shows: from whatever before it does."""
    (call,) = outer.graph.find_nodes(op="call_module", target=part.name)
    for symbol in sorted(unbound(part.module), key=str):
        size = size_before(call, symbol)
        if size is None:
            continue
        with part.module.graph.inserting_before():
            inner = part.module.graph.placeholder(size.name)
        inner.meta = dict(size.meta)
        call.args = (size, *call.args)
    part.module.recompile()


def size_before(call: Node, symbol: sympy.Symbol) -> Node | None:
    """A node before the call whose value the symbol is, or the size of whose value; None if there is none."""
    for node in call.graph.nodes:
        value = node.meta.get("val")
        if node is call:
            return None
        if isinstance(value, torch.SymInt) and dim_of(value) == symbol:
            return node  # type: ignore[no-any-return]
        if not isinstance(value, torch.Tensor) or symbol not in map(dim_of, value.shape):
            continue
        axis = [dim_of(size) for size in value.shape].index(symbol)
        with call.graph.inserting_before(call):
            size = call.graph.call_function(aten.sym_size.int, (node, axis))
        size.meta["val"] = value.shape[axis]
        return size
    return None


def settle_strides(outer: GraphModule, part: Segment) -> None:
    """Makes the part's inputs dense where an engine's result may lie otherwise than the graph says: where the graph's
    strides leave gaps, or nothing is known of the sizes. Where the engine answered, that copies nothing.
    """
    (call,) = outer.graph.find_nodes(op="call_module", target=part.name)
    inputs = part.module.graph.find_nodes(op="placeholder")
    for position, (source, inner) in enumerate(zip(call.args, inputs, strict=True)):
        assert isinstance(source, Node)
        value = source.meta["val"]
        made = source.target is operator.getitem and source.all_input_nodes[0].op == "call_module"
        if not made or order_of(value) == memory_order(value) is not None:
            continue
        with outer.graph.inserting_before(call):
            dense = outer.graph.call_function(aten.contiguous.default, (source,))
        with value.fake_mode:
            settled = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        dense.meta = {**source.meta, "val": settled}
        inner.meta = {**inner.meta, "val": settled}
        call.update_arg(position, dense)


def order_of(value: torch.Tensor) -> tuple[int, ...] | None:
    """`memory_order` for every size that the symbols can be, not the sizes seen: each is a large number here."""
    dims = [dim_of(size) for size in (*value.shape, *value.stride())]
    symbols = {
        symbol: None for dim in dims if isinstance(dim, sympy.Expr) for symbol in sorted(dim.free_symbols, key=str)
    }
    numbers = {symbol: sympy.prime(200 + place) for place, symbol in enumerate(symbols)}
    found = [int(dim.xreplace(numbers)) if isinstance(dim, sympy.Expr) else dim for dim in dims]
    return dense_order(found[: value.ndim], found[value.ndim :])


def unbound(module: GraphModule) -> set[sympy.Symbol]:
    """The symbols in a part's values that neither a size nor a stride of its inputs is, nor a number given to it."""
    used: set[sympy.Symbol] = set()
    shown: set[object] = set()
    for node in module.graph.nodes:
        used.update(node_symbols(node))
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        shown.update(dim_of(size) for size in sizes if isinstance(size, torch.SymInt))
    return used - shown
