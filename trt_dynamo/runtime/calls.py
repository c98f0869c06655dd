"""Calls of an engine: an execution context, with what it was told last, and calls prepared by their shapes.

Comes in: a segment's arguments and a stream. Goes out: its results, on that stream. Nothing here makes the host wait
for the GPU, but results whose size the engine finds.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trt_dynamo import log as tensorrt_log
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime.ports import Port, Shape, dense_strides
from trt_dynamo.runtime.results import FoundResult, found_result
from trt_dynamo.runtime.streams import beside_default, torch_stream
from trt_dynamo.weights import pointers_of

if TYPE_CHECKING:
    from trt_dynamo.runtime.engine import Engine


# A segment's arguments, by position.
Args = Sequence[Any] | Mapping[int, Any]

Layout = tuple[Shape, Shape, torch.dtype]  # shape, strides


@dataclasses.dataclass(eq=False, slots=True)
class Prepared:
    """What is known of a call before it comes, from the shapes of its arguments (and the values of its sizes).

    `results` have the layout of each result as the caller sees it, None for one whose size the engine finds; the first
    context that is given these shapes fills them in.
    """

    profile: int
    shapes: dict[str, Shape]
    sizes: dict[str, torch.Tensor]  # on the host, each with its value
    results: list[tuple[Port, Layout | None]] | None = None


class Call:
    """An execution context, and what it has been given: setters run on change only. For one thread at a time."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self.engine = weakref.ref(engine)  # which holds this call in its pool, and must go when nobody else wants it
        self.context = context
        self.profile = 0
        self.stream = 0  # the caller's,
        self.runs_on: torch.cuda.Stream | None = None  # and the one that the engine runs on, on a GPU
        self.handle = 0
        self.refits = 0  # how many refits of the engine it comes after
        self.prepared: Prepared | None = None
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.weights: list[int] | None = None  # where the weights lay that it has been given,
        self.copied: list[Port] = []  # and those of them that it cannot read where they lie
        self.found: dict[str, FoundResult] = {}  # the results whose size the engine finds
        self.scratch = 0  # bytes that it needs for its shapes,
        self.scratch_at = 0  # and where it was given them last
        self.after: torch.cuda.Event | None = None  # the end of its last run, where that was on a stream of the user's

    @property
    def owner(self) -> Engine:
        engine = self.engine()
        assert engine is not None, "an engine's execution context is used after the engine"
        return engine

    def serve(self, stream: int) -> None:
        """Calls come on this stream from now on."""
        self.stream, engine = stream, self.owner
        if engine.on_cuda:
            self.runs_on = torch_stream(stream, engine.device) if stream else beside_default(engine.index)
            self.handle = self.runs_on.cuda_stream

    def under_way(self) -> torch.cuda.Event | None:
        """The end of what it has enqueued so far, if there can be any."""
        if self.runs_on is None or self.stream:
            return self.after
        event: torch.cuda.Event = self.runs_on.record_event()
        return event

    def readmit(self, stream: int, after: torch.cuda.Event | None) -> None:
        """Goes back to the engine's pool: a CUDA graph that had it is gone, whose last replay ended with `after`."""
        if self.engine() is None:
            return
        self.serve(stream)
        self.after = after if stream else None
        self.owner.contexts.readmit(self)

    def forget_shapes(self, profile: int) -> None:
        """The context has another profile: it must be told everything anew."""
        self.profile, self.prepared, self.shapes = profile, None, {}
        self.addresses, self.weights, self.scratch_at = {}, None, 0

    def follow_refit(self) -> None:
        """What it runs comes after the engine's last refit."""
        engine = self.owner
        if self.runs_on is not None and engine.refitted is not None:
            self.runs_on.wait_event(engine.refitted)
        self.refits = engine.refits

    def run(self, engine: Engine, prepared: Prepared, args: Args) -> tuple[torch.Tensor, ...]:
        """The results. All memory belongs to the caller's stream, which is the current one.

        Each step here is paid at each call: no function for what is a line, and nothing is told to TensorRT twice.
        """
        if self.prepared is not prepared:
            self.turn_to(prepared)
        if engine.taken:
            self.bind_weights(engine, args)
        addresses = self.addresses
        held = []  # what TensorRT reads must live until the work is enqueued
        for port in engine.in_place:
            value = args[port.position]
            # What lies where something lay that could be read is aligned.
            if addresses.get(port.name) != value.data_ptr() or not value.is_contiguous():
                held.append(self.give(port, value, engine))
        if engine.copied or self.copied:
            held += [self.give_copy(port, args[port.position], engine) for port in (*engine.copied, *self.copied)]
        results = []
        for port, layout in prepared.results or ():
            if layout is None:
                self.find(port)
                results.append(engine.placeholder)
                continue
            result = engine.allocate(*layout)
            address = result.data_ptr()
            if addresses.get(port.name) != address:
                self.bind(port.name, address or engine.placeholder.data_ptr())
            results.append(result)
        if self.scratch:
            scratch = engine.allocate((self.scratch,), (1,), torch.uint8)
            held.append(scratch)
            if scratch.data_ptr() != self.scratch_at:
                self.scratch_at = scratch.data_ptr()
                self.context.set_device_memory(self.scratch_at, self.scratch)
        # TensorRT would synchronize on the default stream, so there a stream of ours takes turns with it; all memory
        # belongs to the caller's stream, which waits for ours before it can reuse any.
        done = self.context.execute_async_v3(self.handle)
        if self.stream:
            # Streams of ours live for ever; of this one nothing but the event may be left when somebody waits for it.
            if self.after is None:
                self.after = torch.cuda.Event()
            self.after.record(self.runs_on)
        if not done:
            reasons = "; ".join(tensorrt_log.last_errors())
            raise EngineError(f"TensorRT could not run the engine: {reasons or 'it gave no reason'}")
        return tuple(results) if not self.found else self.sized(results)

    def turn_to(self, prepared: Prepared) -> None:
        """Tells the context the shapes of the calls to come."""
        context, self.prepared = self.context, None
        for name, shape in prepared.shapes.items():
            if self.shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise EngineError(f"TensorRT refused the shape {shape} of {name}")
                self.shapes[name] = shape
        for name, value in prepared.sizes.items():
            self.bind(name, value.data_ptr())
        if prepared.results is None:
            prepared.results = [(port, self.result_of(port)) for port in self.owner.outputs]
        self.scratch, self.scratch_at = int(context.update_device_memory_size_for_shapes()), 0
        self.prepared = prepared

    def result_of(self, port: Port) -> Layout | None:
        """The layout of a result, as the caller sees it."""
        shape = tuple(self.context.get_tensor_shape(port.name))
        if -1 in shape:
            return None
        strides = dense_strides(shape)
        return tuple(shape[axis] for axis in port.inverse), tuple(strides[axis] for axis in port.inverse), port.dtype

    def sized(self, results: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The results, now that the engine has found the size of some."""
        outputs = self.owner.outputs
        taken = {
            port.name: self.found[port.name].take(port.dtype).permute(port.inverse)
            for port in outputs
            if port.name in self.found
        }
        return tuple(taken.get(port.name, result) for port, result in zip(outputs, results, strict=True))

    def find(self, port: Port) -> None:
        """Has a result get its memory once the engine has found its size."""
        result = self.found.get(port.name)
        if result is None:
            result = self.found[port.name] = found_result(port.name, self.owner.device)
            if not self.context.set_output_allocator(port.name, result):
                raise EngineError(f"TensorRT refused the output allocator of {port.name}")
        result.start(self.runs_on if self.stream == 0 else None)

    def give(self, port: Port, value: torch.Tensor, engine: Engine) -> torch.Tensor:
        """Has the context read a tensor where it lies, or a copy where that cannot be. Returns what it reads."""
        address = value.data_ptr()
        if not address or address & engine.misaligned or not value.is_contiguous():
            return self.give_copy(port, value, engine)
        self.bind(port.name, address)
        return value

    def give_copy(self, port: Port, value: Any, engine: Engine) -> torch.Tensor:
        copy = port.dense(value, engine.device, engine.alignment)
        address = copy.data_ptr() or engine.placeholder.data_ptr()
        if self.addresses.get(port.name) != address:
            self.bind(port.name, address)
        return copy

    def bind_weights(self, engine: Engine, args: Args) -> None:
        """Gives the context the weights that are inputs, if they lie elsewhere than at the last call: a model has
        hundreds of them. One that cannot be read where it lies is copied at each call.
        """
        lie = pointers_of(engine.taken_of(args))
        if lie == self.weights:
            return
        self.weights, self.copied = None, []
        for port, address in zip(engine.taken, lie, strict=True):
            value = args[port.position]
            in_place = port.name not in engine.never_in_place and value.is_contiguous() and address
            if in_place and not address & engine.misaligned:
                self.bind(port.name, address)
            else:
                self.copied.append(port)
        self.weights = lie

    def bind(self, name: str, address: int) -> None:
        if not self.context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT refused the address of {name}")
        self.addresses[name] = address
