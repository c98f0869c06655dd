"""A model compiled ahead of time, by `torch.export` in the place of Dynamo. In: a model and example arguments. Out: a
module that answers as the model would, and that `trt_dynamo.save` can write to a file.

Behind the export the way is that of `backend`: lowering, partition, engines. The graph's parameters, buffers and
constants become arguments, as Dynamo has them, so that weights are baked and followed and buffers are written back.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.utils._sympy.value_ranges import ValueRanges

from trt_dynamo.backend import compile_lowered, why_eager
from trt_dynamo.cache.carried import Carried, carrying
from trt_dynamo.exported_inputs import Inputs
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.lowering.modelopt import exportable
from trt_dynamo.operators import (  # noqa: F401  a graph in a file may have these ops
    attention,
    fake_quantize,
    fourier,
    recurrent,
    resampling,
)
from trt_dynamo.profiles import shape_env_of
from trt_dynamo.reports import count
from trt_dynamo.settings import Settings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Lifted:
    """An exported graph as Dynamo would give it: what the model holds comes first among the placeholders, `paths` say
    where in `root` each lies, `ranges` are those of its symbols, and the results are a flat tuple of the structure
    `out_spec`."""

    root: GraphModule
    module: GraphModule
    paths: tuple[str, ...]
    ranges: Mapping[sympy.Symbol, ValueRanges[Any]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec

    @functools.cached_property
    def values(self) -> list[Any]:
        """The fake value of each placeholder."""
        return [node.meta.get("val") for node in self.module.graph.nodes if node.op == "placeholder"]

    @functools.cached_property
    def inputs(self) -> list[Node]:
        """The placeholders of the user's inputs."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"][len(self.paths) :]

    @property
    def names(self) -> list[str]:
        """The user's inputs by the names that they have in the model. Those of nodes avoid Python's own."""
        return [str(node.target) for node in self.inputs]

    def state(self) -> list[torch.Tensor]:
        """What the model holds, in the order of `paths`."""
        return [tensor_at(self.root, path) for path in self.paths]


class ExportedModule(torch.nn.Module):
    """An exported model with engines. It is called as the model was, without gradients; shapes must be those that the
    export allows. Its parameters and buffers are those of `program`.

    Raises at a call:
        TypeError: the arguments have another structure than the example's.
        ValueError: a tensor or number that the export did not allow.
    """

    def __init__(self, program: ExportedProgram, options: Mapping[str, Any], carried: Carried) -> None:
        super().__init__()
        self.program = program
        self.options = dict(options)
        self.no_file: str | None = None  # why torch cannot write the program to a file and read it again, once known
        self.settings = dataclasses.replace(Settings.from_env().merge(options), compile="sync")
        self.carried = carried
        lifted = lift(program)
        self.model = lifted.root
        self.lifted = lifted
        self.state = lifted.state()
        self.layout = [(tensor.device, tensor.dtype) for tensor in self.state]
        self.inputs = Inputs(lifted.inputs, lifted.in_spec, program.range_constraints)
        with torch.no_grad():
            self.run = compiled(lifted, self.settings, carried)

    def train(self, mode: bool = True) -> ExportedModule:
        """Changes nothing: the model has the mode that it was exported in."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.inputs.flat(args, kwargs)
        laid, moved = self.inputs.laid_out(given)
        with torch.no_grad():
            results = self.run(*self.state, *laid)
            for original, copy in moved:
                original.copy_(copy)
        return pytree.tree_unflatten(list(results), self.lifted.out_spec)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> ExportedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state = self.lifted.state()
        if [(tensor.device, tensor.dtype) for tensor in self.state] != self.layout:
            raise TypeError("a compiled module keeps its devices and dtypes: move the model before it is compiled")
        return self


def compile(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> ExportedModule:
    """Exports a model with `torch.export` and gives it engines, now.

    Args:
        model: a module, in the mode (`eval()`) in which it shall run, or what `torch.export.export` made of one.
        args, kwargs: example arguments; what is not a tensor is part of the compiled model, unless it is dynamic.
        dynamic_shapes: which dims may vary, in which range, as `torch.export.export` takes it.
        options: settings (docs/settings.md). `compile` is always `sync` here.

    Raises:
        SettingsError: an option is unknown or does not parse.
        torch._dynamo.exc.UserError and others of torch.export: the model cannot be exported as one graph.
    """
    settings = Settings.from_env().merge(options)  # before the export, which takes long
    program = model if isinstance(model, ExportedProgram) else export(model, args, kwargs, dynamic_shapes)
    return ExportedModule(settled(program), {name: getattr(settings, name) for name in options}, Carried())


def export(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, shapes: Any
) -> ExportedProgram:
    with torch.no_grad(), exportable():
        return torch.export.export(model, tuple(args), dict(kwargs or {}), dynamic_shapes=shapes, strict=False)


def settled(program: ExportedProgram) -> ExportedProgram:
    """The program whose engines those of its file will be. torch simplifies the sizes of a program that it has read
    otherwise than those of one that it has traced; so one with sizes that vary is read again. For others that would
    only take time.
    """
    values = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [v for v in pytree.tree_leaves(values) if isinstance(v, (torch.Tensor, torch.SymInt))]
    return program if shape_env_of(sizes) is None else reread(program)[0]


def reread(program: ExportedProgram) -> tuple[ExportedProgram, str]:
    """The same program as it comes back from a file, with the same tensors. A program that torch cannot write and read
    comes back as it is, with the reason.
    """
    file = io.BytesIO()
    try:
        torch.export.save(stripped(program, weights=False), file)
        file.seek(0)
        again = torch.export.load(file)
    except Exception as error:  # noqa: BLE001  it runs all the same, and `save` will say why there can be no file
        return program, f"{type(error).__name__}: {error}"
    again._state_dict, again._constants = program.state_dict, program.constants
    return again, ""


def stripped(program: ExportedProgram, *, weights: bool) -> ExportedProgram:
    """The same program without its example inputs, which torch would pickle, and with empty tensors for its parameters
    and buffers where they stay out.
    """
    bare = copy.copy(program)
    bare._example_inputs = None
    if not weights:
        bare._state_dict = {name: empty_like(value) for name, value in program.state_dict.items()}
    return bare


def empty_like(value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=value.dtype)
    return torch.nn.Parameter(empty, value.requires_grad) if isinstance(value, torch.nn.Parameter) else empty


def compiled(lifted: Lifted, settings: Settings, carried: Carried) -> Callable[..., Sequence[Any]]:
    """The graph with engines; the graph as it is where none can run, or where making them failed."""
    reason = why_eager(lifted.values, settings)
    if reason is not None:
        count("eager_graphs", reason)
        return lifted.module.forward
    try:
        with carrying(carried):
            run = lowered(lifted, settings, functools.partial(compile_lowered, settings=settings))
        if carried.refused is not None:
            raise carried.refused
        return run
    except Exception as error:  # as in `backend`: whatever it is, the user's model runs
        if settings.strict or carried.refused is not None:
            raise
        log.warning("an exported graph runs in eager: %s: %s", type(error).__name__, error)
        count("eager_graphs", type(error).__name__)
        return lifted.module.forward


def lowered(lifted: Lifted, settings: Settings, then: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """What `then` makes of the lowered graph, in AOTAutograd's wrapper."""
    inputs = [*lifted.state(), *lifted.values[len(lifted.paths) :]]
    fake_mode = detect_fake_mode(lifted.values) or FakeTensorMode(allow_non_fake_inputs=True)
    env = shape_env_of(lifted.values)
    if env is not None:
        as_traced(env)

    def with_ranges(graph: Lowered) -> Callable[..., Any]:
        if env is not None:
            as_allowed(env, lifted.ranges)
        return then(graph)

    with tracing(TracingContext(fake_mode)):
        return lower(lifted.module, inputs, with_ranges, settings, traced=lifted.values)


def as_traced(env: ShapeEnv) -> None:
    """Makes of the ShapeEnv of a program that was read from a file what it was when the program was made: torch traces
    sizes of 2 and more. Products that the reader leaves among the symbols are no symbols to AOTAutograd.
    """
    known = env.backed_var_to_val
    for key in [key for key in known if not isinstance(key, sympy.Symbol)]:
        del known[key]
    for symbol, span in list(env.var_to_range.items()):
        if symbol in known and known[symbol] >= 2 and 0 <= span.lower < 2:
            env.var_to_range[symbol] = ValueRanges(2, span.upper)


def as_allowed(env: ShapeEnv, ranges: Mapping[sympy.Symbol, ValueRanges[Any]]) -> None:
    """Lets engines take sizes of 1 too where the export allows them: from here on nothing is traced."""
    for symbol, span in ranges.items():
        old = env.var_to_range.get(symbol)
        if old is not None and old.lower == 2 and 0 <= span.lower < 2:
            env.var_to_range[symbol] = ValueRanges(1, old.upper)


def lift(program: ExportedProgram) -> Lifted:
    """The program's graph with all tensors that it holds as placeholders before the inputs."""
    root = program.module(check_guards=False)
    assert isinstance(root, GraphModule)
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    held = [node for node in root.graph.nodes if node.op == "get_attr" and is_tensor_at(root, str(node.target))]
    first: dict[str, Node] = {}
    for node in held:
        path = str(node.target)
        if path not in first:
            first[path] = graph.placeholder(node.name)
            # As Dynamo marks what stays the same from call to call.
            marked = {"_dynamo_static_input_type": "unguarded"}
            first[path].meta = {**node.meta, "tensor_dict": marked, "qualified_name": path}
        copies[node] = first[path]
    for node in root.graph.nodes:
        # What these assert of a dtype or device holds where the inputs are looked at. For them an engine would give out
        # the tensor.
        if node in copies or node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        if node.op == "output":
            results, _ = pytree.tree_flatten(node.args[0])
            graph.output(tuple(copies[each] if isinstance(each, Node) else each for each in results))
        else:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
    graph.set_codegen(CodeGen())
    module = GraphModule(root, graph)
    spec = program.call_spec
    return Lifted(root, module, tuple(first), program.range_constraints, spec.in_spec, spec.out_spec)


def tensor_at(root: torch.nn.Module, path: str) -> Any:
    *parents, name = path.split(".")
    owner: Any = root
    for parent in parents:
        owner = getattr(owner, parent)
    return getattr(owner, name)


def is_tensor_at(root: torch.nn.Module, path: str) -> bool:
    return isinstance(tensor_at(root, path), torch.Tensor)
