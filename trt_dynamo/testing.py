"""For tests, ours and users': trace a function, convert it, build it, evaluate the network, compare with eager.

`check(fn, *args, dynamic=True)` is the one-line test of a converter; it needs no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

from trt_dynamo.aten_converters import ConvertedNetwork, convert
from trt_dynamo.aten_converters.layout import memory_order
from trt_dynamo.build import build, profile_of
from trt_dynamo.errors import TrtDynamoError, Unsupported
from trt_dynamo.lowering.decompositions import decompositions
from trt_dynamo.lowering.passes import run_passes
from trt_dynamo.lowering.whole import KeepWhole
from trt_dynamo.partition import Partitioned, partition
from trt_dynamo.profiles import ranges_of
from trt_dynamo.reference import Evaluator
from trt_dynamo.settings import Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """What `check` made: the traced graph, the same cut into segments, a network for each, and the results."""

    graph: GraphModule
    partitioned: Partitioned
    networks: tuple[ConvertedNetwork, ...]
    results: tuple[Any, ...]

    @property
    def layers(self) -> int:
        return sum(network.network.raw.num_layers for network in self.networks)


def trace(
    function: Callable[..., Any], args: Sequence[Any], *, dynamic: bool = False, settings: Settings | None = None
) -> GraphModule:
    """The functional ATen graph of a call, decomposed as the backend decomposes it. `dynamic`: every dim is a
    symbol.
    """

    def flat(*inputs: Any) -> tuple[Any, ...]:
        with KeepWhole():
            return tuple(tree_flatten(function(*inputs))[0])

    module: Any = flat
    with torch.no_grad():
        mode = "symbolic" if dynamic else "fake"
        for _ in range(2):
            functional = torch.func.functionalize(module, remove="mutations")
            module = make_fx(functional, decompositions(), mode, _allow_non_fake_inputs=True)(*args)  # type: ignore[arg-type]
            # What torch takes apart while it is traced may leave writes behind, for a second round.
            if not any(mutates(node) for node in module.graph.nodes):
                break
        drop_input_writes(module)
    return run_passes(module, settings or Settings())


def drop_input_writes(module: GraphModule) -> None:
    """Takes out the copies into the inputs at the end of the graph: in the backend they are AOTAutograd's own."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        if node.args[0].op == "placeholder" and not node.users:
            module.graph.erase_node(node)


def mutates(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


# Complex arguments and results are viewed as pairs of reals in eager: that moves nothing.
BORDER = {f"aten.{name}.default" for name in ("view_as_real", "view_as_complex", "resolve_conj", "resolve_neg")}


def check(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    build_engines: bool = True,
    whole: bool = True,
    settings: Settings | None = None,
    also: Sequence[Sequence[Any]] = (),
) -> Checked:
    """Asserts that TensorRT networks mean what eager means by `function(*args)`; tensor arguments become inputs.

    `also` holds further arguments, of other sizes where `dynamic`, for the same networks.

    Raises:
        Unsupported: with `whole`, some node has no place in TensorRT; the text has every reason.
        AssertionError: the results differ. ConversionError, BuildError: as their docstrings say.
    """
    checked = evaluate(function, *args, dynamic=dynamic, build_engines=build_engines, whole=whole, settings=settings)
    stated = output_values(checked.graph) if whole else None
    with torch.no_grad():
        compare(checked.results, function(*copied(args)), rtol, atol, stated)
        for given in also:
            compare(checked.partitioned.module(*copied(given)), function(*copied(given)), rtol, atol, stated)
    return checked


def evaluate(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    build_engines: bool = True,
    whole: bool = True,
    settings: Settings | None = None,
) -> Checked:
    """What `check` compares with eager: `function(*args)` as networks, evaluated.

    Raises:
        Unsupported, ConversionError, BuildError: as `check` does.
    """
    settings = settings or Settings(min_segment_nodes=0, strict=True)
    module = trace(function, copied(args), dynamic=dynamic, settings=settings)
    with unset_fake_temporarily():
        parts = partition(module, {}, settings)
    refused = [v for v in parts.verdicts if not v.ok and v.target not in BORDER]
    if whole and refused:
        raise Unsupported("; ".join(dict.fromkeys(f"{v.target}: {v.reason}" for v in refused)))
    networks = []
    for segment in parts.segments:
        converted = convert(segment.module, {})
        networks.append(converted)
        if build_engines:
            values = [n.meta["val"] for n in segment.module.graph.nodes if n.op == "placeholder"]
            build(converted, profile_of(converted, ranges_of(values)), settings, label=segment.name)
        setattr(parts.module, segment.name, EvaluatedSegment(converted))
    with torch.no_grad():
        results = parts.module(*copied(args))
    return Checked(module, parts, tuple(networks), tuple(results))


def output_values(module: GraphModule) -> list[Any]:
    """What the graph states of each of its results."""
    (output,) = module.graph.find_nodes(op="output")
    return [node.meta.get("val") if isinstance(node, Node) else node for node in output.args[0]]


def compare(
    results: Sequence[Any], wanted: Any, rtol: float | None, atol: float | None, stated: Sequence[Any] | None
) -> None:
    """Asserts that `results` are those in the tree `wanted`, in values, dtypes and strides: eager's, or those that the
    graph states, which differ where torch takes an op apart in another layout. None: strides don't matter.
    """
    for position, (want, got) in enumerate(zip(tree_flatten(wanted)[0], results, strict=True)):
        if not isinstance(want, torch.Tensor):
            assert want == got, f"result {position}: {got}, eager {want}"
            continue
        message = lambda text, p=position: f"result {p}: {text}"  # noqa: E731
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, msg=message)
        if stated is None or got.numel() < 2 or got.stride() == want.stride():
            continue
        wide = [axis for axis, size in enumerate(want.shape) if size > 1]
        same = all(got.stride(axis) == want.stride(axis) for axis in wide)
        same = same or memory_order(got) == memory_order(stated[position])
        assert same, f"strides {got.stride()}, eager {want.stride()}"


def copied(args: Sequence[Any]) -> list[Any]:
    """The arguments, tensors cloned with their strides: a function under test may write into them."""
    return [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]


class EvaluatedSegment(torch.nn.Module):
    """A segment run by the reference evaluator, without an engine around it."""

    def __init__(self, converted: ConvertedNetwork) -> None:
        super().__init__()
        self.converted = converted
        self.evaluator = Evaluator(converted.network.raw, converted.constants)

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        feeds = {}
        for binding in self.converted.inputs:
            value = args[binding.position]
            feeds[binding.name] = (
                torch.tensor(value) if isinstance(value, int) else value.permute(binding.order).contiguous()
            )
        found = self.evaluator(feeds)
        return tuple(
            found[b.name]
            .clone(memory_format=torch.contiguous_format)
            .permute([b.order.index(axis) for axis in range(len(b.order))])
            for b in self.converted.outputs
        )


@contextlib.contextmanager
def refused(reason: str) -> Any:
    """Asserts that the block raises `Unsupported` with `reason` in its text."""
    try:
        yield
    except Unsupported as error:
        if reason not in str(error):
            raise AssertionError(f"refused, but because of: {error}") from error
    except TrtDynamoError as error:
        raise AssertionError(f"should be refused, failed instead: {error}") from error
    else:
        raise AssertionError("should be refused, was converted")
