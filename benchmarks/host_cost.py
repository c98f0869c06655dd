"""What a call through the backend costs the host, over a backend that does nothing.

With execution contexts that compute nothing: what remains is Dynamo's guards, AOTAutograd's wrapper and our own work.
One thread asks for one answer after the other; times are the host's, and the GPU is idle meanwhile but for what each
way must do on it. Beside ours, on a GPU: torch's `cudagraphs` backend and Inductor, which do compute: on models so
small that the GPU is no bottleneck. Also times the weight check alone.

Usage: python -m benchmarks.host_cost [check | model NAME ... | segments ...]
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.models import MODELS
from trt_dynamo.runtime.calls import Call
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.weights import Check, WeightSet

SIZES: dict[str, dict[str, int]] = {
    "resnet50": {},
    "bert": {"hidden": 64, "length": 8},
}
SEGMENTS = (1, 3, 10)
# The operation in eager between two segments.
BETWEEN = torch.ops.aten.erf.default


class IdleContext:
    """An execution context that takes every call and computes nothing."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.set_input_shape = context.set_input_shape
        self.get_tensor_shape = context.get_tensor_shape
        self.update_device_memory_size_for_shapes = context.update_device_memory_size_for_shapes

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        pass

    def execute_async_v3(self, stream: int) -> bool:
        return True


class Chain(nn.Module):
    """Linear layers with an operation in eager between each two segments."""

    def __init__(self, segments: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * segments))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = second(first(x).relu())
            if second is not self.layers[-1]:
                x = x.erf()
        return x


def microseconds(function: Callable[[], Any], repeats: int = 300, calls: int = 20) -> float:
    """The least time of a call among the repeats, which are short: other work of the machine falls into some of them
    only. The GPU is waited for after each, and not counted.
    """
    for _ in range(50):
        function()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - started) / calls)
    return min(times) * 1e6


def nothing(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiled graph that returns tensors made once, and runs what stays in eager between two segments, if there are
    any: that is no cost of ours.
    """
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    results = [made_as(node) for node in output.args[0]]
    eager = [made_as(node) for node in module.graph.nodes if node.target is BETWEEN]

    def call(*args: Any) -> list[Tensor]:
        for tensor in eager:
            BETWEEN(tensor)
        return list(results)

    return make_boxed_func(call)


def made_as(node: torch.fx.Node) -> Tensor:
    value = node.meta["val"]
    with unset_fake_temporarily():
        return torch.full(tuple(value.shape), 0.5, dtype=value.dtype, device=value.device)


# On the CPU the caller's own thread reads the weights, which would be all that is seen.
WAYS: dict[str, dict[str, Any]] = {
    "always": {},
    "observed": {"weights_check": "observed"},
    "frozen": {"weights": "frozen"},
    "inputs": {"weights": "inputs"},
    "auto graphs": {"weights": "frozen", "cuda_graphs": "auto"},
    "whole graph": {"weights": "frozen", "cuda_graphs": "whole"},
}
FIXED: dict[str, Any] = {"runtime": "reference", "cache": "off", "strict": True, "min_segment_nodes": 1}
RIVALS: dict[str, dict[str, Any]] = {
    "cudagraphs": {"backend": "cudagraphs"},
    "inductor": {"backend": "inductor"},
    "reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
}


def cost(model: nn.Module, args: tuple[Any, ...], **keywords: Any) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(model, **keywords)
    with torch.no_grad():
        return microseconds(lambda: compiled(*args))


def measure(name: str, model: nn.Module, args: tuple[Any, ...], device: str, **options: Any) -> None:
    model, args = model.to(device).eval(), tuple(arg.to(device) for arg in args)
    tensors = sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers())
    floor = floor_of(model, args)
    costs: dict[str, float] = {}
    for way, chosen in WAYS.items():
        if device == "cpu" and (way == "always" or "cuda_graphs" in chosen):
            continue
        with idle_contexts():
            costs[way] = cost(model, args, backend="tensorrt", options={**FIXED, **chosen, **options})
    if device == "cuda":
        costs |= {rival: cost(model, args, **way) for rival, way in RIVALS.items()}
    # A process grows slower as it grows: what costs nothing is timed at both ends.
    floor = (floor + floor_of(model, args)) / 2
    told = ", ".join(f"{way} {each - floor:+.1f}" for way, each in costs.items())
    print(f"{name} on {device}: {tensors} weights; no-op backend {floor:.1f} us; over it: {told}", flush=True)


def floor_of(model: nn.Module, args: tuple[Any, ...]) -> float:
    return cost(model, args, backend=aot_autograd(fw_compiler=nothing, inference_compiler=nothing))


@contextlib.contextmanager
def idle_contexts() -> Iterator[None]:
    """Engines whose execution contexts compute nothing."""
    original = Engine.make_call

    def make_call(self: Engine, stream: int, profile: int) -> Call:
        call = original(self, stream, profile)
        call.context = IdleContext(call.context)
        return call

    Engine.make_call = make_call  # type: ignore[method-assign]
    yield
    Engine.make_call = original  # type: ignore[method-assign]


def measure_check(count: int, check: Check) -> None:
    """The whole look at the weights of a call: which slot, the begin before the engine, the answer after it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = tuple(torch.nn.Parameter(torch.randn(4, device=device)) for _ in range(count))
    weights = WeightSet(tensors, check)
    likely = {id(tensors[0]): weights.snapshot}

    def look() -> bool:
        held = likely[id(tensors[0])]
        held.begin()
        return held.holds(tensors)

    assert look()
    print(f"check of {count} weights, {check}, on {device}: {microseconds(look):.1f} us", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}; the least of 300 repeats of 20 calls")
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    if what in ("all", "check"):
        for count in (20, 200, 2000):
            for check in get_args(Check):
                measure_check(count, check)
    if what in ("all", "model"):
        for name in sys.argv[2:] or SIZES:
            measure(name, *MODELS[name](**SIZES.get(name, {})), device)
    if what in ("all", "segments"):
        for count in map(int, sys.argv[2:] or SEGMENTS):
            measure(f"{count} segments", Chain(count), (torch.randn(8, 64),), device, eager_ops="aten.erf")


if __name__ == "__main__":
    main()
