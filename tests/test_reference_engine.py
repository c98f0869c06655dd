"""The stand-in engine: it answers as TensorRT does, and refuses every breach of TensorRT's contract."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiled import in_threads
from trt_dynamo.errors import EngineError
from trt_dynamo.log import logger
from trt_dynamo.reference import ReferenceContext, ReferenceEngine, ReferenceRuntime, evaluate
from trt_dynamo.trt import trt

CPU = torch.device("cpu")
USER_MANAGED = trt.ExecutionContextAllocationStrategy.USER_MANAGED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


class Net:
    """A network under construction."""

    def __init__(self) -> None:
        self.builder = trt.Builder(logger())
        self.raw = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def input(self, name: str, shape: Sequence[int], dtype: Any = trt.DataType.FLOAT) -> Any:
        return self.raw.add_input(name, dtype, tuple(shape))

    def mark(self, tensor: Any, name: str = "y") -> None:
        tensor.name = name
        self.raw.mark_output(tensor)


def doubling(shape: Sequence[int] = (-1, 4), profiles: Any = None, device: torch.device = CPU) -> ReferenceEngine:
    """y = x + x"""
    net = Net()
    x = net.input("x", shape)
    net.mark(net.raw.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    ranges = {"x": ((1, 4), (2, 4), (8, 4))} if -1 in shape else {}
    return ReferenceEngine(net.raw, profiles or [ranges], device=device)


def reshaping(device: torch.device = CPU) -> ReferenceEngine:
    """y = x reshaped to the values of the host tensor d; n = the number of rows, on the host too"""
    net = Net()
    x, d = net.input("x", (-1, 6)), net.input("d", (2,), trt.DataType.INT64)
    layer = net.raw.add_shuffle(x)
    layer.set_input(1, d)
    net.mark(layer.get_output(0))
    size = net.raw.add_shape(x).get_output(0)
    size.name = "n"
    net.raw.mark_output_for_shapes(size)
    profile = {"x": ((1, 6), (2, 6), (4, 6)), "d": ((1, 1), (3, 4), (24, 24))}
    return ReferenceEngine(net.raw, [profile], device=device)


def finding(device: torch.device = CPU) -> ReferenceEngine:
    """y = the places where x is not zero: as many as there are"""
    net = Net()
    net.mark(net.raw.add_non_zero(net.input("x", (-1,))).get_output(0))
    return ReferenceEngine(net.raw, [{"x": ((0,), (4,), (9,))}], device=device)


def caching(device: torch.device = CPU) -> ReferenceEngine:
    """y = the cache with u written at i, in the cache's own memory"""
    net = Net()
    cache, update = net.input("cache", (1, 1, 6, 3)), net.input("u", (1, 1, 2, 3))
    index = net.input("i", (1,), trt.DataType.INT32)
    net.mark(net.raw.add_kv_cache_update(cache, update, index, trt.KVCacheMode.LINEAR).get_output(0))
    return ReferenceEngine(net.raw, device=device)


def bind(context: ReferenceContext, **tensors: Tensor) -> None:
    """Binds tensors, which live on as long as the context: an address does not keep its memory."""
    context.__dict__.setdefault("bound_by_the_test", []).extend(tensors.values())
    for name, tensor in tensors.items():
        assert context.set_tensor_address(name, tensor.data_ptr())


def stream_of(device: torch.device) -> int:
    """A stream to run on; on a GPU one that is not the default."""
    return torch.cuda.Stream(device).cuda_stream if device.type == "cuda" else 0


def run(context: ReferenceContext, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert context.execute_async_v3(stream_of(device))
    if device.type == "cuda":
        torch.cuda.synchronize()


# What an engine says of itself


def test_an_engine_names_its_tensors() -> None:
    engine = reshaping()
    assert engine.num_io_tensors == 4
    assert [engine.get_tensor_name(i) for i in range(4)] == ["x", "d", "y", "n"]
    modes = [engine.get_tensor_mode(name) for name in ("x", "d", "y", "n")]
    assert modes == [trt.TensorIOMode.INPUT] * 2 + [trt.TensorIOMode.OUTPUT] * 2
    assert engine.get_tensor_dtype("d") == trt.DataType.INT64
    assert tuple(engine.get_tensor_shape("x")) == (-1, 6)
    assert tuple(engine.get_tensor_shape("y")) == (-1, -1)
    assert engine.get_tensor_location("x") == engine.get_tensor_location("y") == trt.TensorLocation.DEVICE
    assert engine.get_tensor_location("d") == engine.get_tensor_location("n") == trt.TensorLocation.HOST
    assert [engine.is_shape_inference_io(name) for name in ("x", "d", "y", "n")] == [False, True, False, True]
    assert engine.get_tensor_format("x") == trt.TensorFormat.LINEAR
    assert engine.num_optimization_profiles == 1


def test_an_engine_states_its_profiles() -> None:
    engine = reshaping()
    assert [tuple(dims) for dims in engine.get_tensor_profile_shape("x", 0)] == [(1, 6), (2, 6), (4, 6)]
    assert engine.get_tensor_profile_values(0, "d") == [[1, 1], [3, 4], [24, 24]]
    assert [tuple(dims) for dims in engine.get_tensor_profile_shape("d", 0)] == [(2,), (2,), (2,)]
    for breach in (
        lambda: engine.get_tensor_profile_shape("y", 0),
        lambda: engine.get_tensor_profile_shape("x", 1),
        lambda: engine.get_tensor_profile_values(0, "x"),
        lambda: engine.get_tensor_name(4),
        lambda: engine.get_tensor_shape("z"),
        lambda: engine.get_tensor_mode("z"),
    ):
        with pytest.raises(EngineError):
            breach()


def test_static_networks_need_no_profile() -> None:
    engine = doubling((2, 4))
    assert engine.num_optimization_profiles == 1
    assert [tuple(dims) for dims in engine.get_tensor_profile_shape("x", 0)] == [(2, 4)] * 3
    x, y = torch.randn(2, 4), torch.empty(2, 4)
    context = engine.create_execution_context()
    assert context.all_binding_shapes_specified
    bind(context, x=x, y=y)
    run(context, CPU)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ({}, "dynamic and has no profile"),
        ({"x": ((1, 4), (9, 4), (8, 4))}, "min <= opt <= max"),
        ({"x": ((1, 3), (2, 4), (8, 4))}, "changes the dim 1"),
        ({"x": ((1,), (2,), (8,))}, "must have 2 entries"),
        ({"x": ((1, 4), (2, 4), (8, 4)), "z": ((1,), (1,), (1,))}, "a profile names"),
        ({"x": ((-1, 4), (2, 4), (8, 4))}, "a negative dim"),
    ],
)
def test_profiles_that_tensorrt_would_not_build(profile: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineError, match=why):
        doubling(profiles=[profile])


def test_shape_tensors_need_ranges_of_values() -> None:
    net = Net()
    layer = net.raw.add_shuffle(net.input("x", (6,)))
    layer.set_input(1, net.input("d", (2,), trt.DataType.INT64))
    net.mark(layer.get_output(0))
    with pytest.raises(EngineError, match="'d' is dynamic and has no profile"):
        ReferenceEngine(net.raw, [{}], device=CPU)
    with pytest.raises(EngineError, match="'d' must have 2 entries"):
        ReferenceEngine(net.raw, [{"d": (1, 2, 3)}], device=CPU)


def test_a_runtime_loads_only_the_plans_that_it_knows() -> None:
    runtime, engine = ReferenceRuntime(logger()), doubling()
    runtime.add(b"a plan", engine)
    assert runtime.deserialize_cuda_engine(b"a plan") is engine
    assert runtime.deserialize_cuda_engine(bytearray(b"a plan")) is engine
    assert runtime.deserialize_cuda_engine(b"another plan") is None


# Running


def test_outputs_land_in_the_bound_memory(device: torch.device) -> None:
    engine = doubling(device=device)
    context = engine.create_execution_context()
    memory = torch.full((8, 4), 7.0, device=device)
    for rows in (2, 5, 1):
        x = torch.randn(rows, 4, device=device)
        assert context.set_input_shape("x", (rows, 4))
        assert tuple(context.get_tensor_shape("y")) == (rows, 4)
        bind(context, x=x, y=memory)
        memory.fill_(7)
        run(context, device)
        assert torch.equal(memory[:rows], 2 * x)
        assert bool((memory[rows:] == 7).all())
        assert context.get_tensor_address("y") == memory.data_ptr()


def test_results_are_written_row_by_row() -> None:
    """Whatever strides the evaluator's own result has."""
    net = Net()
    layer = net.raw.add_shuffle(net.input("x", (3, 5)))
    layer.first_transpose = (1, 0)
    net.mark(layer.get_output(0))
    x, y = torch.randn(3, 5), torch.empty(5, 3)
    context = ReferenceEngine(net.raw, device=CPU).create_execution_context()
    bind(context, x=x, y=y)
    run(context, CPU)
    assert torch.equal(y, x.t())


def test_shapes_from_a_host_tensor(device: torch.device) -> None:
    context = reshaping(device).create_execution_context()
    x, d = torch.randn(2, 6, device=device), torch.tensor([3, 4])
    y, n = torch.empty(12, device=device), torch.zeros(2, dtype=torch.int64)
    assert context.infer_shapes() == ["x", "d"]
    context.set_input_shape("x", (2, 6))
    assert context.infer_shapes() == ["d"]
    bind(context, x=x, d=d, y=y, n=n)
    assert context.infer_shapes() == []
    assert tuple(context.get_tensor_shape("y")) == (3, 4)
    run(context, device)
    assert torch.equal(y, x.reshape(-1))
    assert n.tolist() == [2, 6]
    # the values are read when the engine runs, not when the address is set
    d.copy_(torch.tensor([6, 2]))
    assert tuple(context.get_tensor_shape("y")) == (6, 2)
    run(context, device)


def test_values_outside_of_the_profile_are_refused() -> None:
    context = reshaping().create_execution_context()
    d = torch.tensor([0, 4])
    context.set_input_shape("x", (2, 6))
    bind(context, x=torch.randn(2, 6), d=d, y=torch.empty(12), n=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(EngineError, match="'d' are outside of the profile"):
        context.execute_async_v3(0)


def test_values_are_judged_anew_by_every_run() -> None:
    """They lie in the caller's memory, where they may change without a word."""
    context = reshaping().create_execution_context()
    x, d, y, n = torch.randn(2, 6), torch.tensor([3, 4]), torch.empty(12), torch.zeros(2, dtype=torch.int64)
    context.set_input_shape("x", (2, 6))
    bind(context, x=x, d=d, y=y, n=n)
    run(context, CPU)
    d.copy_(torch.tensor([30, 1]))
    with pytest.raises(EngineError, match="'d' are outside of the profile"):
        context.execute_async_v3(0)
    d.copy_(torch.tensor([7, 2]))
    with pytest.raises(EngineError, match="SHUFFLE"):
        context.execute_async_v3(0)
    d.copy_(torch.tensor([2, 6]))
    run(context, CPU)


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    context = reshaping().create_execution_context()
    d = torch.tensor([5, 5])
    context.set_input_shape("x", (2, 6))
    bind(context, d=d)
    with pytest.raises(EngineError, match="SHUFFLE"):
        context.infer_shapes()


def test_scalars_and_empty_tensors(device: torch.device) -> None:
    net = Net()
    x, s = net.input("x", (-1, 3)), net.input("s", ())
    rank = net.raw.add_shuffle(s)
    rank.reshape_dims = (1, 1)
    net.mark(net.raw.add_elementwise(x, rank.get_output(0), trt.ElementWiseOperation.PROD).get_output(0))
    context = ReferenceEngine(net.raw, [{"x": ((0, 3), (1, 3), (2, 3))}], device=device).create_execution_context()
    scale, spare = torch.tensor(3.0, device=device), torch.zeros(64, device=device)
    context.set_input_shape("x", (0, 3))
    bind(context, s=scale, x=spare, y=spare)
    run(context, device)
    assert tuple(context.get_tensor_shape("y")) == (0, 3)
    context.set_tensor_address("x", 0)
    with pytest.raises(EngineError, match="'x' has no address"):
        context.execute_async_v3(0)


@pytest.mark.parametrize("dtype", ["HALF", "BF16", "INT32", "INT64", "BOOL", "UINT8", "FP8", "INT8"])
def test_every_dtype_is_bound_as_it_is(dtype: str, device: torch.device) -> None:
    from trt_dynamo.trt import TORCH_TYPES

    net = Net()
    net.mark(net.raw.add_identity(net.input("x", (5,), getattr(trt.DataType, dtype))).get_output(0))
    context = ReferenceEngine(net.raw, device=device).create_execution_context()
    x = torch.tensor([0, 1, 1, 0, 1], device=device).to(TORCH_TYPES[dtype])
    y = torch.zeros(5, device=device).to(TORCH_TYPES[dtype])
    bind(context, x=x, y=y)
    run(context, device)
    assert torch.equal(y.float(), x.float())


def test_an_engine_keeps_its_own_weights() -> None:
    """As a built engine does: the network, its weights and the tensors given for them may change or go."""
    weights = torch.ones(4).bfloat16()
    net = Net()
    layer = net.raw.add_constant((4,), trt.Weights(trt.DataType.BF16, weights.data_ptr(), 4))
    x = net.input("x", (4,), trt.DataType.BF16)
    net.mark(net.raw.add_elementwise(x, layer.get_output(0), trt.ElementWiseOperation.SUM).get_output(0))
    engine = ReferenceEngine(net.raw, constants={layer.name: weights}, device=CPU)
    weights.fill_(9)
    del net, layer
    context = engine.create_execution_context()
    x, y = torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16()
    bind(context, x=x, y=y)
    run(context, CPU)
    assert y.tolist() == [1, 1, 1, 1]


def test_profiles_can_be_switched() -> None:
    engine = doubling(profiles=[{"x": ((1, 4), (2, 4), (3, 4))}, {"x": ((4, 4), (5, 4), (6, 4))}])
    context = engine.create_execution_context()
    assert context.active_optimization_profile == 0
    context.set_input_shape("x", (2, 4))
    with pytest.raises(EngineError, match="outside of the profile"):
        context.set_input_shape("x", (5, 4))
    assert context.set_optimization_profile_async(1, 0)
    assert context.active_optimization_profile == 1
    assert not context.all_binding_shapes_specified  # the shapes must be set anew
    context.set_input_shape("x", (5, 4))
    with pytest.raises(EngineError, match="none of index 2"):
        context.set_optimization_profile_async(2, 0)


class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined, unused-ignore]
    """Gives memory of torch's, and remembers what it was asked for."""

    def __init__(self, device: torch.device) -> None:
        trt.IOutputAllocator.__init__(self)
        self.device = device
        self.calls: list[tuple[str, int, int]] = []
        self.shape: tuple[int, ...] = ()
        self.memory = torch.empty(0)

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        self.calls.append((tensor_name, size, alignment))
        self.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.memory.data_ptr()

    def notify_shape(self, tensor_name: str, shape: Any) -> None:
        self.shape = tuple(shape)


def test_outputs_whose_size_depends_on_values(device: torch.device) -> None:
    context = finding(device).create_execution_context()
    allocator = Allocator(device)
    assert context.set_output_allocator("y", allocator)
    assert context.get_output_allocator("y") is allocator
    for values in ([0.0, 3.0, 0.0, 5.0], [0.0, 0.0]):
        x = torch.tensor(values, device=device)
        context.set_input_shape("x", x.shape)
        assert tuple(context.get_tensor_shape("y")) == (1, -1)
        bind(context, x=x)
        run(context, device)
        count = sum(value != 0 for value in values)
        assert allocator.shape == (1, count)
        assert allocator.calls[-1] == ("y", max(4 * count, 1), 256)
        found = allocator.memory[: 4 * count].view(torch.int32).tolist()
        assert found == [i for i, value in enumerate(values) if value]


def test_an_output_of_unknown_size_needs_an_allocator() -> None:
    context = finding().create_execution_context()
    context.set_input_shape("x", (4,))
    bind(context, x=torch.ones(4), y=torch.empty(16))
    with pytest.raises(EngineError, match="needs an output allocator"):
        context.execute_async_v3(0)
    with pytest.raises(EngineError, match="takes no output allocator"):
        context.set_output_allocator("x", Allocator(CPU))
    context.set_output_allocator("y", Refusing(CPU))
    with pytest.raises(EngineError, match="gave no memory"):
        context.execute_async_v3(0)
    context.set_output_allocator("y", None)
    assert context.get_output_allocator("y") is None


class Refusing(Allocator):
    """An allocator that is out of memory."""

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        return 0


def test_a_cache_is_updated_in_its_own_memory(device: torch.device) -> None:
    engine = caching(device)
    assert engine.get_aliased_input_tensor("y") == "cache"
    assert engine.get_aliased_input_tensor("u") is None
    context = engine.create_execution_context()
    cache, update = torch.zeros(1, 1, 6, 3, device=device), torch.randn(1, 1, 2, 3, device=device)
    index = torch.tensor([3], dtype=torch.int32, device=device)
    bind(context, cache=cache, u=update, i=index, y=cache)
    run(context, device)
    assert torch.equal(cache[:, :, 3:5], update)
    bind(context, y=torch.zeros(1, 1, 6, 3, device=device))
    with pytest.raises(EngineError, match="must be bound to the memory of the input 'cache'"):
        context.execute_async_v3(stream_of(device))


# Breaches


def ready() -> tuple[ReferenceContext, Tensor, Tensor]:
    """A context that is ready to run."""
    context = doubling().create_execution_context()
    x, y = torch.randn(2, 4), torch.empty(2, 4)
    context.set_input_shape("x", (2, 4))
    bind(context, x=x, y=y)
    return context, x, y


def test_shapes_must_lie_in_the_profile() -> None:
    context = doubling().create_execution_context()
    for shape in ((0, 4), (9, 4), (2, 5), (2,), (2, 4, 1), (2, -1)):
        with pytest.raises(EngineError, match="outside of the profile"):
            context.set_input_shape("x", shape)
    with pytest.raises(EngineError, match="'y' is an output"):
        context.set_input_shape("y", (2, 4))
    with pytest.raises(EngineError, match="no tensor 'z'"):
        context.set_input_shape("z", (2, 4))


def test_nothing_is_known_before_the_inputs_are_set() -> None:
    context = doubling().create_execution_context()
    assert not context.all_binding_shapes_specified
    assert context.infer_shapes() == ["x"]
    with pytest.raises(EngineError, match="before it is set"):
        context.get_tensor_shape("x")
    with pytest.raises(EngineError, match=r"before the inputs \['x'\] are set"):
        context.get_tensor_shape("y")
    bind(context, x=torch.randn(2, 4), y=torch.empty(2, 4))
    with pytest.raises(EngineError, match=r"run before the inputs \['x'\] are set"):
        context.execute_async_v3(0)
    with pytest.raises(EngineError, match=r"before the inputs \['x'\] are set"):
        context.update_device_memory_size_for_shapes()


@pytest.mark.parametrize("name", ["x", "y"])
def test_every_tensor_needs_an_address(name: str) -> None:
    context, _, _ = ready()
    run(context, CPU)
    context.set_tensor_address(name, 0)
    assert context.get_tensor_address(name) == 0
    with pytest.raises(EngineError, match=f"'{name}' has no address"):
        context.execute_async_v3(0)


def test_addresses_must_be_aligned(device: torch.device) -> None:
    context = doubling(device=device).create_execution_context()
    memory = torch.zeros(4096, dtype=torch.uint8, device=device)
    step = 256 if device.type == "cuda" else 64
    assert memory.data_ptr() % step == 0
    context.set_tensor_address("x", memory.data_ptr() + step)
    for offset in (4, step // 2):
        with pytest.raises(EngineError, match=f"not aligned to {step} bytes"):
            context.set_tensor_address("x", memory.data_ptr() + offset)
    with pytest.raises(EngineError, match="no tensor 'z'"):
        context.set_tensor_address("z", memory.data_ptr())


def test_host_tensors_need_no_more_than_whole_elements() -> None:
    context = reshaping().create_execution_context()
    memory = torch.zeros(64, dtype=torch.uint8)
    context.set_tensor_address("d", memory.data_ptr() + 8)
    with pytest.raises(EngineError, match="not aligned to 8 bytes"):
        context.set_tensor_address("d", memory.data_ptr() + 4)


@pytest.mark.cuda
def test_tensors_must_be_on_the_right_side() -> None:
    context = reshaping(torch.device("cuda")).create_execution_context()
    host, gpu = torch.zeros(1024, dtype=torch.uint8), torch.zeros(1024, dtype=torch.uint8, device="cuda")
    aligned = host.data_ptr() + -host.data_ptr() % 256
    with pytest.raises(EngineError, match="'x' must be on the GPU"):
        context.set_tensor_address("x", aligned)
    with pytest.raises(EngineError, match="'d' must be on the host"):
        context.set_tensor_address("d", gpu.data_ptr())
    with pytest.raises(EngineError, match="the device memory must be on the GPU"):
        reshaping(torch.device("cuda")).create_execution_context(USER_MANAGED).set_device_memory(aligned, 256)


def test_memory_must_not_overlap() -> None:
    context, x, _ = ready()
    context.set_tensor_address("y", x.data_ptr())
    with pytest.raises(EngineError, match="'x' and of 'y' overlaps"):
        context.execute_async_v3(0)
    memory = torch.zeros(64)
    context.set_input_shape("x", (8, 4))
    context.set_tensor_address("x", memory.data_ptr())
    context.set_tensor_address("y", memory.data_ptr() + 64)
    with pytest.raises(EngineError, match="overlaps"):
        context.execute_async_v3(0)
    context.set_tensor_address("y", memory.data_ptr() + 128)
    run(context, CPU)


def test_inputs_may_share_memory() -> None:
    net = Net()
    a, b = net.input("a", (4,)), net.input("b", (4,))
    net.mark(net.raw.add_elementwise(a, b, trt.ElementWiseOperation.SUM).get_output(0))
    context = ReferenceEngine(net.raw, device=CPU).create_execution_context()
    x, y = torch.randn(4), torch.empty(4)
    bind(context, a=x, b=x, y=y)
    run(context, CPU)
    assert torch.equal(y, 2 * x)


def test_a_cpu_engine_has_no_streams() -> None:
    context, _, _ = ready()
    with pytest.raises(EngineError, match="the engine runs on the CPU"):
        context.execute_async_v3(123)


def test_two_threads_must_not_use_one_context_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context, _, y = ready()
    inside, go_on = threading.Event(), threading.Event()
    evaluator = context.engine.evaluator

    def slow(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inside.set()
        go_on.wait(10)
        return evaluator(inputs)

    monkeypatch.setattr(context.engine, "evaluator", Slow(evaluator, slow))
    thread = threading.Thread(target=context.execute_async_v3, args=(0,))
    thread.start()
    assert inside.wait(10)
    breaches: list[Callable[[], Any]] = [
        lambda: context.execute_async_v3(0),
        lambda: context.set_input_shape("x", (2, 4)),
        lambda: context.set_tensor_address("y", y.data_ptr()),
        lambda: context.get_tensor_shape("y"),
        lambda: context.infer_shapes(),
    ]
    for breach in breaches:
        with pytest.raises(EngineError, match="two threads use one execution context at once"):
            breach()
    go_on.set()
    thread.join()
    assert context.execute_async_v3(0)  # one after the other is fine


class Slow:
    """An evaluator whose calls go through a function."""

    def __init__(self, evaluator: Any, call: Callable[..., Any]) -> None:
        self.inputs, self.outputs, self.shapes, self.call = evaluator.inputs, evaluator.outputs, evaluator.shapes, call

    def __call__(self, inputs: dict[str, Tensor], report: object = None) -> Any:
        return self.call(inputs)


def test_contexts_of_one_engine_run_side_by_side() -> None:
    engine = doubling()

    def work(seed: int) -> None:
        context = engine.create_execution_context()
        for _ in range(50):
            x = torch.full((1 + seed % 8, 4), float(seed))
            y = torch.empty_like(x)
            context.set_input_shape("x", x.shape)
            bind(context, x=x, y=y)
            context.execute_async_v3(0)
            assert torch.equal(y, 2 * x)

    in_threads(6, work)


# Scratch memory


def test_scratch_memory_grows_with_the_shapes() -> None:
    engine = doubling()
    context = engine.create_execution_context(USER_MANAGED)
    context.set_input_shape("x", (1, 4))
    small = context.update_device_memory_size_for_shapes()
    context.set_input_shape("x", (8, 4))
    assert 0 < small <= context.update_device_memory_size_for_shapes() <= engine.device_memory_size_v2
    assert engine.get_device_memory_size_for_profile_v2(0) == engine.device_memory_size_v2


def test_user_managed_memory_must_be_there(device: torch.device) -> None:
    engine = doubling(device=device)
    x, y = torch.randn(2, 4, device=device), torch.empty(2, 4, device=device)
    context = engine.create_execution_context(USER_MANAGED)
    context.set_input_shape("x", (2, 4))
    bind(context, x=x, y=y)
    with pytest.raises(EngineError, match="has no device memory"):
        context.execute_async_v3(stream_of(device))
    memory = torch.zeros(engine.device_memory_size_v2 + 256, dtype=torch.uint8, device=device)
    context.set_device_memory(memory.data_ptr(), engine.device_memory_size_v2 - 1)
    with pytest.raises(EngineError, match="are needed"):
        context.execute_async_v3(stream_of(device))
    with pytest.raises(EngineError, match="not aligned"):
        context.set_device_memory(memory.data_ptr() + 8, memory.numel() - 8)
    context.set_device_memory(memory.data_ptr(), memory.numel())
    run(context, device)
    assert torch.equal(y, 2 * x)
    context.set_device_memory(0, 0)  # given back
    with pytest.raises(EngineError, match="has no device memory"):
        context.execute_async_v3(stream_of(device))


def test_scratch_memory_does_not_keep_what_was_there(device: torch.device) -> None:
    """As with a real engine, what lives in the scratch memory by mistake is lost."""
    engine = doubling(device=device)
    context = engine.create_execution_context(USER_MANAGED)
    memory = torch.zeros(engine.device_memory_size_v2, dtype=torch.uint8, device=device)
    x, y = torch.randn(2, 4, device=device), torch.empty(2, 4, device=device)
    context.set_input_shape("x", (2, 4))
    bind(context, x=x, y=y)
    context.set_device_memory(memory.data_ptr(), memory.numel())
    run(context, device)
    assert bool((memory != 0).all())
    context.set_tensor_address("y", memory.data_ptr())
    with pytest.raises(EngineError, match="'the device memory' and of 'y' overlaps"):
        context.execute_async_v3(stream_of(device))


def test_memory_sized_for_the_shapes_is_enough_for_them_only() -> None:
    net = Net()
    x = net.input("x", (-1, 4096))
    net.mark(net.raw.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    engine = ReferenceEngine(net.raw, [{"x": ((1, 4096), (2, 4096), (8, 4096))}], device=CPU)
    context = engine.create_execution_context(USER_MANAGED)
    data, y = torch.randn(8, 4096), torch.empty(8, 4096)
    bind(context, x=data, y=y)
    context.set_input_shape("x", (1, 4096))
    size = context.update_device_memory_size_for_shapes()
    assert size < engine.device_memory_size_v2
    memory = torch.zeros(size, dtype=torch.uint8)
    context.set_device_memory(memory.data_ptr(), size)
    run(context, CPU)
    context.set_input_shape("x", (8, 4096))  # larger, and the size not asked for anew
    with pytest.raises(EngineError, match="are needed"):
        context.execute_async_v3(0)


def test_only_a_user_managed_context_takes_memory() -> None:
    context, _, _ = ready()
    memory = torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(EngineError, match="manages its own"):
        context.set_device_memory(memory.data_ptr(), 4096)


def test_the_strategy_can_come_in_a_runtime_config() -> None:
    engine = doubling()
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(USER_MANAGED)
    assert engine.create_execution_context(runtime_config=config).user_managed
    assert engine.create_execution_context(config).user_managed
    assert not engine.create_execution_context(engine.create_runtime_config()).user_managed
    assert not engine.create_execution_context().user_managed


def test_memory_is_never_read_before_the_run() -> None:
    """Addresses are only remembered: setting one that is never used touches nothing."""
    context, x, y = ready()
    page = ctypes.addressof(ctypes.create_string_buffer(1)) // 4096 * 4096 + (1 << 46)
    context.set_tensor_address("x", page - page % 256)
    context.set_tensor_address("x", x.data_ptr())
    run(context, CPU)
    assert torch.equal(y, 2 * x)


def test_names_are_those_of_tensorrt() -> None:
    """The stand-in has no method or attribute of TensorRT's kind that TensorRT lacks."""
    own = {"get_device_memory_size_for_profile_v2"}
    for stand_in, real in (
        (doubling(), trt.ICudaEngine),
        (doubling().create_execution_context(), trt.IExecutionContext),
        (ReferenceRuntime(), trt.Runtime),
        (doubling().create_runtime_config(), trt.IRuntimeConfig),
    ):
        names = {name for name in dir(stand_in) if name.startswith(("get_", "set_", "create_", "num_", "execute_"))}
        names |= {
            name for name in dir(stand_in) if name.startswith(("infer_", "update_", "is_shape", "all_", "device_m"))
        }
        assert names - own <= set(dir(real)), real


def test_the_result_is_the_evaluators(device: torch.device) -> None:
    net = Net()
    x = net.input("x", (-1, 6))
    layer = net.raw.add_softmax(net.raw.add_unary(x, trt.UnaryOperation.SIN).get_output(0))
    layer.axes = 2
    net.mark(layer.get_output(0))
    context = ReferenceEngine(net.raw, [{"x": ((1, 6), (1, 6), (9, 6))}], device=device).create_execution_context()
    data, y = torch.randn(7, 6, device=device), torch.empty(7, 6, device=device)
    context.set_input_shape("x", trt.Dims((7, 6)))
    bind(context, x=data, y=y)
    run(context, device)
    assert torch.equal(y, evaluate(net.raw, {"x": data})["y"])


def test_the_callers_modes_change_nothing() -> None:
    """Autocast, gradients, torch's default dtype and device are the caller's; an engine knows nothing of them."""
    net = Net()
    x, w = net.input("x", (8, 8)), net.input("w", (8, 8))
    none = trt.MatrixOperation.NONE
    product = net.raw.add_matrix_multiply(x, none, w, none).get_output(0)
    pooled = net.raw.add_shuffle(product)
    pooled.reshape_dims = (1, 1, 8, 8)
    layer = net.raw.add_pooling_nd(pooled.get_output(0), trt.PoolingType.AVERAGE, (3, 3))
    layer.padding_nd = (1, 1)
    sizes = net.raw.add_cast(net.raw.add_shape(layer.get_output(0)).get_output(0), trt.DataType.FLOAT).get_output(0)
    line = net.raw.add_fill((0,), trt.FillOperation.LINSPACE, trt.DataType.FLOAT)
    line.set_input(0, net.raw.add_slice(net.raw.add_shape(x).get_output(0), (0,), (1,), (1,)).get_output(0))
    net.mark(layer.get_output(0))
    net.mark(sizes, "sizes")
    net.mark(line.get_output(0), "line")
    a, b = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    want = evaluate(net.raw, {"x": a.detach(), "w": b})
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            have = evaluate(net.raw, {"x": a, "w": b})
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in want.items():
        assert have[name].device == CPU
        assert not have[name].requires_grad
        assert torch.equal(have[name], value), name


@pytest.mark.cuda
def test_work_is_enqueued_on_the_given_stream() -> None:
    """The host does not wait: the run is over long before a stream that is kept busy gets to it."""
    gpu = torch.device("cuda")
    context = doubling((4096, 4), [{}], device=gpu).create_execution_context()
    x, y = torch.randn(4096, 4, device=gpu), torch.zeros(4096, 4, device=gpu)
    bind(context, x=x, y=y)
    context.execute_async_v3(stream_of(gpu))
    torch.cuda.synchronize()
    y.zero_()
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    context.execute_async_v3(stream.cuda_stream)
    assert not stream.query()
    assert bool((y == 0).all())
    stream.synchronize()
    assert torch.equal(y, 2 * x)


def test_the_process_is_left_alone() -> None:
    """No global setting of torch is changed by a run."""
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ))
    context, _, _ = ready()
    run(context, CPU)
    assert before == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ))
