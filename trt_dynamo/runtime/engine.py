"""One engine at run time: TensorRT's `ICudaEngine`, or the reference evaluator behind the same methods.

Comes in: a plan and its manifest. Goes out: results for a segment's arguments, or `OutsideProfile`, never a wrong
answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo import log as tensorrt_log
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime import layer_times
from trt_dynamo.runtime.calls import Call, Prepared, allocator
from trt_dynamo.runtime.contexts import Contexts
from trt_dynamo.runtime.gate import Gate
from trt_dynamo.runtime.ports import CPU_ALIGNMENT, CUDA_ALIGNMENT, Port, Span, width, within
from trt_dynamo.runtime.refit import MakeRefitter, Refit, Weight
from trt_dynamo.runtime.streams import beside_default
from trt_dynamo.trt import trt

# For so many combinations of shapes the call is kept prepared.
SHAPES_KEPT = 1000

# Execution contexts that an engine has at most, by default.
CONTEXTS = 16

# Contexts that CUDA graphs of the user's use, which nobody tells us the end of.
CAPTURED: list[Call] = []


class OutsideProfile(EngineError):
    """A shape for which the engine was not built: the segment answers in eager."""


class Engine:
    """A loaded engine. Calls from several threads get contexts of their own."""

    def __init__(
        self,
        raw: Any,
        manifest: Mapping[str, Any],
        device: torch.device,
        owner: Any = None,
        refitter_factory: MakeRefitter | None = None,
        contexts: int = CONTEXTS,
    ) -> None:
        self.raw = raw
        self.owner = owner  # what must outlive the engine: its runtime, or the network behind the stand-in
        self.device = device
        names = {raw.get_tensor_name(i) for i in range(raw.num_io_tensors)}
        self.inputs = [port for port in map(Port.read, manifest["inputs"]) if port.name in names]
        self.taken: list[Port] = []  # inputs that are weights,
        self.read = [port for port in self.inputs if not port.size]  # and all others that it reads on its device
        self.sizes = [port for port in self.inputs if port.size]
        self.sized = [port.position for port in self.sizes]
        self.never_in_place: set[str] = set()  # inputs that are always copied, known from the first call on
        self.outputs = [Port.read(entry) for entry in manifest["outputs"]]
        missing = [port.name for port in self.outputs if port.name not in names]
        if missing:
            raise EngineError(f"the engine lacks the outputs {', '.join(missing)}: the cache entry does not fit it")
        count = getattr(raw, "num_optimization_profiles", 1)
        self.profiles = [{port.name: self.profile(port, index) for port in self.inputs} for index in range(count)]
        # The first holds all sizes; of the others, the narrowest come first.
        self.narrow = sorted(range(1, count), key=lambda index: width(self.profiles[index].values()))
        self.variable = [
            p.position for p in self.read if any(self.profiles[0][p.name][0] != s[p.name][1] for s in self.profiles)
        ]
        self.prepared: dict[Any, Prepared] = {}  # by the shapes that may vary, and the sizes
        self.alignment = CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
        self.misaligned = self.alignment - 1  # the bits of an address that must not be set
        self.built_for: Mapping[Any, Any] = {}  # the ranges of sizes
        self.hit = False  # it came from the cache
        self.made_otherwise = ""  # how the cache's engine of the same graph was made otherwise
        self.contexts = Contexts(self.make_call, self.turn, contexts)
        self.scratch_is_ours = True
        # Holds the place of an empty tensor, whose address would be null.
        self.placeholder = torch.zeros(CUDA_ALIGNMENT, dtype=torch.uint8, device=device)
        self.on_cuda = device.type == "cuda"
        self.index: int = torch.empty(0, device=device).get_device()  # -1 on the CPU
        self.allocate = allocator(device)
        self.weights = [Weight.read(entry) for entry in manifest.get("weights", [])]
        self.refitter_factory = refitter_factory  # None: TensorRT's own
        self.weights_refit: Refit | None = None
        self.gate = Gate()
        self.refits = 0
        self.refitted: torch.cuda.Event | None = None  # on the device, the end of the last refit
        self.spoiled: str | None = None  # why its weights are in doubt

    def profile(self, port: Port, index: int) -> Span:
        """The smallest and largest shape (value, for a size) that the engine takes in a profile."""
        if port.size:
            spans = self.raw.get_tensor_profile_values(index, port.name)
        else:
            spans = self.raw.get_tensor_profile_shape(port.name, index)
        return tuple(spans[0]), tuple(spans[2])

    def __call__(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The segment's results.

        Raises:
            OutsideProfile: a shape for which the engine was not built.
            EngineError: TensorRT refused the call.
        """
        # torch's own ways to ask for these make objects, which costs more than the rest of this function.
        if not self.on_cuda:
            return self.admitted(0, args) if self.weights else self.on_stream(0, args)
        if torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.index):
                return self(args)
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        return self.admitted(stream, args) if self.weights else self.on_stream(stream, args)

    def admitted(self, stream: int, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """A call, which no refit comes into."""
        self.gate.enter()
        try:
            if self.spoiled is not None:
                raise EngineError(f"the engine cannot be used: {self.spoiled}")
            return self.on_stream(stream, args)
        finally:
            self.gate.leave()

    def on_stream(self, stream: int, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        key = tuple([args[i].shape for i in self.variable] + [args[i] for i in self.sized])
        prepared = self.prepared.get(key) or self.prepare(key, args)
        if stream and torch._C._cuda_isCurrentStreamCapturing():
            return self.captured(prepared, args, stream)
        call = self.contexts.take(stream, prepared.profile)
        try:
            if call.refits != self.refits:
                call.follow_refit()
            return call.run(prepared, args)
        finally:
            self.contexts.give_back(call)

    # -- what the shapes of a call ask for ----------------------------------------------------------------------------

    def prepare(self, key: Any, args: Sequence[Any]) -> Prepared:
        """What is to be known of calls of these shapes.

        Raises:
            OutsideProfile: no profile takes them.
        """
        read = [(port, args[port.position]) for port in (*self.read, *self.taken)]
        self.never_in_place = {
            port.name
            for port, value in read
            if not isinstance(value, torch.Tensor) or port.always_copied(value, self.device)
        }
        shapes = {port.name: port.shape(args[port.position]) for port in self.inputs}
        profile = next((i for i in self.narrow if self.fits(shapes, i)), 0)
        self.check(shapes, profile)
        sizes = {port.name: torch.tensor(args[port.position], dtype=torch.int64) for port in self.sizes}
        if len(self.prepared) >= SHAPES_KEPT:
            self.prepared = {}
        wanted = {name: shape for name, shape in shapes.items() if name not in sizes}
        made = self.prepared[key] = Prepared(profile, wanted, sizes)
        return made

    def fits(self, shapes: Mapping[str, Sequence[int]], profile: int) -> bool:
        return all(within(shape, self.profiles[profile][name]) for name, shape in shapes.items())

    def check(self, shapes: Mapping[str, Sequence[int]], profile: int) -> None:
        for name, shape in shapes.items():
            smallest, largest = span = self.profiles[profile][name]
            if not within(shape, span):
                raise OutsideProfile(f"{name} of shape {tuple(shape)} is outside the profile {smallest} to {largest}")

    def take_weights(self, positions: Collection[int]) -> None:
        """Says which arguments are weights, which lie where they lay at the last call unless their address says not."""
        self.taken = [port for port in self.read if port.position in positions]
        self.read = [port for port in self.read if port.position not in positions]

    # -- contexts -----------------------------------------------------------------------------------------------------

    def make_call(self, stream: int, profile: int) -> Call:
        """A new context, for one stream and one profile. Its scratch memory comes from torch, at each call, so that
        engines share it and `torch.cuda.empty_cache` frees it.
        """
        with tensorrt_log.collected() as errors:
            context = self.raw.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"TensorRT made no execution context: {'; '.join(errors) or 'it gave no reason'}")
        layer_times.watch(context)
        call = Call(self, context)
        call.serve(stream)
        self.set_profile(call, profile)
        return call

    def turn(self, call: Call, stream: int, profile: int) -> None:
        """Makes a context fit for another stream or profile, after all that it has under way."""
        before = call.under_way()
        call.serve(stream)
        if call.runs_on is not None and before is not None:
            call.runs_on.wait_event(before)
        if profile != call.profile:
            self.set_profile(call, profile)

    def set_profile(self, call: Call, profile: int) -> None:
        if self.narrow and not call.context.set_optimization_profile_async(profile, call.handle):
            raise EngineError(f"TensorRT refused the profile {profile}")
        call.forget_shapes(profile)

    def captured(self, prepared: Prepared, args: Sequence[Any], stream: int) -> tuple[torch.Tensor, ...]:
        """A call that becomes part of somebody's CUDA graph, whose replays use the context for ever: it gets one of its
        own, which nothing takes away. One that has run before, if there is any: a new one may allocate, which ends a
        capture.
        """
        call = self.contexts.withdraw(stream, prepared.profile) or self.make_call(stream, prepared.profile)
        call.serve(stream)
        CAPTURED.append(call)
        return call.run(prepared, args)

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
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            raise EngineError("an engine cannot be refitted while a CUDA graph is captured")
        with self.gate.closed():
            try:
                if not self.on_cuda:
                    self.replace(tensors, 0)
                else:
                    with torch.cuda.device(self.index):
                        self.refit_on_device(tensors)
            except BaseException as error:
                self.spoiled = f"its last refit failed: {error}"
                raise

    def refit_on_device(self, tensors: Sequence[torch.Tensor]) -> None:
        """The refit comes after the last call of each context, and each context's next after it."""
        current = torch.cuda.current_stream(self.device)
        stream = current if current.cuda_stream else beside_default(self.index)  # as for calls
        for call in self.contexts.all:
            before = call.under_way()
            if before is not None:
                stream.wait_event(before)
        try:
            self.replace(tensors, stream.cuda_stream)
        finally:
            self.refitted = stream.record_event()
            self.refits += 1

    def replace(self, tensors: Sequence[torch.Tensor], stream: int) -> None:
        if self.weights_refit is None:
            self.weights_refit = Refit(self.raw, self.refitter_factory or trt.Refitter, self.weights, self.device)
        self.weights_refit.apply(tensors, stream)


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
