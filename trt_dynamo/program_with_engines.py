"""A compiled model as torch's own `ExportedProgram`. In: what `trt_dynamo.compile` made. Out: a program in which each
segment is a call of the op `trt_dynamo::run_engine`, and all else ATen, for `torch.export.save`.

Here torch's decompositions of programs stand in AOTAutograd's place, since they keep the program's signature: which
inputs it holds, what it writes to. Passes, partition and engines are those of `backend`.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.backend import why_eager
from trt_dynamo.cache.carried import Carried
from trt_dynamo.cache.entry import Plan
from trt_dynamo.carried_runner import with_engine
from trt_dynamo.carried_segment import empty_in_order, packed_plans, results_of, segment_in, written
from trt_dynamo.engine_op import RUN_ENGINE
from trt_dynamo.exported import ExportedModule, as_allowed, as_traced, tensor_at
from trt_dynamo.lowering import BAKEABLE
from trt_dynamo.lowering.decompositions import decompositions
from trt_dynamo.lowering.passes import run_passes
from trt_dynamo.lowering.sessions import compile_session
from trt_dynamo.partition import Segment, partition
from trt_dynamo.profiles import shape_env_of
from trt_dynamo.settings import Settings

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Known(Carried):
    """Takes what it is asked for out of plans that there are already."""

    def __init__(self, known: dict[str, Plan]) -> None:
        super().__init__()
        self.known = known

    def find(self, key: str) -> Plan | None:
        if key in self.known:
            self.plans[key] = self.known[key]
        return self.plans.get(key)


def exported_program(module: ExportedModule) -> ExportedProgram:
    """The compiled module as an `ExportedProgram`, for `torch.export.save` and whatever takes such programs.

    It needs no Python of the model's, and `import trt_dynamo.engine_op` where it is loaded. Its parameters and
    buffers are the module's own.

    Raises:
        TypeError: it is no module of `trt_dynamo.compile`.
        Unsupported: a segment that torch cannot write down, or whose arguments are neither tensors nor ints.
        TensorRTMissing: no TensorRT is installed.
        FileError: the key for signatures cannot be had.
    """
    if not isinstance(module, ExportedModule):
        raise TypeError(f"only a module of trt_dynamo.compile becomes a program, not {type(module).__name__}")
    tensorrt_module.load()
    with torch.no_grad():
        program = Program(decomposed(module.program, module.settings))
        parts = partition(program.module, program.names, module.settings)
        return program.rebuilt(parts.module, parts.segments, module)


def decomposed(program: ExportedProgram, settings: Settings) -> ExportedProgram:
    """The program without writes, in ops that converters know."""
    env = shape_env_of(
        [v for n in program.graph.nodes if isinstance(v := n.meta.get("val"), (torch.Tensor, torch.SymInt))]
    )
    if env is not None:
        as_traced(env)
    with compile_session(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what torch copies here itself
        made: ExportedProgram = program.run_decompositions(table())
        for node in made.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            made.graph.erase_node(node)  # as `lift` leaves them out
        run_passes(made.graph_module, settings)
    if env is not None:
        as_allowed(env, program.range_constraints)
    return made


def table() -> dict[Any, Callable[..., Any]]:
    """That of `lowering`, and what AOTAutograd takes apart without being told: ops that torch itself makes of others,
    which an export else keeps.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    known = torch.export.default_decompositions().items()
    composite = {op: f for op, f in known if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)}
    return {**composite, **decompositions()}


class Program:
    """A program while engines come into it. `names` are those of the inputs that may be copied into engines, by their
    positions; `held` is what the inputs hold that the program holds, by the placeholders' names."""

    def __init__(self, program: ExportedProgram) -> None:
        self.old = program
        self.module = program.graph_module
        self.constants = dict(program.constants)
        self.inputs = list(program.graph_signature.input_specs)
        self.lift_constants()
        written = set(program.graph_signature.buffers_to_mutate.values())
        self.names: dict[int, str] = {}
        self.held: dict[str, torch.Tensor] = {}
        for position, spec in enumerate(self.inputs):
            value = self.value_of(spec)
            if type(value) in BAKEABLE and spec.target not in written and not value.is_inference():
                self.names[position] = str(spec.target)
                self.held[spec.arg.name] = value

    def value_of(self, spec: InputSpec) -> Any:
        if spec.kind not in HELD or spec.target is None:
            return None
        return self.old.state_dict.get(spec.target, self.constants.get(spec.target))

    def lift_constants(self) -> None:
        """Makes inputs of the tensors that our passes put beside the graph."""
        for node in list(self.module.graph.find_nodes(op="get_attr")):
            value = tensor_at(self.module, str(node.target))
            if isinstance(value, torch.Tensor):
                made = self.add_input(self.module.graph, "constant", value, node.meta)
                node.replace_all_uses_with(made)
                self.module.graph.erase_node(node)

    def add_input(self, graph: Graph, name: str, value: torch.Tensor, meta: dict[str, Any]) -> Node:
        """A further tensor that the program holds, before the user's inputs."""
        specs = enumerate(self.inputs)
        position = next((i for i, spec in specs if spec.kind is InputKind.USER_INPUT), len(self.inputs))
        nodes = list(graph.nodes)
        taken = {*self.constants, *self.old.state_dict}
        name = next(each for i in itertools.count() if (each := f"trt_dynamo_{name}_{i}") not in taken)
        with graph.inserting_before(nodes[position]):
            made = graph.placeholder(name)
        made.meta = dict(meta)
        self.inputs.insert(position, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made.name), name))
        self.constants[name] = value
        return made

    def rebuilt(self, outer: GraphModule, segments: Sequence[Segment], module: ExportedModule) -> ExportedProgram:
        """The program with calls of our op in the place of the segments."""
        for segment in segments:
            self.put_engine(outer.graph, segment, module)
        outer.graph.eliminate_dead_code()
        entries = [entry for entry in self.old.module_call_graph if not entry.fqn]
        return ExportedProgram(
            outer,
            outer.graph,
            self.signature(outer.graph),
            dict(self.old.state_dict),
            dict(self.old.range_constraints),
            entries,
            constants=self.constants,
            verifiers=list(self.old.verifiers),
        )

    def put_engine(self, graph: Graph, segment: Segment, module: ExportedModule) -> None:
        weights = [self.held[name] for name in segment.weights]
        manifest = written(segment, module.options, weights)
        carried = Known(module.carried.plans)
        again = segment_in(manifest)
        placeholders = again.segment.module.graph.find_nodes(op="placeholder")
        given = dict(zip(again.segment.weights, weights, strict=True))
        values = [given.get(node.name, node.meta["val"]) for node in placeholders]
        if why_eager(values, module.settings) is None:
            with_engine(again.segment, values, module.settings, carried)
        plans = packed_plans(carried.plans, module.settings)
        (node,) = graph.find_nodes(op="call_module", target=segment.name)
        results = [each.meta["val"] for each in results_of(segment.module.graph)]
        with results[0].fake_mode as mode:
            meta = {"val": mode.from_tensor(plans, static_shapes=True)}
            found = [empty_in_order(value, order) for value, (order, _) in zip(results, again.results, strict=True)]
        engine = self.add_input(graph, "engine", plans, meta)
        tensors = [each for each in node.args if isinstance(each.meta["val"], torch.Tensor)]
        numbers = [each for each in node.args if not isinstance(each.meta["val"], torch.Tensor)]
        with graph.inserting_before(node):
            call = graph.call_function(RUN_ENGINE, (tensors, numbers, engine, manifest))
        call.meta["val"] = found
        for user in node.users:
            assert user.target is operator.getitem
            user.meta["val"] = found[user.args[1]]
        node.replace_all_uses_with(call)
        graph.erase_node(node)

    def signature(self, graph: Graph) -> ExportGraphSignature:
        """The program's signature, by the names that its nodes have now."""
        placeholders = graph.find_nodes(op="placeholder")
        inputs = [renamed(spec, node) for spec, node in zip(self.inputs, placeholders, strict=True)]
        results = results_of(graph)
        old = self.old.graph_signature.output_specs
        outputs = [renamed(spec, node) for spec, node in zip(old, results, strict=True)]
        return ExportGraphSignature(inputs, outputs)


def renamed(spec: Any, value: Any) -> Any:
    """The spec of an input or a result that is this node, or this value, by now."""
    if isinstance(value, Node):
        return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=value.name))
    if isinstance(spec.arg, SymIntArgument):
        return dataclasses.replace(spec, arg=ConstantArgument(spec.arg.name, value))
    return spec
