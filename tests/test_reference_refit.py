"""The stand-in for `Refitter`: TensorRT's names and answers, and an `EngineError` where TensorRT would do anything."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stand_in_engines import CPU, Net, bind, run
from trt_dynamo.errors import EngineError
from trt_dynamo.log import collected, logger
from trt_dynamo.reference import ReferenceEngine, ReferenceRefitter
from trt_dynamo.reference.refit import address_of
from trt_dynamo.trt import to_trt, trt

HOST, DEVICE = trt.TensorLocation.HOST, trt.TensorLocation.DEVICE


@dataclasses.dataclass(frozen=True)
class Named:
    name: str
    layer: str


def weights_of(tensor: Tensor) -> Any:
    return trt.Weights(to_trt(tensor.dtype), tensor.data_ptr(), tensor.numel())


def scaled(device: torch.device = CPU, names: tuple[str, ...] = ("scale", "shift", "idle")) -> ReferenceEngine:
    """y = x * scale + shift: scale is [1, 2, 3], shift [5] in bfloat16. A constant `idle` reaches no result."""
    net = Net()
    values = {
        "scale": torch.tensor([1.0, 2.0, 3.0]),
        "shift": torch.tensor([5.0]).bfloat16(),
        "idle": torch.zeros(2),
    }
    made = {}
    for name, value in values.items():
        layer = net.raw.add_constant(tuple(value.shape), weights_of(value))
        layer.name = f"layer of {name}"
        made[name] = layer.get_output(0)
        assert net.raw.set_weights_name(weights_of(value), name) and net.raw.mark_weights_refittable(name)
    x = net.input("x", (3,))
    product = net.raw.add_elementwise(x, made["scale"], trt.ElementWiseOperation.PROD).get_output(0)
    shift = net.raw.add_cast(made["shift"], trt.DataType.FLOAT).get_output(0)
    net.mark(net.raw.add_elementwise(product, shift, trt.ElementWiseOperation.SUM).get_output(0))
    named = [Named(name, f"layer of {name}") for name in names]
    return ReferenceEngine(net.raw, constants={"layer of shift": values["shift"]}, device=device, weights=named)


@dataclasses.dataclass
class Bench:
    """An engine with a context that is ready, its refitter, and new weights that fit."""

    device: torch.device

    def __post_init__(self) -> None:
        self.engine = scaled(self.device)
        self.refitter = ReferenceRefitter(self.engine, logger())
        self.context = self.engine.create_execution_context()
        self.x, self.y = torch.ones(3, device=self.device), torch.zeros(3, device=self.device)
        bind(self.context, x=self.x, y=self.y)
        self.scale = torch.tensor([10.0, 20.0, 30.0], device=self.device)
        self.shift = torch.tensor([0.5], device=self.device).bfloat16()
        self.location = DEVICE if self.device.type == "cuda" else HOST

    def set(self, name: str, tensor: Tensor) -> bool:
        return self.refitter.set_named_weights(name, weights_of(tensor), self.location)

    def set_all(self) -> None:
        assert self.set("scale", self.scale) and self.set("shift", self.shift)

    def answer(self) -> list[float]:
        run(self.context, self.device)
        return list(self.y.tolist())


@pytest.fixture
def bench(device: torch.device) -> Bench:
    return Bench(device)


# What it says


def test_it_has_every_public_name_of_tensorrts() -> None:
    ours = ReferenceRefitter(scaled(), logger())
    # The numbers' ranges belong to quantization by calibration, which left TensorRT with 11.
    names = [n for n in dir(trt.Refitter) if not n.startswith("_") and "dynamic_range" not in n]
    assert [name for name in names if not hasattr(ours, name)] == []
    methods = {name for name in names if callable(getattr(trt.Refitter, name))}
    assert {name for name in names if inspect.ismethod(getattr(ours, name))} == methods


def test_weights_that_reach_no_result_are_not_there(bench: Bench) -> None:
    refitter = bench.refitter
    assert bench.engine.refittable
    assert refitter.get_all_weights() == ["scale", "shift"]
    assert refitter.get_all() == (["layer of scale", "layer of shift"], [trt.WeightsRole.CONSTANT] * 2)


@pytest.mark.parametrize(
    ("name", "dtype", "size"), [("scale", "FLOAT", 3), ("shift", "BF16", 1), ("idle", "FLOAT", -1), ("", "FLOAT", -1)]
)
def test_prototypes(name: str, dtype: str, size: int) -> None:
    prototype = ReferenceRefitter(scaled(), logger()).get_weights_prototype(name)
    assert (prototype.dtype.name, prototype.size) == (dtype, size)


def test_what_was_set_is_remembered_and_what_was_not_is_missing(bench: Bench) -> None:
    refitter = bench.refitter
    assert refitter.get_missing_weights() == ["scale", "shift"]
    bench.set("scale", bench.scale)
    assert refitter.get_missing_weights() == ["shift"]
    assert refitter.get_missing() == (["layer of shift"], [trt.WeightsRole.CONSTANT])
    assert address_of(refitter.get_named_weights("scale")) == bench.scale.data_ptr()
    assert refitter.get_weights_location("scale") == bench.location
    assert refitter.unset_named_weights("scale") and not refitter.unset_named_weights("scale")
    assert refitter.get_missing_weights() == ["scale", "shift"]
    with collected() as errors:
        assert refitter.get_named_weights("scale").size == 0
        assert refitter.get_weights_location("scale") == HOST
    assert len(errors) == 2
    assert refitter.release_refit_resources()


def test_weights_can_be_set_by_layer() -> None:
    bench = Bench(CPU)
    constant, kernel = trt.WeightsRole.CONSTANT, trt.WeightsRole.KERNEL
    with collected() as errors:
        assert not bench.refitter.set_weights("layer of scale", kernel, weights_of(bench.scale))
        assert not bench.refitter.set_weights("scale", constant, weights_of(bench.scale))
    assert len(errors) == 2
    assert bench.refitter.set_weights("layer of scale", constant, weights_of(bench.scale))
    assert bench.set("shift", bench.shift) and bench.refitter.refit_cuda_engine()
    assert bench.answer() == [10.5, 20.5, 30.5]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool]
)
def test_the_address_behind_weights(dtype: torch.dtype) -> None:
    tensor = torch.ones(7).to(dtype)
    assert address_of(weights_of(tensor)) == tensor.data_ptr()
    assert address_of(trt.Weights(to_trt(dtype))) == 0


# What it does


def test_a_refit_changes_what_the_engine_computes(bench: Bench) -> None:
    assert bench.answer() == [6.0, 7.0, 8.0]
    bench.set_all()
    assert bench.answer() == [6.0, 7.0, 8.0], "nothing changes before the refit"
    assert bench.refitter.refit_cuda_engine()
    assert bench.answer() == [10.5, 20.5, 30.5]


def test_memory_is_read_by_each_refit_and_not_between(bench: Bench) -> None:
    bench.set_all()
    assert bench.refitter.refit_cuda_engine()
    bench.scale.fill_(7)
    assert bench.answer() == [10.5, 20.5, 30.5]
    assert bench.refitter.refit_cuda_engine(), "the addresses are remembered"
    assert bench.answer() == [7.5, 7.5, 7.5]
    other = torch.full((3,), 2.0, device=bench.device)
    bench.set("scale", other)
    assert bench.refitter.refit_cuda_engine()
    bench.scale.fill_(100)
    assert bench.answer() == [2.5, 2.5, 2.5]
    assert other.tolist() == [2.0] * 3 and bench.shift.tolist() == [0.5], "what was given is only read"


def test_the_result_of_a_refit_reaches_contexts_made_later(bench: Bench) -> None:
    bench.set_all()
    bench.refitter.refit_cuda_engine_async(0)
    later = bench.engine.create_execution_context()
    bind(later, x=bench.x, y=bench.y)
    run(later, bench.device)
    assert bench.y.tolist() == [10.5, 20.5, 30.5]


def test_a_refit_of_an_engine_made_and_run_in_inference_mode() -> None:
    with torch.inference_mode():
        bench = Bench(CPU)
        assert bench.answer() == [6.0, 7.0, 8.0]
    bench.set_all()
    assert bench.refitter.refit_cuda_engine()
    assert bench.answer() == [10.5, 20.5, 30.5]


def test_weights_that_are_not_finite_are_weights(bench: Bench) -> None:
    bench.scale.fill_(float("inf"))
    bench.set_all()
    assert bench.refitter.refit_cuda_engine()
    assert bench.answer() == [float("inf")] * 3


# What it refuses, as TensorRT does: False and a message


REFUSED: dict[str, tuple[Callable[[Bench], Any], str]] = {
    "an unknown name": (lambda b: b.set("scales", b.scale), "no refittable weights 'scales'"),
    "no name": (lambda b: b.set("", b.scale), "no refittable weights ''"),
    "weights that were dropped": (lambda b: b.set("idle", b.scale), "no refittable weights 'idle'"),
    "another dtype": (lambda b: b.set("scale", b.scale.half()), "'scale' are HALF, their prototype is FLOAT"),
    "too few": (lambda b: b.set("scale", b.scale[:2]), "'scale' have 2 elements, their prototype has 3"),
    "too many": (lambda b: b.set("shift", b.shift.repeat(9)), "'shift' have 9 elements, their prototype has 1"),
    "a refit with nothing set": (lambda b: b.refitter.refit_cuda_engine(), "scale, shift are missing"),
    "a refit with one missing": (
        lambda b: b.set("scale", b.scale) and b.refitter.refit_cuda_engine_async(0),
        "the weights shift are missing",
    ),
}


@pytest.mark.parametrize("breach", REFUSED)
def test_what_tensorrt_answers_with_false(breach: str, bench: Bench) -> None:
    act, message = REFUSED[breach]
    with collected() as errors:
        assert act(bench) is False
    assert len(errors) == 1 and message in errors[0]
    assert bench.answer() == [6.0, 7.0, 8.0]


def test_an_engine_of_fixed_weights_gets_no_refitter() -> None:
    with collected() as errors, pytest.raises(TypeError, match="factory function returned nullptr"):
        ReferenceRefitter(scaled(names=()), logger())
    assert len(errors) == 1


# What TensorRT leaves undefined


def shifted(tensor: Tensor, count: int) -> Any:
    """Weights `count` bytes behind the tensor's."""
    return trt.Weights(to_trt(tensor.dtype), tensor.data_ptr() + count, tensor.numel())


def from_thread(bench: Bench, act: Callable[[], Any]) -> None:
    """Runs `act` while a thread is inside an execution of the engine."""
    inside, go_on = threading.Event(), threading.Event()

    def execute() -> None:
        with bench.engine.executing():
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=execute)
    thread.start()
    try:
        assert inside.wait(30)
        act()
    finally:
        go_on.set()
        thread.join()


def refit_during_execution(bench: Bench) -> None:
    bench.set_all()
    from_thread(bench, bench.refitter.refit_cuda_engine)


def execute_during_refit(bench: Bench) -> None:
    with bench.engine.being_refitted():
        bench.answer()


def two_refits_at_once(bench: Bench) -> None:
    bench.set_all()
    with bench.engine.being_refitted():
        bench.refitter.refit_cuda_engine()


UNDEFINED: dict[str, tuple[Callable[[Bench], Any], str]] = {
    "null": (
        lambda b: b.refitter.set_named_weights("scale", trt.Weights(trt.DataType.FLOAT, 0, 3), b.location),
        "without memory",
    ),
    "an address that is not aligned": (
        lambda b: b.refitter.set_named_weights("scale", shifted(b.scale, 2), b.location),
        "not aligned",
    ),
    "a refit while a context is executed": (refit_during_execution, "refitted while another thread"),
    "an execution while it is refitted": (execute_during_refit, "run while another thread refits it"),
    "two refits at once": (two_refits_at_once, "refitted while another thread"),
}


@pytest.mark.parametrize("breach", UNDEFINED)
def test_what_tensorrt_leaves_undefined(breach: str, bench: Bench) -> None:
    act, message = UNDEFINED[breach]
    with pytest.raises(EngineError, match=message):
        act(bench)
    assert bench.answer() == [6.0, 7.0, 8.0]


def test_host_memory_said_to_be_on_a_gpu(bench: Bench) -> None:
    on_host = torch.zeros(256)[:3]
    with pytest.raises(EngineError, match=r"on a GPU|must be on the GPU|unknown to CUDA|not aligned"):
        bench.refitter.set_named_weights("scale", weights_of(on_host), DEVICE)


@pytest.mark.cuda
def test_memory_on_a_gpu_said_to_be_the_hosts() -> None:
    bench = Bench(torch.device("cuda"))
    with pytest.raises(EngineError, match="must be on the host"):
        bench.refitter.set_named_weights("scale", weights_of(bench.scale))
    assert bench.refitter.set_named_weights("scale", weights_of(bench.scale.cpu()), HOST), "either side may be given"


def test_a_stream_for_an_engine_on_the_cpu() -> None:
    bench = Bench(CPU)
    bench.set_all()
    with pytest.raises(EngineError, match="given the stream 0x7"):
        bench.refitter.refit_cuda_engine_async(7)
    assert bench.answer() == [6.0, 7.0, 8.0]


def test_weights_that_lie_in_memory_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = (("count", ctypes.c_int64), ("type", ctypes.c_int64), ("values", ctypes.c_void_p))

    monkeypatch.setattr("trt_dynamo.reference.refit.RawWeights", Other)
    with pytest.raises(EngineError, match="in another way"):
        address_of(weights_of(torch.ones(3)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("scale", "scale"), "two weights of the engine are called 'scale'"),
        (("scale", "other"), "no constant layer 'layer of other'"),
    ],
)
def test_engines_that_tensorrt_would_not_build(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        scaled(names=names)


def test_weights_that_the_network_does_not_mark() -> None:
    net = Net()
    value = torch.ones(3)
    layer = net.raw.add_constant((3,), weights_of(value))
    layer.name = "c"
    x = net.input("x", (3,))
    net.mark(net.raw.add_elementwise(x, layer.get_output(0), trt.ElementWiseOperation.SUM).get_output(0))
    with pytest.raises(EngineError, match="no weights 'w' that are marked as refittable"):
        ReferenceEngine(net.raw, device=CPU, weights=[Named("w", "c")])
