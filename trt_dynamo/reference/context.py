"""A stand-in for `IExecutionContext`. In: shapes, addresses, a stream. Out: results in the bound memory.

TensorRT answers most breaches of its contract with False and a message, some with undefined behaviour; here each is an
`EngineError`, so that a test cannot pass over it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError
from trt_dynamo.reference.evaluator import check_dim_names
from trt_dynamo.reference.memory import check_alignment, check_side, on_stream, tensor_at
from trt_dynamo.reference.steps import CPU
from trt_dynamo.trt import trt

if TYPE_CHECKING:
    from trt_dynamo.reference.engine import ReferenceEngine

Dims = tuple[int, ...]
P = ParamSpec("P")
R = TypeVar("R")

SHAPES_KEPT = 1000
SCRIBBLE = 0xA5  # what scratch memory holds after a run: an engine leaves nothing of what was there


def exclusive(
    method: Callable[Concatenate[ReferenceContext, P], R],
) -> Callable[Concatenate[ReferenceContext, P], R]:
    """A method that no other thread may be in at the same time: a context serves one thread at a time."""

    @functools.wraps(method)
    def guarded(self: ReferenceContext, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.lock.acquire(blocking=False):
            raise EngineError(f"two threads use one execution context at once ({method.__name__})")
        try:
            return method(self, *args, **kwargs)
        finally:
            self.lock.release()

    return guarded  # type: ignore[return-value]


class ReferenceContext:
    """`IExecutionContext` of a `ReferenceEngine`. Made by `ReferenceEngine.create_execution_context`."""

    def __init__(self, engine: ReferenceEngine, strategy: str) -> None:
        self.engine = engine
        self.name = ""
        self.profiler: Any = None  # an `IProfiler`, told how long each layer took
        self.user_managed = strategy == "USER_MANAGED"
        self.lock = threading.RLock()
        self.active_optimization_profile = 0
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.memory = (0, 0)
        self.needed = engine.device_memory_size_v2
        self.checked = False  # whether all is as it should be, since the last call of a setter
        self.shapes: dict[str, Dims] = {}
        self.reset_shapes()

    def reset_shapes(self) -> None:
        self.checked = False
        inputs = self.engine.evaluator.inputs
        self.shapes = {name: tensor.shape for name, tensor in inputs.items() if -1 not in tensor.shape}

    @property
    def all_binding_shapes_specified(self) -> bool:
        return self.shapes.keys() == self.engine.evaluator.inputs.keys()

    @exclusive
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Switches the profile; the inputs' shapes must be set anew."""
        self.engine.profile(profile_index)
        self.active_optimization_profile = profile_index
        self.needed = self.engine.device_memory_size_v2
        self.reset_shapes()
        return True

    @exclusive
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Sets the dims of an input, which must lie in the active profile."""
        tensor = self.engine.tensor(name)
        if not self.engine.is_input(name):
            raise EngineError(f"{name!r} is an output: its shape follows from the inputs")
        wanted = tuple(int(dim) for dim in shape)
        low, _, high = (tensor.shape,) * 3 if tensor.shape_tensor else self.profile[name]
        inside = len(wanted) == len(low) and all(a <= dim <= b for a, dim, b in zip(low, wanted, high, strict=True))
        if not inside:
            raise EngineError(f"the shape {wanted} of {name!r} is outside of the profile: {low} to {high}")
        if self.shapes.get(name) != wanted:
            self.needed = self.engine.device_memory_size_v2
            self.checked = False
        self.shapes[name] = wanted
        return True

    @property
    def profile(self) -> dict[str, tuple[Dims, Dims, Dims]]:
        return self.engine.profiles[self.active_optimization_profile]

    @exclusive
    def get_tensor_shape(self, name: str) -> Any:
        """The dims for the inputs' present shapes; -1 where they depend on values.

        Raises:
            EngineError: an input whose shape is not set, or an output asked for before all inputs' shapes are.
        """
        if self.engine.is_input(name):
            if name not in self.shapes:
                raise EngineError(f"the shape of the input {name!r} is asked for before it is set")
            return trt.Dims(self.shapes[name])
        return trt.Dims(self.output_shapes()[name])

    def output_shapes(self) -> dict[str, Dims]:
        """The outputs' dims by name, worked out once for each set of input shapes and values."""
        missing = self.insufficient()
        if missing:
            raise EngineError(f"output shapes are asked for before the inputs {missing} are set")
        values = {name: tuple(self.values(name).reshape(-1).tolist()) for name in self.shape_inputs()}
        key = (*(self.shapes[name] for name in self.engine.evaluator.inputs), *values.values())
        cache = self.engine.shape_cache
        if key not in cache:
            self.check_shapes()
            if len(cache) >= SHAPES_KEPT:
                cache.clear()
            cache[key] = self.engine.evaluator.shapes({name: self.stand_in(name) for name in self.shapes})
        return cache[key]

    def stand_in(self, name: str) -> Tensor:
        """A tensor of the input's shape, with its values if they decide shapes."""
        tensor = self.engine.tensor(name)
        if tensor.shape_tensor:
            return self.values(name)
        return torch.empty(self.shapes[name], dtype=tensor.dtype, device="meta")

    def shape_inputs(self) -> list[str]:
        return [name for name, tensor in self.engine.evaluator.inputs.items() if tensor.shape_tensor]

    def values(self, name: str) -> Tensor:
        """The values of a shape tensor, as they are in its memory now; they must lie in the profile."""
        tensor = self.engine.tensor(name)
        values = tensor_at(self.addresses[name], self.shapes[name], tensor.dtype, CPU).clone()
        low, _, high = self.profile[name]
        if not all(a <= v <= b for a, v, b in zip(low, values.reshape(-1).tolist(), high, strict=True)):
            raise EngineError(f"the values {values.tolist()} of {name!r} are outside of the profile: {low} to {high}")
        return values

    def check_shapes(self) -> None:
        named: dict[str, int] = {}
        for name, tensor in self.engine.evaluator.inputs.items():
            check_dim_names(name, self.shapes[name], tensor.dim_names, named)

    def insufficient(self) -> list[str]:
        missing = [name for name in self.engine.evaluator.inputs if name not in self.shapes]
        return missing + [name for name in self.shape_inputs() if not self.addresses.get(name)]

    @exclusive
    def infer_shapes(self) -> list[str]:
        """The inputs that are not specified yet; [] once all output shapes are known."""
        missing = self.insufficient()
        if not missing:
            self.output_shapes()
        return missing

    @exclusive
    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Binds memory; 0 unbinds. The memory must stay until the stream has run past the call that uses it."""
        tensor = self.engine.tensor(name)
        address = int(memory)
        if address:
            check_alignment(repr(name), address, self.engine.device, tensor.dtype.itemsize, tensor.host)
            check_side(repr(name), address, self.engine.device, tensor.host)
        self.checked = self.checked and self.addresses.get(name) == address
        self.addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        self.engine.tensor(name)
        return self.addresses.get(name, 0)

    @exclusive
    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        """Lets an `IOutputAllocator` find the memory of an output once its size is known; None unsets it."""
        if self.engine.is_input(name):
            raise EngineError(f"{name!r} is an input and takes no output allocator")
        if output_allocator is None:
            self.allocators.pop(name, None)
        else:
            self.allocators[name] = output_allocator
        self.checked = False
        return True

    def get_output_allocator(self, name: str) -> Any:
        self.engine.tensor(name)
        return self.allocators.get(name)

    def get_max_output_size(self, name: str) -> int:
        """Bytes that an output takes at most for the inputs' present shapes, every element found where their number
        depends on values; -1 before the shapes are set.
        """
        if self.engine.is_input(name) or self.insufficient():
            return -1
        shape = self.output_shapes()[name]
        if -1 in shape:
            given = {name: self.stand_in(name) for name in self.shapes}
            shape = self.engine.evaluator.shapes(given, largest=True)[name]
        return math.prod(shape) * self.engine.tensor(name).dtype.itemsize if -1 not in shape else -1

    @exclusive
    def set_device_memory(self, memory: int, size: int) -> None:
        """Scratch memory for a context made with USER_MANAGED. Its contents are lost with every run."""
        if not self.user_managed:
            raise EngineError("device memory is set on a context that manages its own")
        check_alignment("the device memory", int(memory), self.engine.device, 1, host=False)
        if memory:
            check_side("the device memory", int(memory), self.engine.device, host=False)
        self.memory = (int(memory), int(size))
        self.checked = False

    @exclusive
    def update_device_memory_size_for_shapes(self) -> int:
        """Bytes of scratch memory that the inputs' present shapes need."""
        if not self.all_binding_shapes_specified:
            raise EngineError(f"the memory's size is asked for before the inputs {self.insufficient()} are set")
        self.needed = self.engine.scratch_size(self.shapes)
        self.checked = False
        return self.needed

    @exclusive
    def execute_async_v3(self, stream_handle: int) -> bool:
        """Runs the network on the stream. On the CPU the handle must be 0, and the results are there at once."""
        missing = self.insufficient()
        if missing:
            raise EngineError(f"the engine is run before the inputs {missing} are set")
        if not self.checked or self.shape_inputs():
            self.check_ready(self.output_shapes())
        with self.engine.executing(), on_stream(self.engine.device, int(stream_handle)):
            self.use_scratch()
            inputs = {name: self.bound(name, self.shapes[name]) for name in self.engine.evaluator.inputs}
            report = None if self.profiler is None else self.profiler.report_layer_time
            for name, value in self.engine.evaluator(inputs, report=report).items():
                self.store(name, value, int(stream_handle))
        return True

    def check_ready(self, expected: dict[str, Dims]) -> None:
        """Refuses what TensorRT would refuse, or what would be undefined."""
        for name in self.engine.names:
            if name in self.allocators:
                continue
            if not self.addresses.get(name):
                raise EngineError(f"the tensor {name!r} has no address (an empty tensor needs one too)")
            if -1 in expected.get(name, ()):
                raise EngineError(f"the shape of {name!r} depends on values: it needs an output allocator")
            alias = self.engine.aliases.get(name)
            if alias and self.addresses[name] != self.addresses.get(alias):
                raise EngineError(f"the output {name!r} must be bound to the memory of the input {alias!r}")
        if self.user_managed and self.memory[0] == 0:
            raise EngineError("the context is USER_MANAGED and has no device memory")
        if self.user_managed and self.memory[1] < self.needed:
            raise EngineError(f"the device memory has {self.memory[1]} bytes; {self.needed} are needed")
        self.check_overlaps(expected)
        self.checked = True

    def check_overlaps(self, expected: dict[str, Dims]) -> None:
        """Only inputs may share memory, and an output with the input that it aliases by definition."""
        spans = [(self.memory[0], sum(self.memory), "the device memory")] if self.user_managed else []
        for name, tensor in self.engine.tensors.items():
            size = math.prod(self.shapes[name] if name in self.shapes else expected[name]) * tensor.dtype.itemsize
            if name not in self.allocators and size > 0:
                spans.append((self.addresses[name], self.addresses[name] + size, name))
        inputs, aliases = self.engine.evaluator.inputs, self.engine.aliases
        for (start, end, one), (other_start, other_end, other) in itertools.combinations(spans, 2):
            if end <= other_start or other_end <= start or (one in inputs and other in inputs):
                continue
            if aliases.get(one) != other and aliases.get(other) != one:
                raise EngineError(f"the memory of {one!r} and of {other!r} overlaps")

    def use_scratch(self) -> None:
        """Overwrites the scratch memory, as an engine does: what was kept there, or lives there by mistake, is lost."""
        address, size = self.memory
        if not self.user_managed:
            return
        if self.engine.device.type == "cuda":
            tensor_at(address, (size,), torch.uint8, self.engine.device).fill_(SCRIBBLE)
        else:
            ctypes.memset(address, SCRIBBLE, size)

    def bound(self, name: str, shape: Dims) -> Tensor:
        tensor = self.engine.tensor(name)
        return tensor_at(self.addresses[name], shape, tensor.dtype, CPU if tensor.host else self.engine.device)

    def store(self, name: str, value: Tensor, stream: int) -> None:
        allocator = self.allocators.get(name)
        if allocator is not None:
            self.addresses[name] = allocated(allocator, name, self.addresses.get(name, 0), value, stream)
        self.bound(name, tuple(value.shape)).copy_(value)


def allocated(allocator: Any, name: str, present: int, value: Tensor, stream: int) -> int:
    """The memory that an output allocator finds for `value`; it is asked for a byte at least, also if that is empty."""
    size = max(value.numel() * value.element_size(), 1)
    if hasattr(allocator, "reallocate_output_async"):
        address = allocator.reallocate_output_async(name, present, size, 256, stream)
    else:
        address = allocator.reallocate_output(name, present, size, 256)
    if not address:
        raise EngineError(f"the output allocator of {name!r} gave no memory")
    allocator.notify_shape(name, trt.Dims(tuple(value.shape)))
    return int(address)
