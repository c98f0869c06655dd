"""New weights for an engine that is there, read from where torch keeps them.

Comes in: an engine, what its manifest says of its weights, then the segment's weights. Goes out: nothing; the engine
computes with them from then on, in the order of the stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo import log as tensorrt_log
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime.streams import torch_stream
from trt_dynamo.trt import to_trt, trt

# Addresses on the device are given aligned as those of inputs; on the host an element's own size is enough.
CUDA_ALIGNMENT = 256

SMALL = (torch.float16, torch.bfloat16)

MakeRefitter = Callable[[Any, Any], Any]  # the engine and a logger


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight as the manifest states it. The engine holds a tensor of `shape` and `dtype` as elements of the dtype
    `stored`, dense and row-major. One that is not `needed` reaches no result.
    """

    name: str
    index: int
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]
    needed: bool

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Weight:
        return cls(
            name=entry["name"],
            index=entry["index"],
            dtype=getattr(torch, entry["dtype"]),
            stored=getattr(torch, entry["stored"]),
            shape=tuple(entry["shape"]),
            needed=entry["needed"],
        )

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Refit:
    """Replaces the weights of one engine.

    Args:
        raw: an `ICudaEngine`, or the stand-in.
        refitter_factory: makes its refitter of the engine and a logger: `trt.Refitter`, or the stand-in's.
        bindings: the engine's weights, as its manifest states them.
        device: where the engine runs.

    Raises:
        EngineError: the engine cannot be refitted, or knows other weights than the manifest.
    """

    def __init__(
        self, raw: Any, refitter_factory: MakeRefitter, bindings: Sequence[Weight], device: torch.device
    ) -> None:
        self.device = device
        with tensorrt_log.collected() as errors:
            try:
                self.refitter: trt.Refitter = refitter_factory(raw, tensorrt_log.logger())
            except TypeError as error:  # how the binding says that TensorRT made none
                raise refused("TensorRT made no refitter", [*errors, str(error)]) from error
        # The network is strongly typed, so a refit converts nothing, which is what TensorRT would look over.
        self.refitter.weights_validation = False
        known = set(self.refitter.get_all_weights())
        self.check_names(known, bindings)
        self.bindings = [weight for weight in bindings if weight.name in known]
        for weight in self.bindings:
            self.check_prototype(weight)

    def check_names(self, known: set[str], bindings: Sequence[Weight]) -> None:
        """TensorRT may have dropped a weight that reaches no result. One that does must be there, for its change would
        change nothing (11.3 loses biases of matrix products so, says NVIDIA); and the engine must have none that
        nobody supplies, for it would keep its old values.
        """
        lost = [weight.name for weight in bindings if weight.needed and weight.name not in known]
        if lost:
            raise EngineError(f"the engine cannot replace the weights {', '.join(lost)}")
        foreign = known - {weight.name for weight in bindings}
        if foreign:
            raise EngineError(f"the engine has weights that the segment lacks: {', '.join(sorted(foreign))}")

    def check_prototype(self, weight: Weight) -> None:
        prototype = self.refitter.get_weights_prototype(weight.name)
        if prototype.dtype != to_trt(weight.stored) or prototype.size != weight.count:
            raise EngineError(
                f"the engine holds {weight.name} as {prototype.size} elements of {prototype.dtype.name}, "
                f"the segment as {weight.count} of {to_trt(weight.stored).name}"
            )

    def apply(self, tensors: Sequence[torch.Tensor], stream: int) -> None:
        """Replaces all weights, in the order of the stream (a handle; 0 on the CPU). The stream must come after all
        writes to the tensors, and the engine must have no work on other streams.

        Args:
            tensors: the segment's weights, in its order. Dense ones of the stored dtype are read where they are.

        Raises:
            EngineError: a tensor does not fit, or TensorRT refused. The engine may then hold some of the new weights.
        """
        with self.on_stream(stream), tensorrt_log.collected() as errors:
            sources = [self.source(weight, tensors[weight.index]) for weight in self.bindings]
            self.check_range(sources, tensors)
            for weight, source in zip(self.bindings, sources, strict=True):
                if not self.refitter.set_named_weights(weight.name, *located(source)):
                    raise refused(f"TensorRT refused the weights {weight.name}", errors)
            missing = self.refitter.get_missing_weights()
            if missing:
                raise EngineError(f"the engine misses the weights {', '.join(missing)}")
            if not self.refitter.refit_cuda_engine_async(stream):
                raise refused("TensorRT could not refit the engine", errors)
            self.keep(sources, stream)

    def on_stream(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """Copies run on the refit's stream, so that their memory is not reused before the refit has read it."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch_stream(stream, self.device))

    def source(self, weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the engine holds it: the parameter's own memory if that fits, else a copy on its device."""
        if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
            raise EngineError(
                f"{weight.name} is {list(tensor.shape)} {tensor.dtype}, the engine was built for "
                f"{list(weight.shape)} {weight.dtype}"
            )
        found = tensor.detach().resolve_neg().to(weight.stored).contiguous()
        if found.is_cuda and found.device != self.device:
            found = found.to(self.device)
        if found.data_ptr() % (CUDA_ALIGNMENT if found.is_cuda else found.element_size()):
            found = found.clone()
        return found

    def check_range(self, sources: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
        """A weight that the engine holds in a smaller type may have grown beyond what that type can hold."""
        lost = [
            (source.isinf() & tensors[weight.index].isfinite()).any()
            for weight, source in zip(self.bindings, sources, strict=True)
            if weight.stored in SMALL and weight.dtype is torch.float32
        ]
        if lost and bool(torch.stack([each.to(lost[0].device) for each in lost]).any()):
            raise EngineError("a weight is larger than the type that the engine holds it in")

    def keep(self, sources: Sequence[torch.Tensor], stream: int) -> None:
        """Memory on the device that its owner frees now must not be reused before the refit has read it."""
        if self.device.type == "cuda":
            reader = torch_stream(stream, self.device)
            for source in sources:
                if source.is_cuda:
                    source.record_stream(reader)


def located(tensor: torch.Tensor) -> tuple[trt.Weights, trt.TensorLocation]:
    """A dense tensor as TensorRT takes it: its weights, and on which side they are."""
    weights = trt.Weights(to_trt(tensor.dtype), tensor.data_ptr(), tensor.numel())
    return weights, trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST


def refused(what: str, errors: Sequence[str]) -> EngineError:
    """What happened, with TensorRT's own words."""
    reasons = "; ".join(dict.fromkeys(map(tensorrt_log.first_line, errors)))
    return EngineError(f"{what}: {reasons or 'it gave no reason'}")
