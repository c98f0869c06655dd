"""The stand-in engine refuses every breach of TensorRT's contract, and keeps to its own."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiled import in_threads
from tests.stand_in_engines import CPU, USER_MANAGED, Net, bind, doubling, reshaping, run, stream_of
from trt_dynamo.errors import EngineError
from trt_dynamo.reference import ReferenceContext, ReferenceEngine, ReferenceRuntime, evaluate
from trt_dynamo.trt import trt

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
