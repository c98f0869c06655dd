"""Refit: an engine that is there gets other weights, read from the parameters' own memory, in order with its calls."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.compiled import assert_same
from tests.stand_in_engines import Net
from trt_dynamo import trt as tensorrt
from trt_dynamo.aten_converters import ConvertedNetwork, Network, convert, weights_manifest
from trt_dynamo.aten_converters.refittable import tensors_read, weight_bindings
from trt_dynamo.build import build, make_refittable, profile_of
from trt_dynamo.errors import BuildError, ConversionError, EngineError, Unsupported
from trt_dynamo.identity import manifest_of
from trt_dynamo.log import collected, logger, record
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import Segment, main_device, partition
from trt_dynamo.reference import ReferenceEngine, ReferenceRefitter
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.runtime.gate import Gate
from trt_dynamo.settings import Settings
from trt_dynamo.trt import trt

SETTINGS = Settings(runtime="reference", min_segment_nodes=1)
CPU = torch.device("cpu")


def engine_of(converted: ConvertedNetwork, device: torch.device = CPU, **changes: Any) -> Engine:
    """The stand-in's engine. `changes` are to the manifest's weights, the stand-in's, or its refitter."""
    manifest = {**manifest_of(converted), "weights": changes.get("manifest", weights_manifest(converted.weights))}
    raw = ReferenceEngine(
        converted.network.raw,
        [profile_of(converted, {})],
        converted.constants,
        device,
        weights=changes.get("weights", converted.weights),
    )
    return Engine(
        raw, manifest, device, owner=converted, refitter_factory=changes.get("refitter_factory", ReferenceRefitter)
    )


class Refitted(nn.Module):
    """A segment's engine. While `refits` is set it gets the weights of each call first."""

    refits = False

    def __init__(self, segment: Segment, weights: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self.positions = segment.weight_positions
        copies = [weight.detach().clone() for weight in weights]
        self.converted = convert(segment.module, dict(zip(segment.weights, copies, strict=True)), refit=True)
        self.engine = engine_of(self.converted, device)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        if Refitted.refits and self.engine.refittable:
            self.engine.refit([args[position] for position in self.positions])
        return self.engine(args)


def compiled(model: Callable[..., Any]) -> tuple[Callable[..., Any], list[Refitted]]:
    """The model with engines of the weights that it has at its first call, and those engines."""
    engines: list[Refitted] = []

    def compile_lowered(lowered: Lowered) -> Callable[..., Any]:
        with unset_fake_temporarily(), torch.no_grad():
            parts = partition(lowered.module, lowered.names, SETTINGS)
            for segment in parts.segments:
                weights = lowered.weights_of(segment.weights)
                engines.append(Refitted(segment, weights, main_device(lowered.module)))
                setattr(parts.module, segment.name, engines[-1])
        return parts.module.forward

    def backend(module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(module, inputs, compile_lowered, SETTINGS)

    return torch.compile(model, backend=backend, dynamic=False), engines


@pytest.fixture
def refits() -> Iterator[Callable[[bool], None]]:
    """Switches `Refitted.refits`."""
    yield lambda on: setattr(Refitted, "refits", on)
    Refitted.refits = False


# Which weights


class Parts(nn.Module):
    """A function of an input and of named tensors, the module's parameters and buffers."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return self.function(x, **tensors)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


class Tied(nn.Module):
    """An embedding whose table is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.table(x))
        return result


def linear(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.linear(x, w)


def channels_last(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0)


def part_of_a_buffer() -> Tensor:
    """A view that starts where no allocation does."""
    return torch.randn(100)[3:27].view(6, 4)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(3, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 7, 7)),
    "convolution over one dim, grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 9)),
    "channels_last": (lambda: channels_last(nn.Conv2d(4, 6, 3)), lambda: torch.randn(2, 4, 7, 7)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(3, 8)),
    "batch norm, its statistics too": (lambda: nn.BatchNorm2d(4).eval(), lambda: torch.randn(2, 4, 5, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.tensor([[1, 4], [10, 0]])),
    "LSTM": (Recurrent, lambda: torch.randn(2, 4, 5)),
    "attention": (lambda: encoder().eval(), lambda: torch.randn(2, 5, 16)),
    "tied weights": (Tied, lambda: torch.tensor([[1, 4], [10, 0]])),
    "bfloat16": (lambda: nn.Linear(4, 6).bfloat16(), lambda: torch.randn(3, 4).bfloat16()),
    "half": (lambda: nn.Linear(4, 6).half(), lambda: torch.randn(3, 4).half()),
    "a transposed parameter": (lambda: Parts(linear, w=torch.randn(4, 6).t()), lambda: torch.randn(3, 4)),
    "every second column": (lambda: Parts(linear, w=torch.randn(6, 8)[:, ::2]), lambda: torch.randn(3, 4)),
    "an expanded row": (lambda: Parts(linear, w=torch.randn(1, 4).expand(6, 4)), lambda: torch.randn(3, 4)),
    "part of a buffer": (lambda: Parts(linear, w=part_of_a_buffer()), lambda: torch.randn(3, 4)),
    "used twice": (lambda: Parts(lambda x, w: (x @ w).relu() @ w, w=torch.randn(4, 4)), lambda: torch.randn(3, 4)),
    "a scalar": (lambda: Parts(lambda x, w: x * w, w=torch.tensor(2.0)), lambda: torch.randn(3, 4)),
    "uint8": (
        lambda: Parts(lambda x, w: x * (w / 255), w=torch.tensor([200, 3, 255, 17], dtype=torch.uint8)),
        lambda: torch.randn(3, 4),
    ),
    "int8": (
        lambda: Parts(lambda x, w: x * w, w=torch.tensor([-128, 3, 127, 17], dtype=torch.int8)),
        lambda: torch.randn(3, 4),
    ),
    "bool": (
        lambda: Parts(lambda x, w: x.masked_fill(w, 0), w=torch.tensor([True, True, False, False])),
        lambda: torch.randn(3, 4),
    ),
    "an index": (
        lambda: Parts(lambda x, w: x.index_select(1, w), w=torch.tensor([3, 0, 0, 1])),
        lambda: torch.randn(3, 4),
    ),
    "held as it is and in both half types": (
        lambda: Parts(lambda x, w: x * w.half() + w.bfloat16() - w, w=torch.randn(4)),
        lambda: torch.randn(3, 4),
    ),
    "one that is empty": (
        lambda: Parts(lambda x, v, w: torch.cat([x, w]) * v, v=torch.randn(4), w=torch.randn(0, 4)),
        lambda: torch.randn(3, 4),
    ),
}


def change(model: nn.Module) -> None:
    """Other values for all that the model has: floats positive, for variances; integers those that were there."""
    with torch.no_grad():
        for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
            if 0 in tensor.stride():
                tensor[0].uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.copy_(tensor.roll(1) if tensor.ndim else tensor)


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_gets_other_weights(name: str, device: torch.device, refits: Callable[[bool], None]) -> None:
    make_model, make_input = MODELS[name]
    model, x = make_model().to(device).eval(), make_input().to(device)
    low = x.dtype in (torch.half, torch.bfloat16)
    same = functools.partial(torch.testing.assert_close, rtol=2e-2 if low else 1e-4, atol=2e-2 if low else 1e-5)
    exact = torch.backends.cudnn.flags(allow_tf32=False)
    with exact, torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        fast, engines = compiled(model)
        before = model(x)
        same(fast(x), before)
        change(model)
        after = model(x)
        assert (after - before).abs().max() > 0.01, "the change must show"
        same(fast(x), before)
        refits(True)
        same(fast(x), after)
        refits(False)
        change(model)
        same(fast(x), after)
    assert engines and sum(len(engine.converted.weights) for engine in engines) >= 1


def test_a_weight_that_outgrows_the_type_it_is_held_in_is_refused(refits: Callable[[bool], None]) -> None:
    model, x = Parts(lambda x, w: x * w.half(), w=torch.ones(4)), torch.ones(3, 4)
    weight = model.get_parameter("w")
    with torch.no_grad():
        fast, engines = compiled(model)
        fast(x)
        (engine,) = engines
        weight.fill_(-torch.inf)
        engine.engine.refit([weight])
        assert fast(x).isinf().all()
        weight.fill_(1e5)
        with pytest.raises(EngineError, match="larger than the type"):
            engine.engine.refit([weight])


def test_a_source_that_fits_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int]] = []

    class Watched(ReferenceRefitter):
        def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
            from trt_dynamo.reference.refit import address_of

            given.append((name, address_of(weights)))
            return super().set_named_weights(name, weights, location)

    engine, tensors = two_weights(device, refitter_factory=Watched)
    engine.refit(tensors)
    assert [address for _, address in given] == [tensor.data_ptr() for tensor in tensors]
    engine.refit([tensors[0].t().contiguous().t(), torch.cat([tensors[1]] * 2)[::2]])
    assert given[2][1] != tensors[0].data_ptr()


def test_a_source_that_is_not_aligned_to_its_elements_is_copied() -> None:
    engine, tensors = two_weights()
    memory = bytearray(64)
    bias = torch.frombuffer(memory, dtype=torch.float32, count=3, offset=2)
    bias.copy_(tensors[1])
    assert bias.data_ptr() % 4 == 2
    engine.refit([tensors[0], bias])
    x = torch.randn(2, 4)
    assert_same(engine((x,))[0], affine(x, *tensors))


# Names


def graph_of(function: Callable[..., Any], *args: Tensor) -> Any:
    """The function as a segment's graph; its results are a tuple."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda *a: (function(*a),), tracing_mode="fake")(*args)


def converted(function: Callable[..., Any], x: Tensor, *weights: Tensor, refit: bool = True) -> ConvertedNetwork:
    """The network of a function of an input and weights."""
    graph = graph_of(function, x, *[weight.clone() for weight in weights])
    nodes = graph.graph.find_nodes(op="placeholder")[1:]
    for node in nodes:
        node.meta["weight_name"] = "layer.weight"
    return convert(graph, {node.name: weight for node, weight in zip(nodes, weights, strict=True)}, refit=refit)


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return nn.functional.linear(x, w, b)


def two_weights(device: torch.device = CPU, **changes: Any) -> tuple[Engine, list[Tensor]]:
    """An engine of `affine` on inputs of shape (2, 4), and weights of another value for it."""
    tensors = [torch.randn(3, 4), torch.randn(3)]
    network = converted(affine, torch.randn(2, 4), *tensors)
    return engine_of(network, device, **changes), [(tensor + 1).to(device) for tensor in tensors]


def test_names_are_unique_and_marked() -> None:
    network = converted(affine, torch.randn(2, 4), torch.randn(3, 4), torch.randn(3))
    assert [weight.name for weight in network.weights] == ["layer.weight", "layer.weight.1"]
    assert all(network.network.raw.are_weights_marked_refittable(weight.name) for weight in network.weights)
    assert [(w.position, w.index, w.count, w.stored) for w in network.weights] == [
        (1, 0, 12, torch.float32),
        (2, 1, 3, torch.float32),
    ]
    assert all(weight.layer in network.constants for weight in network.weights)


def test_weights_come_in_the_order_in_which_they_were_baked() -> None:
    x, w, b = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)
    graph = graph_of(affine, x, w, b)
    _, first, second = graph.graph.find_nodes(op="placeholder")
    network = convert(graph, {second.name: b, first.name: w}, refit=True)
    assert [(weight.position, weight.index) for weight in network.weights] == [(1, 1), (2, 0)]
    engine = engine_of(network)
    engine.refit([b + 1, w - 1])
    assert_same(engine((x,))[0], affine(x, w - 1, b + 1))


def test_networks_of_fixed_weights_stay_as_they_are() -> None:
    network = converted(affine, torch.randn(2, 4), torch.randn(3, 4), torch.randn(3), refit=False)
    assert network.weights == () and not network.network.raw.are_weights_marked_refittable("layer.weight")
    assert not engine_of(network).refittable


@pytest.mark.parametrize(
    "second",
    [lambda w: w, lambda w: w.view(6, 2), lambda w: w[0], lambda w: w[0, :1]],
    ids=["the same tensor", "another shape", "its first row", "its first element"],
)
def test_weights_in_the_same_memory_are_replaced_one_by_one(second: Callable[[Tensor], Tensor]) -> None:
    first = torch.arange(12.0).view(3, 4)
    other = second(first)
    network = converted(lambda x, a, b: x + a.sum() * 10 + b.sum(), torch.zeros(1), first, other)
    assert len({weight.name for weight in network.weights}) == 2
    engine = engine_of(network)
    engine.refit([torch.ones(3, 4), torch.full(other.shape, 2.0)])
    assert_same(engine((torch.zeros(1),))[0], torch.tensor([120.0 + 2 * other.numel()]))


def test_weights_that_reach_no_result_may_be_dropped() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.ops.aten.mul.Tensor(b, 2)
        return x * a

    network = converted(function, torch.randn(3), torch.randn(3), torch.randn(3))
    engine = engine_of(network)
    assert {weight.index: weight.needed for weight in network.weights} == {0: True, 1: False}
    engine.refit([torch.ones(3), torch.ones(3)])
    assert_same(engine((torch.arange(3.0),))[0], torch.arange(3.0))


def test_what_a_result_depends_on() -> None:
    """A loop's trip limit and an assertion count, though neither makes a tensor; what only gives its shape does not."""
    net = Net()
    values = {"limit": np.array(2, np.int32), "asserted": np.array(True), "sized": np.zeros(3, np.int32)}
    made = {}
    for name, value in {**values, "step": np.array(3, np.int32), "idle": np.array(0, np.int32)}.items():
        made[name] = net.raw.add_constant(value.shape, value).get_output(0)
        made[name].name = name
    net.raw.add_assertion(made["asserted"], "it holds")
    loop = net.raw.add_loop()
    loop.add_trip_limit(made["limit"], trt.TripLimit.COUNT)
    state = loop.add_recurrence(net.input("x", (), trt.DataType.INT32))
    step = net.raw.add_elementwise(state.get_output(0), made["step"], trt.ElementWiseOperation.SUM)
    state.set_input(1, step.get_output(0))
    net.mark(loop.add_loop_output(state.get_output(0), trt.LoopOutput.LAST_VALUE, 0).get_output(0))
    net.mark(net.raw.add_shape(made["sized"]).get_output(0), "size")
    read = tensors_read(net.raw)
    assert {name: name in read for name in ("x", *made)} == {
        "x": True, "limit": True, "asserted": True, "sized": False, "step": True, "idle": False
    }  # fmt: skip


def test_values_that_decide_shapes_cannot_be_replaced() -> None:
    network = Network(refit=True)
    x = network.input("x", torch.float32, (2, 6))
    dims = torch.tensor([3, 4])
    tensor, named = network.weight(dims, "dims")
    layer = network.raw.add_shuffle(x.raw)
    layer.set_input(1, tensor.raw)
    network.raw.mark_output(layer.get_output(0))
    graph = torch.fx.Graph()
    node = graph.placeholder("dims")
    assert named is not None
    with pytest.raises(Unsupported, match="the values of dims decide shapes"):
        weight_bindings(network, [node], {"dims": dims}, [(node, named)])


def test_a_name_that_tensorrt_refuses_is_an_error() -> None:
    network, kept = Network(refit=True), torch.ones(2)
    weights = trt.Weights(trt.DataType.FLOAT, kept.data_ptr(), 2)
    network.raw.add_constant((2,), weights)
    assert network.raw.set_weights_name(weights, "taken")
    with collected(), pytest.raises(ConversionError, match=r"setWeightsName|refused the name"):
        network.weight(torch.ones(3), "taken")


def test_empty_weights_have_no_name() -> None:
    assert Network(refit=True).weight(torch.ones(0, 4), "nothing")[1] is None


# Building


def test_a_refittable_build_asks_for_single_weights() -> None:
    config = trt.Builder(logger()).create_builder_config()
    flags = {"REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL"}
    make_refittable(config)
    assert {name for name in flags if config.get_flag(getattr(trt.BuilderFlag, name))} == {"REFIT_INDIVIDUAL"}


def test_a_refittable_build_works_or_says_why_it_does_not() -> None:
    network = converted(affine, torch.randn(2, 4), torch.randn(3, 4), torch.randn(3))
    why = tensorrt.why_no_refit()
    if why is None:
        assert build(network, profile_of(network, {}), SETTINGS, refit=True)
    else:
        with pytest.raises(BuildError) as raised:
            build(network, profile_of(network, {}), SETTINGS, refit=True)
        assert why in str(raised.value)
    assert build(network, profile_of(network, {}), SETTINGS)


@pytest.mark.parametrize(
    ("missing", "rtx", "not_runnable", "expected"),
    [
        ("no TensorRT", False, "no GPU", "no TensorRT"),
        (None, False, "no GPU", None),
        (None, True, None, None),
        (None, True, "no GPU", "TensorRT for RTX builds refittable engines only where they can run: no GPU"),
    ],
)
def test_where_refittable_engines_are_built(
    missing: str | None, rtx: bool, not_runnable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "why_missing", lambda: missing)
    monkeypatch.setattr(tensorrt, "is_rtx", lambda: rtx)
    monkeypatch.setattr(tensorrt, "why_not_runnable", lambda: not_runnable)
    assert tensorrt.why_no_refit() == expected


# What an engine refuses


class Refusing(ReferenceRefitter):
    """Refuses the refit itself, as TensorRT would: after some of the weights were replaced."""

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        super().refit_cuda_engine_async(stream_handle)
        record("ERROR", "[refit.cpp::refit::12] Error Code 2: Internal Error (no room)")
        return False


class RefusingOne(ReferenceRefitter):
    def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
        return name != "layer.weight.1" and super().set_named_weights(name, weights, location)


class Missing(ReferenceRefitter):
    def get_missing_weights(self) -> list[str]:
        return ["", "other"]


def changed(**changes: Any) -> list[dict[str, Any]]:
    """The manifest of `two_weights`, its second weight changed."""
    network = converted(affine, torch.randn(2, 4), torch.randn(3, 4), torch.randn(3))
    first, second = weights_manifest(network.weights)
    return [first, {**second, **changes}]


@dataclasses.dataclass(frozen=True)
class Named:
    name: str
    layer: str


FIRST = Named("layer.weight", "layer.weight")

BREACHES: dict[str, tuple[dict[str, Any], Callable[[list[Tensor]], list[Tensor]], str]] = {
    "another shape of as many elements": ({}, lambda t: [t[0].t(), t[1]], r"\[4, 3\].*built for \[3, 4\]"),
    "too many elements": ({}, lambda t: [t[0], t[1].repeat(2)], r"\[6\].*built for \[3\]"),
    "another dtype": ({}, lambda t: [t[0].half(), t[1]], "float16.*built for.*float32"),
    "an engine that lacks a weight": ({"weights": [FIRST]}, list, "cannot replace the weights layer.weight.1"),
    "an engine that knows more": ({"manifest": changed()[:1]}, list, "the segment lacks: layer.weight.1"),
    "an engine of another dtype": ({"manifest": changed(stored="int32")}, list, "3 elements of FLOAT.*3 of INT32"),
    "an engine of another size": ({"manifest": changed(shape=[4])}, list, "3 elements of FLOAT.*4 of FLOAT"),
    "an engine of fixed weights": ({"weights": []}, list, "TensorRT made no refitter.*not built with REFIT"),
    "a refit that TensorRT refuses": ({"refitter_factory": Refusing}, list, "could not refit the engine:.*no room"),
    "weights that TensorRT refuses": (
        {"refitter_factory": RefusingOne},
        list,
        "TensorRT refused the weights layer.weight.1: it gave no reason",
    ),
    "weights that are missing": ({"refitter_factory": Missing}, list, "misses the weights , other"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_refit_that_fails_ends_the_engine(name: str, device: torch.device) -> None:
    changes, given, message = BREACHES[name]
    engine, tensors = two_weights(device, **changes)
    x = torch.randn(2, 4, device=device)
    engine((x,))
    with pytest.raises(EngineError, match=message):
        engine.refit(given(tensors))
    with pytest.raises(EngineError, match="cannot be used: its last refit failed"):
        engine((x,))


def test_an_engine_of_fixed_weights_goes_on_after_it_refused() -> None:
    engine, tensors = two_weights(manifest=[], weights=[])
    before = engine((torch.ones(2, 4),))[0]
    with pytest.raises(EngineError, match="built for fixed weights"):
        engine.refit(tensors)
    assert_same(engine((torch.ones(2, 4),))[0], before)


# Calls beside a refit


def constant_weights(value: float, device: torch.device, size: int = 64) -> list[Tensor]:
    return [torch.full((size, size), value, device=device), torch.full((size, size), value, device=device)]


def test_each_answer_belongs_to_one_set_of_weights(device: torch.device) -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ a) @ b

    size = 64
    network = converted(function, torch.ones(size, size), *constant_weights(1.0, CPU))
    engine = engine_of(network, device)
    sets = {value: constant_weights(value, device) for value in (1.0, 2.0)}
    answers = {value: size * size * value * value for value in sets}
    x = torch.ones(size, size, device=device)
    torch.cuda.synchronize() if device.type == "cuda" else None
    found: list[Tensor] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def call() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
                x.clone()  # gives a new thread the GPU's context, which cuBLAS would warn of
                while not done.is_set():
                    found.append(engine((x,))[0].unique().cpu())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 30
        for round_ in itertools.count():
            engine.refit(sets[1.0 if round_ % 2 else 2.0])
            time.sleep(0.002)
            seen = {tuple(answer.tolist()) for answer in [*found]}
            if (round_ >= 60 and len(seen) > 1) or errors or time.monotonic() > deadline:
                break
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors[0]
    assert {tuple(answer.tolist()) for answer in found} == {(answer,) for answer in answers.values()}


@pytest.mark.cuda
def test_a_refit_takes_its_turn_among_all_streams() -> None:
    """Long work on several streams, and refits from each of them and from the default stream, without a host wait."""
    device = torch.device("cuda")
    size = 512
    network = converted(lambda x, w: (x @ w).relu(), torch.ones(size, size), torch.ones(size, size))
    engine = engine_of(network, device)
    x = torch.ones(size, size, device=device)
    sets = [torch.full((size, size), float(value), device=device) for value in range(1, 5)]
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(3))]
    torch.cuda.synchronize()
    answers = []
    with torch.no_grad():
        for round_ in range(40):
            with torch.cuda.stream(streams[round_ % 4]):
                torch.cuda._sleep(2_000_000)
                engine.refit([sets[round_ % 4]])
            for stream in [*streams, torch.cuda.Stream()]:
                with torch.cuda.stream(stream):
                    answers.append((round_ % 4 + 1, engine((x,))[0]))
    torch.cuda.synchronize()
    for value, answer in answers:
        assert answer.unique().tolist() == [float(value * size)]


@pytest.mark.cuda
def test_weights_freed_after_a_refit_are_read_before_their_memory_is_used_again() -> None:
    device = torch.device("cuda")
    network = converted(lambda x, w: x * w, torch.ones(1 << 20), torch.ones(1 << 20))
    engine = engine_of(network, device)
    x, side = torch.ones(1 << 20, device=device), torch.cuda.Stream()
    engine((x,))
    torch.cuda.synchronize()
    with torch.no_grad():
        for round_ in range(20):
            weight = torch.full((1 << 20,), float(round_), device=device)
            side.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(5_000_000)
                engine.refit([weight])
                answer = engine((x,))[0]
            del weight
            torch.full((1 << 20,), -1.0, device=device)
            torch.cuda.synchronize()
            assert answer.unique().tolist() == [float(round_)]


@pytest.mark.cuda
def test_a_refit_does_not_wait_for_the_device() -> None:
    engine, tensors = two_weights(torch.device("cuda"))
    engine.refit(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        engine.refit(tensors)
        engine.refit([tensors[0].t().contiguous().t(), tensors[1]])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gate_keeps_calls_out_of_a_change_and_changes_apart() -> None:
    gate, events = Gate(), []
    gate.enter()

    def change() -> None:
        with gate.closed():
            events.append("change begins")
            time.sleep(0.02)
            events.append("change ends")

    def call() -> None:
        gate.enter()
        events.append("call")
        gate.leave()

    changes = [threading.Thread(target=change) for _ in range(2)]
    for thread in changes:
        thread.start()
    while not gate.closing:
        time.sleep(0.001)
    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.02)
    assert events == [], "a call is inside, and the next waits behind the change"
    gate.leave()
    for thread in [*changes, caller]:
        thread.join(30)
    changed = [event for event in events if event != "call"]
    assert changed == ["change begins", "change ends"] * 2
    assert events.index("call") % 2 == 0, "between the changes or after them"


def test_a_change_that_fails_opens_the_gate() -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), gate.closed():
        raise ZeroDivisionError
    gate.enter()
    gate.leave()
