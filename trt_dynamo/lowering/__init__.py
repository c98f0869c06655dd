"""From Dynamo's graph to an ATen graph without mutations: `lower` runs AOTAutograd and our passes.

Comes in: what Dynamo hands to a backend. Goes out: a `Lowered` per graph that needs no gradients; a graph that does
need them never gets here, or goes back as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trt_dynamo.lowering import pooled_lengths, pooled_sizes  # noqa: F401  they change what torch does for us in Dynamo
from trt_dynamo.lowering.decompositions import decompositions
from trt_dynamo.lowering.passes import run_passes
from trt_dynamo.lowering.sessions import compile_session
from trt_dynamo.lowering.subclasses import with_plain_tensors
from trt_dynamo.lowering.whole import NAMED, keep_whole
from trt_dynamo.settings import Settings
from trt_dynamo.tracing import readable, trace
from trt_dynamo.warm import kept_graphs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Lowered:
    """A functional ATen graph. `weights`: position among its placeholders to the parameter or buffer that came with it,
    for those that stay the same from call to call and that the graph does not mutate; `names`: their qualified
    names."""

    module: GraphModule
    weights: Mapping[int, torch.Tensor]
    names: Mapping[int, str]

    def weights_of(self, placeholders: Sequence[str]) -> list[torch.Tensor]:
        """The weights behind placeholders, by the names of these in the graph."""
        nodes = self.module.graph.find_nodes(op="placeholder")
        position = {node.name: index for index, node in enumerate(nodes)}
        return [self.weights[position[name]] for name in placeholders]


def lower(
    module: GraphModule,
    inputs: Sequence[Any],
    compile: Callable[[Lowered], Callable[..., Any]],
    settings: Settings,
    traced: Sequence[Any] | None = None,
) -> Callable[..., Any]:
    """The callable that Dynamo gets: AOTAutograd's wrapper (which writes mutations back) around what `compile`
    makes. `traced` are the fake inputs, where an export has made them; by default AOTAutograd makes them itself.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [qualified_name(node) for node in placeholders]
    static = {
        i for i, node in enumerate(placeholders) if "_dynamo_static_input_type" in node.meta.get("tensor_dict", ())
    }

    def finish(
        lowered: GraphModule, weights: Mapping[int, torch.Tensor], known: Mapping[int, str] | None = None
    ) -> Callable[..., Any]:
        compiled = compile(Lowered(lowered, weights, {i: names[i] for i in weights} if known is None else known))
        boxed = compiled if hasattr(compiled, "_boxed_call") else make_boxed_func(compiled)
        return with_plain_tensors(boxed, inputs)

    def inference(lowered: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        parts = [part for i, value in enumerate(inputs) for part in plain_tensors(value, names[i], i in static)]
        weights = static_weights(lowered, [p.value for p in parts], {i for i, p in enumerate(parts) if p.static})
        run_passes(lowered, settings)
        trace(log, "lowered", lambda: readable(lowered))
        known = {i: parts[i].name for i in weights}
        make = functools.partial(finish, lowered, weights, known)
        return make() if cache is None else cache.kept(lowered, weights, make)

    def training(lowered: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return with_plain_tensors(make_boxed_func(lowered.forward), inputs)

    whole, table = keep_whole(module), decompositions()
    cache = kept_graphs(whole, inputs, names, settings, table, finish, NAMED) if traced is None else None
    backend = aot_autograd(
        fw_compiler=training if cache is None else cache.passed_by(training),
        bw_compiler=training if cache is None else cache.passed_by(training),
        inference_compiler=inference if cache is None else cache.keeping(inference),
        decompositions=table,
    )
    with compile_session(), contextlib.nullcontext() if cache is None else cache.at_work():
        result: Callable[..., Any] = backend(whole, inputs if traced is None else traced)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """An input of the lowered graph: one of Dynamo's, or a tensor inside one that is of a tensor subclass."""

    value: Any
    name: str
    static: bool


def plain_tensors(value: Any, name: str, static: bool) -> Iterator[Part]:
    """What AOTAutograd makes of an input, in its order: a tensor subclass becomes the tensors that it is made of. Those
    that it makes anew for whoever asks are never the same at two calls, and cannot be weights: None.
    """
    if not is_traceable_wrapper_subclass(value):
        yield Part(value, name, static)
        return
    for inner in value.__tensor_flatten__()[0]:
        part = getattr(value, inner)
        lasting = part is getattr(value, inner)
        yield from plain_tensors(part if lasting else None, f"{name}.{inner}", static and lasting)


def static_weights(lowered: GraphModule, inputs: Sequence[Any], static: Collection[int]) -> dict[int, torch.Tensor]:
    """The parameters and buffers behind the graph's static placeholders, where they may be baked into an engine.

    `static` are those that Dynamo marks; AOTAutograd's own list is empty where a Python float became an input.
    """
    metadata = TracingContext.get().fw_metadata
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    if metadata is None or len(placeholders) != len(inputs):
        # AOTAutograd made one input of several that share memory: nothing lines up, so all stay inputs.
        log.debug("%d placeholders for %d inputs: no weight is baked", len(placeholders), len(inputs))
        return {}
    weights = {}
    for position in sorted({*metadata.static_input_indices, *static}):
        if position < len(metadata.input_info) and metadata.input_info[position].mutates_data:
            continue
        if bakeable(inputs[position], placeholders[position].meta.get("val")):
            weights[position] = inputs[position]
    return weights


def bakeable(real: Any, fake: Any) -> bool:
    """Whether the tensor may be a constant of an engine, for which `fake` stands in the graph."""
    if not isinstance(real, torch.Tensor) or not isinstance(fake, torch.Tensor) or type(real) not in BAKEABLE:
        return False
    # An inference tensor has no version counter: nothing would tell that it changed.
    return tuple(real.shape) == tuple(fake.shape) and real.dtype is fake.dtype and not real.is_inference()


BAKEABLE = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def qualified_name(node: torch.fx.Node) -> str:
    """`layer.0.weight` for the source `L['self']._modules['layer']._modules['0']._parameters['weight']`."""
    if "qualified_name" in node.meta:  # an export says it
        return str(node.meta["qualified_name"])
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") or ""
    name = name() if callable(name) else name
    parts = [p.strip("'\"") for p in str(name).replace("]", "").split("[")[1:]]
    cleaned = [p.split("']")[0].split("'.")[0] for p in parts[1:]]
    return ".".join(part for part in cleaned if part) or str(node.name)
