"""A stand-in for `Refitter`: replaces the weights of a `ReferenceEngine`, read from raw addresses.

What TensorRT answers with False and a message, this answers so too. What TensorRT leaves undefined (memory on the wrong
side or not aligned, an engine at work on another thread) is an `EngineError`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trt_dynamo.errors import EngineError
from trt_dynamo.log import record
from trt_dynamo.reference.layer import STORAGE
from trt_dynamo.reference.memory import check_alignment, check_side, on_stream, tensor_at
from trt_dynamo.reference.steps import CPU
from trt_dynamo.trt import trt

if TYPE_CHECKING:
    from trt_dynamo.reference.engine import ReferenceEngine


class NamedConstant(Protocol):
    """A weight that can be replaced: the name that the network gave it, and its constant layer's."""

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> str: ...


@dataclass(frozen=True)
class Replaceable:
    """A constant of an engine: its layer, its tensor, its `trt.DataType`, its number of elements."""

    layer: str
    tensor: str
    dtype: Any
    count: int


class RawWeights(ctypes.Structure):
    """TensorRT's `Weights`, as they lie in memory: Python can read the address back for some dtypes only."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def address_of(weights: Any) -> int:
    """The address that a `trt.Weights` was made with; 0 for null."""
    held = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    raw = RawWeights.from_address(int(held or 0))
    if raw.type != int(weights.dtype) or raw.count != weights.size:
        raise EngineError("trt.Weights lie in memory in another way than the stand-in knows")
    return int(raw.values or 0)


class ReferenceRefitter:
    """`Refitter` of a `ReferenceEngine` that was made with `weights`.

    Raises:
        TypeError: the engine cannot be refitted (which is how the binding says that TensorRT made no refitter).
    """

    def __init__(self, engine: ReferenceEngine, logger: Any) -> None:
        if not engine.refittable:
            record("ERROR", "createInferRefitter: the engine was not built with REFIT")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.engine = engine
        self.logger = logger
        self.error_recorder: Any = None
        self.max_threads = 1
        self.weights_validation = True
        self.given: dict[str, tuple[Any, int, Any]] = {}  # name to the weights, their address and location

    def get_all_weights(self) -> list[str]:
        return [*self.engine.weights]

    def get_all(self) -> tuple[list[str], list[Any]]:
        """Layers and roles: of weights that have names, the constants that hold them."""
        layers = [weight.layer for weight in self.engine.weights.values()]
        return layers, [trt.WeightsRole.CONSTANT] * len(layers)

    def get_missing_weights(self) -> list[str]:
        """All that have not been set. TensorRT names only those that it combined with one that has been."""
        return [name for name in self.engine.weights if name not in self.given]

    def get_missing(self) -> tuple[list[str], list[Any]]:
        layers = [self.engine.weights[name].layer for name in self.get_missing_weights()]
        return layers, [trt.WeightsRole.CONSTANT] * len(layers)

    def get_weights_prototype(self, weights_name: str) -> Any:
        """Weights without values, of the dtype and size that must be given; of size -1 for an unknown name."""
        weight = self.engine.weights.get(weights_name)
        return trt.Weights(trt.DataType.FLOAT, 0, -1) if weight is None else trt.Weights(weight.dtype, 0, weight.count)

    def get_named_weights(self, weights_name: str) -> Any:
        if weights_name not in self.given:
            record("ERROR", f"getNamedWeights: the weights {weights_name!r} were never set")
            return trt.Weights(trt.DataType.FLOAT, 0, 0)
        return self.given[weights_name][0]

    def get_weights_location(self, weights_name: str) -> Any:
        if weights_name not in self.given:
            record("ERROR", f"getWeightsLocation: the weights {weights_name!r} were never set")
            return trt.TensorLocation.HOST
        return self.given[weights_name][2]

    def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
        """Remembers where the new values are: they are read by each refit, not now.

        Raises:
            EngineError: null, misaligned, or memory of the other side.
        """
        refusal = self.why_refused(name, weights)
        if refusal is not None:
            record("ERROR", f"setNamedWeights: {refusal}")
            return False
        location = trt.TensorLocation.HOST if location is None else location
        address, what = address_of(weights), f"the weights {name!r}"
        host = location == trt.TensorLocation.HOST
        if not address:
            raise EngineError(f"{what} are given without memory")
        check_alignment(what, address, self.engine.device, STORAGE[weights.dtype.name].itemsize, host)
        if not host and self.engine.device.type != "cuda":
            raise EngineError(f"{what} are said to be on a GPU; the engine runs on the CPU")
        check_side(what, address, self.engine.device, host)
        self.given[name] = (weights, address, location)
        return True

    def set_weights(self, layer_name: str, role: Any, weights: Any) -> bool:
        """The same by layer, for weights on the host."""
        names = {weight.layer: name for name, weight in self.engine.weights.items()}
        if layer_name not in names or role != trt.WeightsRole.CONSTANT:
            record("ERROR", f"setWeights: the layer {layer_name!r} has no refittable weights of this role")
            return False
        return self.set_named_weights(names[layer_name], weights)

    def why_refused(self, name: str, weights: Any) -> str | None:
        wanted = self.engine.weights.get(name)
        if wanted is None:
            return f"the engine has no refittable weights {name!r}"
        if weights.dtype != wanted.dtype:
            return f"the weights {name!r} are {weights.dtype.name}, their prototype is {wanted.dtype.name}"
        if weights.size != wanted.count:
            return f"the weights {name!r} have {weights.size} elements, their prototype has {wanted.count}"
        return None

    def unset_named_weights(self, weights_name: str) -> bool:
        return self.given.pop(weights_name, None) is not None

    def refit_cuda_engine(self) -> bool:
        """Replaces the weights, and waits until that is done."""
        done = self.refit_cuda_engine_async(0)
        if self.engine.device.type == "cuda":
            torch.cuda.default_stream(self.engine.device).synchronize()
        return done

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        """Copies every weight from where it was said to be, on the stream.

        Raises:
            EngineError: a context of the engine is being executed, or another refitter is at work.
        """
        missing = self.get_missing_weights()
        if missing:
            record("ERROR", f"refitCudaEngine: the weights {', '.join(missing)} are missing")
            return False
        with self.engine.being_refitted(), on_stream(self.engine.device, int(stream_handle)):
            for name, weight in self.engine.weights.items():
                self.engine.evaluator.replace(weight.tensor, self.read(name))
        return True

    def read(self, name: str) -> torch.Tensor:
        """The values as they are in memory now."""
        weights, address, location = self.given[name]
        device = CPU if location == trt.TensorLocation.HOST else self.engine.device
        return tensor_at(address, (weights.size,), STORAGE[weights.dtype.name], device)

    def release_refit_resources(self) -> bool:
        """There are none here. TensorRT makes them again when it needs them."""
        return True


def find_replaceable(network: Any, weights: Sequence[NamedConstant], known: Container[str]) -> dict[str, Replaceable]:
    """The constants of a network behind these weights, by the weights' names; those that reach no result are left out,
    as TensorRT drops them. `known`: the tensors that the results depend on.

    Raises:
        EngineError: two weights of one name, one that the network does not mark as refittable, or no such constant.
    """
    layers = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            layers[layer.name] = layer
    found: dict[str, Replaceable] = {}
    dropped = set()
    for weight in weights:
        if weight.name in found or weight.name in dropped:
            raise EngineError(f"two weights of the engine are called {weight.name!r}")
        if weight.layer not in layers:
            raise EngineError(f"the network has no constant layer {weight.layer!r} for the weights {weight.name!r}")
        if not network.are_weights_marked_refittable(weight.name):
            raise EngineError(f"the network has no weights {weight.name!r} that are marked as refittable")
        tensor = layers[weight.layer].get_output(0)
        if tensor.name in known:
            found[weight.name] = Replaceable(weight.layer, tensor.name, tensor.dtype, math.prod(tensor.shape))
        else:
            dropped.add(weight.name)
    return found
