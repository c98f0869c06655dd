"""What a call through the backend costs the host, over a backend that does nothing.

With an execution context that computes nothing, on a GPU where there is one: what remains is Dynamo's guards,
AOTAutograd's wrapper and our own work. Also times the weight check alone.

Usage: python -m benchmarks.host_cost [model ...]
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from benchmarks.models import MODELS
from trt_dynamo.runtime.engine import Engine
from trt_dynamo.runtime.slots import Slot
from trt_dynamo.weights import Check, WeightSet

SIZES: dict[str, dict[str, int]] = {
    "resnet50": {},
    "bert": {"hidden": 64, "length": 8},
}


class IdleContext:
    """An execution context that takes every call and computes nothing."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.set_input_shape = context.set_input_shape
        self.get_tensor_shape = context.get_tensor_shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        return True


def microseconds(function: Callable[[], Any], repeats: int = 15, calls: int = 200) -> float:
    """The least time of a call among the repeats."""
    for _ in range(20):
        function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - started) / calls)
    return min(times) * 1e6


def nothing(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiled graph that returns tensors made once."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    values = [node.meta["val"] for node in output.args[0]]
    results = [torch.empty(tuple(v.shape), dtype=v.dtype, device=v.device) for v in values]
    return make_boxed_func(lambda *args: list(results))


# On the CPU the caller's own thread reads the weights, which would be all that is seen.
WAYS: dict[str, dict[str, Any]] = {
    "always": {},
    "observed": {"weights_check": "observed"},
    "frozen": {"weights": "frozen"},
    "inputs": {"weights": "inputs"},
}


def measure(name: str, device: str) -> None:
    model, args = MODELS[name](**SIZES.get(name, {}))
    model, args = model.to(device), tuple(arg.to(device) for arg in args)
    tensors = sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers())
    idle = torch.compile(model, backend=aot_autograd(fw_compiler=nothing, inference_compiler=nothing))
    with torch.no_grad():
        floor = microseconds(lambda: idle(*args))
    costs = []
    fixed: dict[str, Any] = {"runtime": "reference", "cache": "off", "strict": True, "min_segment_nodes": 1}
    for way, options in WAYS.items():
        if way == "always" and device == "cpu":
            continue
        torch._dynamo.reset()
        ours = torch.compile(model, backend="tensorrt", options={**fixed, **options})
        with torch.no_grad(), idle_contexts():
            cost = microseconds(lambda run=ours: run(*args))  # type: ignore[misc]
        costs.append(f"{way} {cost - floor:+.1f}")
    print(f"{name} on {device}: {tensors} weights; no-op backend {floor:.1f} us; ours, over it: {', '.join(costs)}")


@contextlib.contextmanager
def idle_contexts() -> Iterator[None]:
    """Engines whose execution contexts compute nothing."""
    original = Engine.take

    def take(self: Engine, *args: Any) -> Any:
        call = original(self, *args)
        if not isinstance(call.context, IdleContext):
            call.context = IdleContext(call.context)
        return call

    Engine.take = take  # type: ignore[assignment, method-assign]
    yield
    Engine.take = original  # type: ignore[method-assign]


def measure_check(count: int, check: Check) -> None:
    """The whole look at the weights of a call: the slot's guess, the begin before the engine, the answer after it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.nn.Parameter(torch.randn(4, device=device)) for _ in range(count)]
    weights = WeightSet(tensors, check)
    slot = Slot(weights)
    likely = {id(tensors[0]): slot}

    def look() -> bool:
        found = likely[id(tensors[0])]
        held = weights.snapshot
        found.begin(held)
        return found.holds(held, tensors)

    assert look()
    print(f"check of {count} weights, {check}, on {device}: {microseconds(look):.1f} us")


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; the least of 15 repeats of 200 calls")
    for count in (20, 200, 2000):
        for check in get_args(Check):
            measure_check(count, check)
    for name in sys.argv[1:] or SIZES:
        torch._dynamo.reset()
        measure(name, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
