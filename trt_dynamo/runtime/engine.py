"""One engine at run time: TensorRT's `ICudaEngine`, or the reference evaluator behind the same methods.

Comes in: a plan and its manifest. Goes out: results for a segment's arguments, or `OutsideProfile`, never a wrong
answer.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo import log as tensorrt_log
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime import layer_times
from trt_dynamo.runtime.gate import Gate
from trt_dynamo.runtime.refit import MakeRefitter, Refit, Weight, torch_stream
from trt_dynamo.runtime.results import FoundResult, found_result
from trt_dynamo.trt import trt

# TensorRT wants addresses aligned to this; torch's own CUDA allocations are, views into them may not be.
CUDA_ALIGNMENT = 256
CPU_ALIGNMENT = 64

# For so many combinations of shapes it is remembered which profile they go to.
SHAPES_KEPT = 1000

Span = tuple[tuple[int, ...], tuple[int, ...]]  # the smallest and largest shape in a profile


class OutsideProfile(EngineError):
    """A shape for which the engine was not built: the segment answers in eager."""


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output as the manifest states it: the engine sees `tensor.permute(order)`, dense and row-major."""

    name: str
    position: int
    dtype: torch.dtype
    order: tuple[int, ...]
    inverse: tuple[int, ...]
    permuted: bool
    size: bool

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Port:
        order = tuple(entry["order"])
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return cls(
            name=entry["name"],
            position=entry["position"],
            dtype=getattr(torch, entry["dtype"]),
            order=order,
            inverse=inverse,
            permuted=order != tuple(range(len(order))),
            size=entry["size"],
        )

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of an argument as the engine sees it; of a size, its value."""
        if self.size:
            return (int(value),)
        return tuple(value.shape[axis] for axis in self.order) if isinstance(value, torch.Tensor) else ()


class Call:
    """An execution context, and the shapes and addresses that it has been given: setters run on change only."""

    def __init__(self, context: Any, profile: int = 0) -> None:
        self.context = context
        self.profile = profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.results: list[tuple[int, ...]] | None = None
        self.addresses: list[int] | None = None  # of the weights that it has been given,
        self.others: list[Port] = []  # and what else each call must give it
        self.found: dict[str, FoundResult] = {}  # the results whose size the engine finds
        # Of a call on the default stream: when its inputs are there, and when the engine is done.
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None


class Engine:
    """A loaded engine. Calls from several threads get contexts of their own."""

    def __init__(
        self,
        raw: Any,
        manifest: Mapping[str, Any],
        device: torch.device,
        owner: Any = None,
        refitter_factory: MakeRefitter | None = None,
    ) -> None:
        self.raw = raw
        self.owner = owner  # what must outlive the engine: its runtime, or the network behind the stand-in
        self.device = device
        names = {raw.get_tensor_name(i) for i in range(raw.num_io_tensors)}
        self.inputs = [port for port in map(Port.read, manifest["inputs"]) if port.name in names]
        self.taken: list[Port] = []  # inputs that are weights
        self.outputs = [Port.read(entry) for entry in manifest["outputs"]]
        missing = [port.name for port in self.outputs if port.name not in names]
        if missing:
            raise EngineError(f"the engine lacks the outputs {', '.join(missing)}: the cache entry does not fit it")
        count = getattr(raw, "num_optimization_profiles", 1)
        self.profiles = [{port.name: self.profile(port, index) for port in self.inputs} for index in range(count)]
        # The first holds all sizes; of the others, the narrowest come first.
        self.narrow = sorted(range(1, count), key=lambda index: width(self.profiles[index].values()))
        self.chosen: dict[tuple[tuple[int, ...], ...], int] = {}
        self.alignment = CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
        self.built_for: Mapping[Any, Any] = {}  # the ranges of sizes
        self.hit = False  # it came from the cache
        self.made_otherwise = ""  # how the cache's engine of the same graph was made otherwise
        self.idle: dict[tuple[int, int], list[Call]] = collections.defaultdict(list)  # by stream and profile
        self.lock = threading.Lock()
        # Holds the place of an empty tensor, whose address would be null.
        self.placeholder = torch.zeros(CUDA_ALIGNMENT, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.default_stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self.index = -1 if self.stream is None else self.stream.device_index
        self.weights = [Weight.read(entry) for entry in manifest.get("weights", [])]
        self.refitter_factory = refitter_factory  # None: TensorRT's own
        self.weights_refit: Refit | None = None
        self.gate = Gate()
        self.refitted: torch.cuda.Event | None = None  # on the device, the end of the last refit
        self.spoiled: str | None = None  # why its weights are in doubt

    def profile(self, port: Port, index: int) -> Span:
        """The smallest and largest shape (value, for a size) that the engine takes in a profile."""
        if port.size:
            spans = self.raw.get_tensor_profile_values(index, port.name)
        else:
            spans = self.raw.get_tensor_profile_shape(port.name, index)
        return tuple(spans[0]), tuple(spans[2])

    def choose(self, args: Sequence[Any]) -> int:
        """The narrowest profile that these arguments fit into; the first where they fit into none."""
        shapes = tuple(port.shape(args[port.position]) for port in self.inputs)
        chosen = self.chosen.get(shapes)
        if chosen is None:
            named = dict(zip((port.name for port in self.inputs), shapes, strict=True))
            fitting = (i for i in self.narrow if all(within(s, self.profiles[i][n]) for n, s in named.items()))
            if len(self.chosen) >= SHAPES_KEPT:
                self.chosen.clear()
            chosen = self.chosen[shapes] = next(fitting, 0)
        return chosen

    def __call__(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The segment's results.

        Raises:
            OutsideProfile: a shape for which the engine was not built.
            EngineError: TensorRT refused the call.
        """
        if self.stream is None:
            return self.admitted(0, args)
        # torch's own ways to ask for these make objects, which costs more than the rest of this function.
        if torch._C._cuda_getDevice() == self.index:
            return self.admitted(torch._C._cuda_getCurrentRawStream(self.index), args)
        with torch.cuda.device(self.device):
            return self.admitted(torch._C._cuda_getCurrentRawStream(self.index), args)

    @property
    def refittable(self) -> bool:
        return bool(self.weights)

    def refit(self, tensors: Sequence[torch.Tensor]) -> None:
        """Puts other weights in place, in the order of the current stream, which must come after all writes to them.

        On the host it waits until no thread is in a call; on the device it comes after all calls so far, on whatever
        stream, and before all later ones. Nothing waits for the device.

        Args:
            tensors: the segment's weights, in its order.

        Raises:
            EngineError: a tensor does not fit, or TensorRT refused. The engine answers no more calls.
        """
        if not self.refittable:
            raise EngineError("the engine was built for fixed weights")
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            raise EngineError("an engine cannot be refitted while a CUDA graph is captured")
        with self.gate.closed():
            try:
                if self.stream is None:
                    self.replace(tensors, 0)
                else:
                    with torch.cuda.device(self.device):
                        self.refit_on_device(tensors, self.stream)
            except BaseException as error:
                self.spoiled = f"its last refit failed: {error}"
                raise

    def refit_on_device(self, tensors: Sequence[torch.Tensor], own: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(self.device)
        stream = current if current.cuda_stream else own  # as for calls
        handles = {handle or own.cuda_stream for handle, _ in [*self.idle]} | {current.cuda_stream}
        others = [torch_stream(handle, self.device) for handle in handles - {stream.cuda_stream}]
        for other in others:
            stream.wait_stream(other)
        try:
            self.replace(tensors, stream.cuda_stream)
        finally:
            self.refitted = stream.record_event()
            for other in others:
                other.wait_event(self.refitted)

    def replace(self, tensors: Sequence[torch.Tensor], stream: int) -> None:
        if self.weights_refit is None:
            self.weights_refit = Refit(self.raw, self.refitter_factory or trt.Refitter, self.weights, self.device)
        self.weights_refit.apply(tensors, stream)

    def admitted(self, stream: int, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """A call, which no refit comes into."""
        if not self.weights:
            return self.on_stream(stream, args)
        self.gate.enter()
        try:
            if self.spoiled is not None:
                raise EngineError(f"the engine cannot be used: {self.spoiled}")
            return self.on_stream(stream, args)
        finally:
            self.gate.leave()

    def on_stream(self, stream: int, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        call = self.take(stream, self.choose(args) if self.narrow else 0)
        try:
            return self.execute(call, args, stream)
        finally:
            self.idle[stream, call.profile].append(call)

    def take(self, stream: int, profile: int) -> Call:
        """An execution context that no other thread uses. It stays with one stream, whose order keeps its memory safe,
        and with one profile, since to change it costs time on the device.
        """
        try:
            return self.idle[stream, profile].pop()
        except IndexError:
            pass
        with self.lock, tensorrt_log.collected() as errors:
            context = self.raw.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT made no execution context: {'; '.join(errors) or 'it gave no reason'}")
        layer_times.watch(context)
        if self.narrow:
            handle = stream if stream or self.stream is None else self.stream.cuda_stream
            if not context.set_optimization_profile_async(profile, handle):
                raise EngineError(f"TensorRT refused the profile {profile}")
        if self.stream is not None and self.refitted is not None and not torch.cuda.is_current_stream_capturing():
            # Streams that had contexts before the last refit wait for it already. (torch synchronizes for a capture.)
            torch_stream(stream or self.stream.cuda_stream, self.device).wait_event(self.refitted)
        return Call(context, profile)

    def execute(self, call: Call, args: Sequence[Any], stream: int) -> tuple[torch.Tensor, ...]:
        context = call.context
        held = []  # what TensorRT reads must live until the work is enqueued
        ports = self.ports_to_bind(call, args)
        for port in ports:
            tensor = self.bindable(port, args[port.position])
            held.append(tensor)
            shape = tuple(tensor.shape)
            if port.size or call.shapes.get(port.name) != shape:
                self.admit(port, tensor, shape, call.profile)
                if not port.size and not context.set_input_shape(port.name, shape):
                    raise EngineError(f"TensorRT refused the shape {shape} of {port.name}")
                call.shapes[port.name] = shape
                call.results = None
            self.bind(context, port, tensor)
        if self.taken and ports is self.inputs:
            call.addresses = [args[port.position].data_ptr() for port in self.taken]
        if call.results is None:
            call.results = [tuple(context.get_tensor_shape(port.name)) for port in self.outputs]
        memory = [
            self.find(call, port, stream) if -1 in shape else torch.empty(shape, dtype=port.dtype, device=self.device)
            for port, shape in zip(self.outputs, call.results, strict=True)
        ]
        for port, result in zip(self.outputs, memory, strict=True):
            if isinstance(result, torch.Tensor):
                self.bind(context, port, result)
        self.enqueue(call, stream)
        results = []
        for port, found in zip(self.outputs, memory, strict=True):
            result = found if isinstance(found, torch.Tensor) else found.take(port.dtype)
            results.append(result.permute(port.inverse) if port.permuted else result)
        return tuple(results)

    def take_weights(self, positions: Collection[int]) -> None:
        """Says which arguments are weights, which lie where they lay at the last call unless their address says not."""
        self.taken = [port for port in self.inputs if port.position in positions and not port.size]

    def ports_to_bind(self, call: Call, args: Sequence[Any]) -> list[Port]:
        """All inputs, or all but the weights that the context has already: a model has hundreds of them. One that
        cannot be read where it lies is copied at each call.
        """
        if not self.taken:
            return self.inputs
        addresses = [args[port.position].data_ptr() for port in self.taken]
        if addresses == call.addresses:
            return call.others
        read = [self.bindable(port, args[port.position]).data_ptr() for port in self.taken]
        in_place = {port.name for port, *same in zip(self.taken, read, addresses, strict=True) if same[0] == same[1]}
        call.others = [port for port in self.inputs if port.name not in in_place]
        call.addresses = None  # until all of them are bound
        return self.inputs

    def find(self, call: Call, port: Port, stream: int) -> FoundResult:
        """What gives memory to a result once the engine has found its size."""
        result = call.found.get(port.name)
        if result is None:
            result = call.found[port.name] = found_result(port.name, self.device)
            if not call.context.set_output_allocator(port.name, result):
                raise EngineError(f"TensorRT refused the output allocator of {port.name}")
        result.start(self.stream if stream == 0 else None)
        return result

    def bind(self, context: Any, port: Port, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr() if tensor.numel() else self.placeholder.data_ptr()
        if not context.set_tensor_address(port.name, address):
            raise EngineError(f"TensorRT refused the address of {port.name}")

    def enqueue(self, call: Call, stream: int) -> None:
        """Starts the engine. TensorRT would synchronize on the default stream, so there a stream of ours takes turns
        with it; all memory belongs to the caller's stream, which waits for ours before it can reuse any."""
        with tensorrt_log.collected() as errors:
            if self.stream is None or self.default_stream is None or stream != 0:
                done = call.context.execute_async_v3(stream)
            else:
                call.events = before, after = call.events or (torch.cuda.Event(), torch.cuda.Event())
                before.record(self.default_stream)
                self.stream.wait_event(before)
                done = call.context.execute_async_v3(self.stream.cuda_stream)
                after.record(self.stream)
                self.default_stream.wait_event(after)
        if not done:
            raise EngineError(f"TensorRT could not run the engine: {'; '.join(errors) or 'it gave no reason'}")

    def bindable(self, port: Port, value: Any) -> torch.Tensor:
        """The argument as memory that TensorRT can read: dense, row-major in the port's order, aligned, on the
        device.
        """
        if port.size:
            return torch.tensor(int(value), dtype=torch.int64)
        if isinstance(value, int):  # a size that the engine computes with
            return torch.full((), value, dtype=torch.int64, device=self.device)
        tensor: torch.Tensor = value.permute(port.order) if port.permuted else value
        if tensor.device != self.device:
            tensor = tensor.to(self.device)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if tensor.data_ptr() % self.alignment:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor

    def admit(self, port: Port, tensor: torch.Tensor, shape: tuple[int, ...], profile: int) -> None:
        smallest, largest = span = self.profiles[profile][port.name]
        found = (int(tensor),) if port.size else shape
        if not within(found, span):
            raise OutsideProfile(f"{port.name} of shape {found} is outside the profile {smallest} to {largest}")


def within(shape: Sequence[int], span: Span) -> bool:
    """Whether a shape lies between the smallest and the largest."""
    smallest, largest = span
    return len(shape) == len(smallest) and all(
        low <= n <= high for n, low, high in zip(shape, smallest, largest, strict=True)
    )


def width(spans: Iterable[Span]) -> float:
    """How wide the ranges are: the larger, the more different shapes lie within them."""
    return sum(math.log2(high - low + 1) for span in spans for low, high in zip(*span, strict=True))


def load_plan(plan: bytes, manifest: Mapping[str, Any], device: torch.device) -> Engine:
    """A plan loaded into TensorRT.

    Raises:
        EngineError: TensorRT refused it; the text ends with TensorRT's own words.
    """
    with torch.cuda.device(device), tensorrt_log.collected() as errors:
        runtime = trt.Runtime(tensorrt_log.logger())
        raw = runtime.deserialize_cuda_engine(plan)
        if raw is None:
            raise EngineError(f"TensorRT could not load the engine: {'; '.join(errors) or 'it gave no reason'}")
    return Engine(raw, manifest, device, owner=runtime)
