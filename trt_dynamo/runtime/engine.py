"""One engine at run time: TensorRT's `ICudaEngine`, or the reference evaluator behind the same methods.

Comes in: a plan and its manifest. Goes out: results for a segment's arguments, or `OutsideProfile`, never a wrong
answer.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from trt_dynamo import log as tensorrt_log
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime import layer_times
from trt_dynamo.runtime.allocation import allocator
from trt_dynamo.runtime.calls import Args, Call, Prepared
from trt_dynamo.runtime.contexts import Contexts
from trt_dynamo.runtime.cuda_graphs import Capture, Graph, Graphs, NotNow
from trt_dynamo.runtime.gate import Gate
from trt_dynamo.runtime.ports import CPU_ALIGNMENT, CUDA_ALIGNMENT, Port, Span, items_at, width, within
from trt_dynamo.runtime.refit import MakeRefitter, Refit, Weight
from trt_dynamo.runtime.streams import beside_default, current_device, current_stream, for_captures, is_capturing
from trt_dynamo.trt import trt

# For so many combinations of shapes the call is kept prepared.
SHAPES_KEPT = 1000

# Execution contexts that an engine has at most, by default.
CONTEXTS = 16

# Engines and contexts that CUDA graphs of the user's use, which nobody tells us the end of.
CAPTURED: list[tuple[Engine, Call]] = []


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
        self.taken_of = items_at(())
        self.read = [port for port in self.inputs if not port.size]  # and all others that it reads on its device
        self.sizes = [port for port in self.inputs if port.size]
        self.sized = [port.position for port in self.sizes]
        # Known from the first call on: inputs that are always copied, and of what is read the others, and these.
        self.never_in_place: set[str] = set()
        self.in_place: list[Port] = []
        self.copied: list[Port] = []
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
        self.rigid = not self.variable and not self.sized
        self.prepared: dict[Any, Prepared] = {}  # by the shapes that may vary, and the sizes
        self.alignment = CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
        self.misaligned = self.alignment - 1  # the bits of an address that must not be set
        self.built_for: Mapping[Any, Any] = {}  # the ranges of sizes
        self.in_users_graphs = True  # the user may capture it in CUDA graphs
        self.hit = False  # it came from the cache
        self.made_otherwise = ""  # how the cache's engine of the same graph was made otherwise
        self.graphs: Graphs | None = None  # calls as CUDA graphs,
        self.in_graphs: weakref.WeakSet[Graph] = weakref.WeakSet()  # and all graphs, of whomever, that start the engine
        self.numbers: list[int] = []  # arguments that it reads on its device, and are no tensors
        self.contexts = Contexts(contexts)
        # Holds the place of an empty tensor, whose address would be null.
        self.placeholder = torch.zeros(CUDA_ALIGNMENT, dtype=torch.uint8, device=device)
        self.on_cuda = device.type == "cuda"
        self.index: int = torch.empty(0, device=device).get_device()  # -1 on the CPU
        self.among_others = self.on_cuda and torch.cuda.device_count() > 1
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

    def __call__(self, args: Args) -> tuple[torch.Tensor, ...]:
        """The segment's results.

        Raises:
            OutsideProfile: a shape for which the engine was not built.
            EngineError: TensorRT refused the call.
        """
        if self.among_others and current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(args)
        stream = current_stream(self.index) if self.on_cuda else 0
        if stream and is_capturing():
            if not self.in_users_graphs:
                raise EngineError("a replay of the user's CUDA graph would not look at the weights")
            return self.admitted(self.for_users_graph, stream, args)
        return self.on_stream(stream, args) if not self.weights else self.admitted(self.on_stream, stream, args)

    def admitted(
        self, run: Callable[[int, Args], tuple[torch.Tensor, ...]], stream: int, args: Args
    ) -> tuple[torch.Tensor, ...]:
        """A call, which no refit comes into."""
        if not self.weights:
            return run(stream, args)
        self.gate.enter()
        try:
            if self.spoiled is not None:
                raise EngineError(f"the engine cannot be used: {self.spoiled}")
            return run(stream, args)
        finally:
            self.gate.leave()

    def on_stream(self, stream: int, args: Args) -> tuple[torch.Tensor, ...]:
        key = () if self.rigid else self.key(args)
        prepared = self.prepared.get(key) or self.prepare(key, args)
        if self.graphs is not None:
            results = self.replayed(self.graphs, key, args, stream)
            if results is not None:
                return results
        contexts = self.contexts
        idle = contexts.idle[stream, prepared.profile]
        try:
            call = idle.pop()
        except IndexError:
            call = contexts.take_slowly(self, stream, prepared.profile)
        try:
            if call.refits != self.refits:
                call.follow_refit()
            return call.run(self, prepared, args)
        finally:
            idle.append(call)
            if contexts.waiting:
                contexts.tell()

    # -- what the shapes of a call ask for ----------------------------------------------------------------------------

    def key(self, args: Args) -> Any:
        """What tells calls of one preparation from others."""
        if self.rigid:
            return ()
        return tuple([args[i].shape for i in self.variable] + [args[i] for i in self.sized])

    def prepared_for(self, args: Args) -> Prepared:
        key = self.key(args)
        return self.prepared.get(key) or self.prepare(key, args)

    def prepare(self, key: Any, args: Args) -> Prepared:
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
        self.in_place = [port for port in self.read if port.name not in self.never_in_place]
        self.copied = [port for port in self.read if port.name in self.never_in_place]
        self.numbers = [port.position for port, value in read if not isinstance(value, torch.Tensor)]
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
        self.taken_of = items_at([port.position for port in self.taken])
        self.read = [port for port in self.read if port.position not in positions]

    # -- contexts -----------------------------------------------------------------------------------------------------

    def make_call(self, stream: int, profile: int) -> Call:
        """A new context, for one stream and one profile. Its scratch memory comes from torch, at each call, so that
        engines share it and `torch.cuda.empty_cache` frees it.
        """
        with tensorrt_log.collected() as errors:
            context = self.new_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"TensorRT made no execution context: {'; '.join(errors) or 'it gave no reason'}")
        layer_times.watch(context)
        call = Call(self, context)
        call.serve(stream)
        self.set_profile(call, profile)
        return call

    def new_context(self, strategy: Any) -> Any:
        if self.graphs is None or not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return self.raw.create_execution_context(strategy)
        # TensorRT for RTX else puts better kernels in place while an engine runs, which a graph would not see.
        config = self.raw.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.raw.create_execution_context(config)

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

    # -- CUDA graphs --------------------------------------------------------------------------------------------------

    def use_cuda_graphs(self, name: str, most: int, warm: int) -> None:
        """Calls are captured as CUDA graphs from now on, at most so many, each after so many calls of its shapes."""
        self.graphs = Graphs(name, self.index, most, warm)

    def run_read(self, capture: Capture, values: Sequence[Any]) -> Sequence[Any]:
        """The results for what the engine reads, in the order of its inputs, while a CUDA graph of ours is captured."""
        return self.for_graph(capture, {port.position: value for port, value in zip(self.inputs, values, strict=True)})

    def replayed(self, graphs: Graphs, key: Any, args: Args, stream: int) -> tuple[torch.Tensor, ...] | None:
        """The results by a CUDA graph, if there is one for these arguments."""
        read = [args[port.position] for port in self.inputs]
        # Weights keep their strides, as all that Dynamo knows of.
        strides = [args[port.position].stride() for port in self.read if port.position not in self.numbers]
        graph = graphs.find((key, *strides, *[args[i] for i in self.numbers]), read, stream, self.run_read)
        if graph is None:
            return None
        if not graph.replays:
            self.in_graphs.add(graph)
        results = graph.replay(read)
        return None if results is None else tuple(results)

    def for_graph(self, capture: Capture, args: Args) -> tuple[torch.Tensor, ...]:
        """A call that becomes part of a CUDA graph of ours, or its rehearsal."""
        return self.admitted(functools.partial(self.captured, capture), current_stream(self.index), args)

    def captured(self, capture: Capture, stream: int, args: Args) -> tuple[torch.Tensor, ...]:
        prepared = self.prepared_for(args)
        if not capture.rehearsing:
            call: Call = capture.next_call()
            if call.engine() is not self:
                raise NotNow("another engine has come into its place")
            call.serve(stream)
            return call.run(self, prepared, args)
        call = self.contexts.withdraw(stream, prepared.profile) or self.make_call(stream, prepared.profile)
        capture.calls.append(call)
        self.turn(call, stream, prepared.profile)
        results = call.run(self, prepared, args)
        if call.found:
            raise EngineError("the size of a result is known only when the engine has run")
        capturable = getattr(call.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(for_captures(self.index, stream).cuda_stream):
            raise EngineError("TensorRT says that the engine cannot be captured")
        return results

    def for_users_graph(self, stream: int, args: Args) -> tuple[torch.Tensor, ...]:
        """A call that becomes part of the user's CUDA graph, whose replays use the context for ever: it gets one of its
        own, which nothing takes away. One that has run before, if there is any: a new one may allocate, which ends a
        capture.
        """
        prepared = self.prepared_for(args)
        call = self.contexts.withdraw(stream, prepared.profile) or self.make_call(stream, prepared.profile)
        call.serve(stream)
        CAPTURED.append((self, call))
        return call.run(self, prepared, args)

    # -- weights that change ------------------------------------------------------------------------------------------

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
        ends = [call.under_way() for call in self.contexts.all] + [graph.after for graph in [*self.in_graphs]]
        for end in ends:
            if end is not None:
                stream.wait_event(end)
        if self.graphs is not None:
            self.graphs.clear()
        try:
            self.replace(tensors, stream.cuda_stream)
        finally:
            self.refitted = stream.record_event()
            self.refits += 1

    def replace(self, tensors: Sequence[torch.Tensor], stream: int) -> None:
        if self.weights_refit is None:
            self.weights_refit = Refit(self.raw, self.refitter_factory or trt.Refitter, self.weights, self.device)
        self.weights_refit.apply(tensors, stream)


def load_plan(plan: bytes, manifest: Mapping[str, Any], device: torch.device, contexts: int = CONTEXTS) -> Engine:
    """A plan loaded into TensorRT.

    Raises:
        EngineError: TensorRT refused it; the text ends with TensorRT's own words.
    """
    with torch.cuda.device(device), tensorrt_log.collected() as errors:
        runtime = trt.Runtime(tensorrt_log.logger())
        raw = runtime.deserialize_cuda_engine(plan)
        if raw is None:
            raise EngineError(f"TensorRT could not load the engine: {'; '.join(errors) or 'it gave no reason'}")
    return Engine(raw, manifest, device, owner=runtime, contexts=contexts)
