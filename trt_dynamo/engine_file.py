"""A model as a plain plan, for C++, `trtexec` and Triton. In: a model and example arguments. Out: a file that TensorRT
loads without us, its inputs named like the model's arguments and its outputs like its results.

Only for models that become one engine: outside Python nobody runs what TensorRT does not take. All inputs and outputs
lie dense and row-major in memory.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.aten_converters import ConvertedNetwork, convert
from trt_dynamo.aten_converters.conversion import Binding
from trt_dynamo.build import build, profile_of
from trt_dynamo.errors import Unsupported
from trt_dynamo.explained import sizes_of
from trt_dynamo.exported import Lifted, export, lift, lowered, settled
from trt_dynamo.lowering import Lowered, bakeable
from trt_dynamo.lowering.plain_programs import functional
from trt_dynamo.model_file import replaced
from trt_dynamo.partition import Partitioned, Segment, partition
from trt_dynamo.precision import Findings, Precision
from trt_dynamo.precision.recording import recall
from trt_dynamo.profiles import Ranges, dim_range
from trt_dynamo.settings import Settings, warn_once
from trt_dynamo.tf32 import allows_tf32
from trt_dynamo.triton_repository import PlanTensor, write_model

PlanAndTensors = tuple[bytes, list[PlanTensor], list[PlanTensor]]  # with the inputs, and the outputs

MOST_NAMED = 20

RTX_FOR_TRITON = (
    "Triton Inference Server runs TensorRT, and this plan is one of TensorRT for RTX: make it where TensorRT is "
    "installed (TRT_DYNAMO_FLAVOR=tensorrt)"
)


@dataclasses.dataclass(frozen=True)
class EngineFile:
    """A plan that was written: where it is, and what goes in and out. `triton` is the model's folder, if one was made.
    An argument that the model does not use is no input."""

    path: Path
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    triton: Path | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}"]
        lines += [f"  input   {each}" for each in self.inputs]
        lines += [f"  output  {each}" for each in self.outputs]
        return "\n".join(lines + ([f"Triton's model: {self.triton}"] if self.triton else []))


def export_engine(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    triton: str | os.PathLike[str] | None = None,
    **options: Any,
) -> EngineFile:
    """Writes the model as one TensorRT plan with the weights in it.

    Args:
        model, args, kwargs, dynamic_shapes: as for `trt_dynamo.compile`; the ranges are those of the plan's profile.
        path: the plan. It appears when all is in it.
        triton: a model repository of Triton Inference Server, in which a model with the plan's name is written too.
        options: settings (docs/settings.md).

    Raises:
        Unsupported: the model does not become one engine; the text names the nodes and the reasons.
        BuildError: TensorRT refused the network.
        TensorRTMissing: no TensorRT is installed.
        SettingsError: an option is unknown or does not parse.
    """
    file = Path(path)
    settings = Settings.from_env().merge(options)
    # The plan is for other runtimes, which give the engine no memory as CUDA graphs want it.
    settings = dataclasses.replace(settings, min_segment_nodes=0, cuda_graphs="off")
    tensorrt_module.load()
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, (tuple(args), dict(kwargs or {})))
    program = model if isinstance(model, ExportedProgram) else export(model, args, kwargs, dynamic_shapes)
    plan, inputs, outputs = plan_of(program, settings, file.name)
    with replaced(file) as out:
        out.write(plan)
    folder = None
    if triton is not None:
        if tensorrt_module.is_rtx():
            warn_once(RTX_FOR_TRITON)
        folder = write_model(Path(triton), file.stem, plan, inputs, outputs)
    return EngineFile(file, tuple(inputs), tuple(outputs), folder)


def plan_of(program: ExportedProgram, settings: Settings, label: str) -> PlanAndTensors:
    """The plan of a whole program, and what goes in and out.

    Raises:
        Unsupported, BuildError: as for `export_engine`.
    """
    lifted, names = with_plain_results(lift(settled(program)))
    made: list[PlanAndTensors] = []

    def make(graph: Lowered) -> Callable[..., Any]:
        refuse_writes(lifted)
        with unset_fake_temporarily():
            made.append(make_plan(graph, lifted, names, settings, label))
        return graph.module.forward

    with torch.no_grad():
        plain = functional(lifted.module, settings)
        if plain is None:
            lowered(lifted, settings, make)
        else:
            made.append(make_plan(with_weights(plain, lifted), lifted, names, settings, label))
    if not made:
        raise Unsupported("the model trains: its graph wants a backward pass")
    return made[0]


def with_plain_results(lifted: Lifted) -> tuple[Lifted, list[str]]:
    """The graph with a dense copy of each result, so that none is a view or an input, and the results' names. A None
    among the results is left out.

    Raises:
        Unsupported: a result is no tensor.
    """
    graph = lifted.module.graph
    (output,) = graph.find_nodes(op="output")
    results, names = [], []
    taken = {*lifted.names}
    with graph.inserting_before(output):
        for name, result in zip(result_names(lifted), output.args[0], strict=True):
            if result is None:
                continue
            value = result.meta.get("val") if isinstance(result, Node) else result
            if not isinstance(value, torch.Tensor):
                raise Unsupported(f"the model's result {name} is {value!r}, and a plan gives tensors only")
            dense = {"memory_format": torch.contiguous_format}
            results.append(graph.call_function(torch.ops.aten.clone.default, (result,), {**dense}))
            names.append(f"output_{name}" if name in taken or not name.isidentifier() else name)
            taken.add(names[-1])
    output.args = (tuple(results),)
    lifted.module.recompile()
    return lifted, names


def result_names(lifted: Lifted) -> list[str]:
    """A name for each result from its place: `logits` of a dict or a dataclass, `0` of a tuple, `output` where it is
    the only one.
    """
    spec = lifted.out_spec
    whole = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [""] * spec.num_leaves
    for keys, index in leaves_with_path(whole):
        parts = [str(next(v for a in ("key", "idx", "name") if (v := getattr(k, a, None)) is not None)) for k in keys]
        names[index] = re.sub(r"\W", "_", "_".join(parts)) or "output"
    return names


def leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree, each with its path. Classes that torch was told how to flatten without the names of their
    parts, such as the outputs of diffusers' models, are taken for the dicts that they are, or for lists.
    """
    try:
        return pytree.tree_flatten_with_path(tree)[0]
    except ValueError:
        plain = dict(tree) if isinstance(tree, Mapping) else None
        leaves = pytree.tree_leaves(tree)
        named = plain is not None and pytree.tree_leaves(plain) == leaves
        return pytree.tree_flatten_with_path(plain if named else leaves)[0]


def with_weights(module: GraphModule, lifted: Lifted) -> Lowered:
    """The lowered graph with what the model holds, which nothing in it writes to."""
    pairs = enumerate(zip(lifted.state(), lifted.values, strict=False))
    weights = {position: real for position, (real, fake) in pairs if bakeable(real, fake)}
    return Lowered(module, weights, {position: lifted.paths[position] for position in weights})


def refuse_writes(lifted: Lifted) -> None:
    """
    Raises:
        Unsupported: the model writes to a buffer or an argument, which a plan cannot.
    """
    metadata = TracingContext.get().fw_metadata
    names = [*lifted.paths, *lifted.names]
    written = [n for n, info in zip(names, metadata.input_info, strict=True) if info.mutates_data] if metadata else []
    if written:
        raise Unsupported(f"the model writes to {', '.join(written)}, which a plan cannot")


def make_plan(graph: Lowered, lifted: Lifted, names: Sequence[str], settings: Settings, label: str) -> PlanAndTensors:
    """The plan, and what goes in and out, in the model's order."""
    parts = partition(graph.module, graph.names, settings)
    segment = only_segment(parts)
    weights = graph.weights_of(segment.weights)
    given = dict(zip(segment.weights, weights, strict=True))
    precision = Precision(segment.module, segment.weights, settings, findings(segment, given, settings))
    ranges = sizes_of(segment, settings).first
    copies = {name: tensor.detach() for name, tensor in given.items()}
    graph_to_be = precision.graph(weights).module
    network = convert(graph_to_be, copies, ranges, wide_products=settings.wide_products)
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    arguments = {n.name: name for n, name in zip(placeholders, [*lifted.paths, *lifted.names], strict=True)}
    network = renamed(network, segment, arguments, lifted, places_of_results(parts.module, names))
    plan = build(network, profile_of(network, ranges), settings, label=label, tf32=allows_tf32(segment.module))
    order = {name: index for index, name in enumerate([*lifted.names, *names])}
    described = [
        sorted((described_by(each, ranges) for each in bindings), key=lambda each: order[each.name])
        for bindings in (network.inputs, network.outputs)
    ]
    return plan, described[0], described[1]


def findings(segment: Segment, weights: Mapping[str, torch.Tensor], settings: Settings) -> Findings:
    """What is known of the values, which only precision=auto asks for."""
    if settings.precision != "auto":
        return Findings()
    known = recall(segment.module, weights, settings)
    if known is None:
        raise Unsupported("precision=auto knows nothing of this model's values: use fp16 or bf16")
    return known


def only_segment(parts: Partitioned) -> Segment:
    """
    Raises:
        Unsupported: there is not exactly one segment with all that computes.
    """
    refused = [str(verdict) for verdict in parts.verdicts if not verdict.ok]
    if refused:
        rest = len(refused) - MOST_NAMED
        listed = "\n  ".join(refused[:MOST_NAMED] + ([f"and {rest} more"] if rest > 0 else []))
        raise Unsupported(f"TensorRT does not take the whole model, {len(refused)} of its nodes not:\n  {listed}")
    if len(parts.segments) != 1:
        raise Unsupported(f"the model becomes {len(parts.segments)} engines, not one")
    return parts.segments[0]


def places_of_results(outer: GraphModule, names: Sequence[str]) -> dict[int, str]:
    """The name of each result by its place among the engine's."""
    (output,) = outer.graph.find_nodes(op="output")
    return {int(node.args[1]): name for name, node in zip(names, output.args[0], strict=True)}


def renamed(
    network: ConvertedNetwork,
    segment: Segment,
    arguments: Mapping[str, str],
    lifted: Lifted,
    results: Mapping[int, str],
) -> ConvertedNetwork:
    """The network with the model's names for its inputs and outputs.

    Raises:
        Unsupported: something that the model holds would be an input.
    """
    inputs = {each.name: arguments.get(segment.arguments[each.position], "") for each in network.inputs}
    computed = [name for name, argument in inputs.items() if not argument]
    if computed:
        raise Unsupported(f"the engine needs what is computed before it: {', '.join(computed)}")
    held = [name for name in inputs.values() if name in lifted.paths]
    if held:
        raise Unsupported(f"these tensors of the model cannot be copied into a plan: {', '.join(held)}")
    outputs = {each.name: results[each.position] for each in network.outputs}
    raw = network.network.raw
    for tensor in [raw.get_input(i) for i in range(raw.num_inputs)]:
        tensor.name = inputs[tensor.name]
    for tensor in [raw.get_output(i) for i in range(raw.num_outputs)]:
        tensor.name = outputs[tensor.name]

    def named(bindings: Sequence[Binding], names: Mapping[str, str]) -> tuple[Binding, ...]:
        return tuple(dataclasses.replace(each, name=names[each.name]) for each in bindings)

    return dataclasses.replace(network, inputs=named(network.inputs, inputs), outputs=named(network.outputs, outputs))


def described_by(binding: Binding, ranges: Ranges) -> PlanTensor:
    """A binding in plain words; a dim that varies keeps its expression as a name."""
    spans = [dim_range(dim, ranges) for dim in binding.shape]
    dims = tuple((str(dim), span.min, span.max) for dim, span in zip(binding.shape, spans, strict=True))
    return PlanTensor(binding.name, binding.dtype, dims, shape_tensor=binding.size)
