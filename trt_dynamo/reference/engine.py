"""A stand-in for `ICudaEngine` and `Runtime`: a network behind their interface, run by the reference evaluator.

In: an `INetworkDefinition` and its optimization profiles. Out: objects with TensorRT's method names, which take raw
addresses and a stream as TensorRT does, on the CPU or a GPU, and refuse every breach of TensorRT's contract with
`EngineError`, where TensorRT would return False, or worse.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError
from trt_dynamo.reference.context import ReferenceContext
from trt_dynamo.reference.evaluator import Evaluator, Signature
from trt_dynamo.reference.refit import NamedConstant, find_replaceable
from trt_dynamo.reference.steps import CPU
from trt_dynamo.trt import trt

Dims = tuple[int, ...]
Range = tuple[Dims, Dims, Dims]
Profile = Mapping[str, Sequence[Sequence[int] | int]]

PACKED = ("INT4", "FP4", "E8M0")  # no torch dtype to bind


class ReferenceEngine:
    """A network and its profiles, behind the interface of `ICudaEngine`.

    Args:
        network: an `INetworkDefinition`. It is read here, weights too, and not needed afterwards.
        profiles: for each profile the inputs' (min, opt, max): shapes, or values for shape tensors. Static inputs may
            be left out. None stands for one profile of a network without dynamic inputs.
        constants: see `Evaluator`.
        device: where tensors are bound; by default the current CUDA device if there is one, else the CPU.
        weights: the constants that a `ReferenceRefitter` can replace, by name and layer; the network must mark them.

    Raises:
        Unsupported: the evaluator cannot run the network.
        EngineError: a profile that TensorRT would not build, or weights that the network does not have.
    """

    def __init__(
        self,
        network: Any,
        profiles: Sequence[Profile] | None = None,
        constants: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        weights: Sequence[NamedConstant] = (),
    ) -> None:
        self.name: str = network.name
        self.num_layers: int = network.num_layers
        self.evaluator = Evaluator(network, constants)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tensors: dict[str, Signature] = {**self.evaluator.inputs, **self.evaluator.outputs}
        self.names = [*self.tensors]
        self.aliases = aliased_outputs(network)
        self.profiles = [read_profile(self.evaluator.inputs, profile) for profile in profiles or [{}]]
        self.shape_cache: dict[Any, dict[str, Dims]] = {}
        self.refittable = bool(weights)
        self.weights = find_replaceable(network, weights, self.evaluator.constants[CPU])
        if self.weights:
            self.evaluator.make_replaceable([weight.tensor for weight in self.weights.values()], self.device)
        self.lock = threading.Lock()
        self.runs = 0  # executions that threads are in
        self.changing = False
        for name, tensor in self.tensors.items():
            if tensor.trt_dtype in PACKED:
                raise EngineError(f"the tensor {name!r} is {tensor.trt_dtype}, which the stand-in cannot bind")

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of scratch memory for any profile."""
        return max(self.get_device_memory_size_for_profile_v2(index) for index in range(len(self.profiles)))

    @property
    def streamable_weights_size(self) -> int:
        return 0

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """Around an execution. Any number of threads may be in one, but none while a refit is going on."""
        with self.lock:
            if self.changing:
                raise EngineError("the engine is run while another thread refits it")
            self.runs += 1
        try:
            yield
        finally:
            with self.lock:
                self.runs -= 1

    @contextlib.contextmanager
    def being_refitted(self) -> Iterator[None]:
        """Around a refit, which must have the engine for itself."""
        with self.lock:
            if self.runs or self.changing:
                raise EngineError("the engine is refitted while another thread runs or refits it")
            self.changing = True
        try:
            yield
        finally:
            self.changing = False

    def tensor(self, name: str) -> Signature:
        if name not in self.tensors:
            raise EngineError(f"the engine has no tensor {name!r}; it has {self.names}")
        return self.tensors[name]

    def get_tensor_name(self, index: int) -> str:
        if not 0 <= index < len(self.names):
            raise EngineError(f"the engine has {len(self.names)} tensors, none of index {index}")
        return self.names[index]

    def is_input(self, name: str) -> bool:
        self.tensor(name)
        return name in self.evaluator.inputs

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if self.is_input(name) else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(trt.DataType, self.tensor(name).trt_dtype)

    def get_tensor_shape(self, name: str) -> Any:
        """The dims, -1 for dynamic ones."""
        return trt.Dims(self.tensor(name).shape)

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.HOST if self.tensor(name).host else trt.TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        self.tensor(name), self.profile(profile_index)
        return trt.TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return self.tensor(name).shape_tensor

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """The input whose memory the output `name` must share, or None."""
        self.tensor(name)
        return self.aliases.get(name)

    def profile(self, index: int) -> dict[str, Range]:
        if not 0 <= index < len(self.profiles):
            raise EngineError(f"the engine has {len(self.profiles)} optimization profiles, none of index {index}")
        return self.profiles[index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        """[min, opt, max] dims of an input in a profile."""
        profile = self.profile(profile_index)
        if not self.is_input(name):
            raise EngineError(f"{name!r} is an output and has no profile")
        shape = self.tensor(name).shape
        found = (shape, shape, shape) if self.tensor(name).shape_tensor else profile[name]
        return [trt.Dims(dims) for dims in found]

    def get_tensor_profile_values(self, name: int | str, profile_index: str | int) -> list[list[int]]:
        """[min, opt, max] values of a shape tensor. TensorRT takes the profile's index first, under swapped names."""
        index, tensor = (profile_index, name) if isinstance(name, str) else (name, profile_index)
        if not isinstance(tensor, str) or not isinstance(index, int):
            raise EngineError("get_tensor_profile_values takes the profile's index and the tensor's name")
        profile = self.profile(index)
        if not self.is_input(tensor) or not self.tensor(tensor).shape_tensor:
            raise EngineError(f"{tensor!r} is not a shape tensor among the inputs")
        return [list(values) for values in profile[tensor]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self.scratch_size({name: largest for name, (_, _, largest) in self.profile(profile_index).items()})

    def scratch_size(self, shapes: Mapping[str, Dims]) -> int:
        """Bytes of scratch memory for inputs of these shapes: the inputs' own size, a made-up figure, but never 0."""
        size = 256
        for name, tensor in self.evaluator.inputs.items():
            shape = tensor.shape if tensor.shape_tensor else shapes[name]
            size += -(-math.prod(shape) * tensor.dtype.itemsize // 256) * 256
        return size

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> ReferenceContext:
        """A context. `strategy`: a `trt.ExecutionContextAllocationStrategy` (default STATIC), or a runtime config."""
        config = runtime_config if runtime_config is not None else strategy
        if isinstance(config, ReferenceRuntimeConfig):
            config = config.get_execution_context_allocation_strategy()
        return ReferenceContext(self, "STATIC" if config is None else config.name)

    def create_runtime_config(self) -> ReferenceRuntimeConfig:
        return ReferenceRuntimeConfig()


@dataclass
class ReferenceRuntimeConfig:
    """`IRuntimeConfig`: only the allocation strategy means something here."""

    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy if self.strategy is not None else trt.ExecutionContextAllocationStrategy.STATIC


class ReferenceRuntime:
    """`Runtime`: gives the engine that stands for a plan. A plan holds no network, so each must be made known first."""

    def __init__(self, logger: Any = None) -> None:
        self.logger = logger
        self.engines: dict[bytes, ReferenceEngine] = {}

    def add(self, plan: Any, engine: ReferenceEngine) -> None:
        """From now on `plan` (a buffer) deserializes to `engine`."""
        self.engines[hashlib.sha256(memoryview(plan)).digest()] = engine

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ReferenceEngine | None:
        """The engine of this plan; None for any other bytes, as TensorRT answers what it cannot load."""
        return self.engines.get(hashlib.sha256(memoryview(serialized_engine)).digest())


def read_profile(inputs: Mapping[str, Signature], given: Profile) -> dict[str, Range]:
    """A profile for every input, static ones included.

    Raises:
        EngineError: a dynamic input or shape tensor without a range, or a range that TensorRT refuses.
    """
    unknown = given.keys() - inputs.keys()
    if unknown:
        raise EngineError(f"a profile names {sorted(unknown)}; the inputs are {sorted(inputs)}")
    profile: dict[str, Range] = {}
    for name, tensor in inputs.items():
        if name not in given:
            if tensor.shape_tensor or -1 in tensor.shape:
                raise EngineError(f"the input {name!r} is dynamic and has no profile")
            profile[name] = (tensor.shape, tensor.shape, tensor.shape)
            continue
        low, best, high = ((part,) if isinstance(part, int) else tuple(part) for part in given[name])
        check_range(name, tensor, low, best, high)
        profile[name] = (low, best, high)
    return profile


def check_range(name: str, tensor: Signature, low: Dims, best: Dims, high: Dims) -> None:
    count = math.prod(tensor.shape) if tensor.shape_tensor else len(tensor.shape)
    if not len(low) == len(best) == len(high) == count:
        raise EngineError(f"the profile of {name!r} must have {count} entries each for min, opt and max")
    if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise EngineError(f"the profile of {name!r} must be min <= opt <= max: {low}, {best}, {high}")
    if tensor.shape_tensor:
        return
    for axis, dim in enumerate(tensor.shape):
        if dim != -1 and not low[axis] == dim == high[axis]:
            raise EngineError(f"the profile of {name!r} changes the dim {axis}, which is {dim} in the network")
        if low[axis] < 0:
            raise EngineError(f"the profile of {name!r} has a negative dim: {low}")


def aliased_outputs(network: Any) -> dict[str, str]:
    """Outputs that an engine writes over an input: the caches of KV_CACHE_UPDATE layers."""
    aliases = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if trt.ILayer.type.__get__(layer).name == "KV_CACHE_UPDATE":
            output, cache = layer.get_output(0), layer.get_input(0)
            if output.is_network_output and cache.is_network_input:
                aliases[output.name] = cache.name
    return aliases
