"""The stand-in engine: it answers as TensorRT does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.stand_in_engines import CPU, Net, bind, caching, doubling, finding, reshaping, run, stream_of
from trt_dynamo.errors import EngineError
from trt_dynamo.log import logger
from trt_dynamo.reference import ReferenceEngine, ReferenceRuntime
from trt_dynamo.trt import trt

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
