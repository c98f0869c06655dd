"""Calls as CUDA graphs: captured once for each combination of shapes, then started by one call of the driver.

Comes in: a function of tensors on a GPU, and its arguments. Goes out: its results, or None where the caller must run
the function itself: the shapes are new, or the call cannot be captured.

A captured call reads an argument where it lay in the calls before, if that was always the same place, as a parameter
does; any other is copied to a place of the graph's own. Results are copies: a later replay writes over the graph's own.
The graphs of a stream share one pool of memory, since the stream runs one at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trt_dynamo.errors import EngineError, words_of
from trt_dynamo.reports import count
from trt_dynamo.runtime.allocation import allocator
from trt_dynamo.runtime.larger_call import PRESENT
from trt_dynamo.runtime.stream_capture import ExecutableGraph, begin_capture, end_capture
from trt_dynamo.runtime.streams import for_captures

if TYPE_CHECKING:
    from trt_dynamo.runtime.segment_runner import SegmentRunner

log = logging.getLogger(__name__)


# A call is captured when its shapes came so often.
WARM = 3
# Of so many combinations of shapes it is known how often they came.
SHAPES_KEPT = 1000
# A graph that is dropped for another before it was replayed so often was not worth its capture: fewer are made then.
WORTH = 10

# One capture at a time in the process: they share memory pools.
CAPTURING = threading.Lock()


class NotNow(Exception):
    """A call cannot be captured at present, though it may be later."""


class Capture:
    """What this thread captures. It runs the function twice: a rehearsal, in which each engine takes an execution
    context out of its pool and starts it once, as TensorRT wants it, and then for the graph, with the same contexts in
    the same order. `calls` are these contexts; `uses` is for owners of engines.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.rehearsing = True
        self.taken = 0
        self.uses: list[Any] = []

    def answer(self, segment: SegmentRunner, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return segment.answer_for_graph(self, args)

    def next_call(self) -> Any:
        """The context that was rehearsed for this place in the function."""
        if self.taken >= len(self.calls):
            raise NotNow("the function ran otherwise than in its rehearsal")
        self.taken += 1
        return self.calls[self.taken - 1]

    @contextlib.contextmanager
    def running(self, *, rehearsing: bool) -> Iterator[None]:
        """The block as the function's rehearsal, or as what is captured, in this thread."""
        self.rehearsing, self.taken, self.uses = rehearsing, 0, []
        before, PRESENT.larger = PRESENT.larger, self
        try:
            yield
        finally:
            PRESENT.larger = before


# Runs the function for its graph.
Function = Callable[[Capture, Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass(eq=False)
class Seen:
    """What is known of a combination of shapes: how often it came, where the arguments lay at the last call (None: no
    tensor), and which of them moved.
    """

    addresses: list[int | None]
    count: int = 1
    moved: set[int] = dataclasses.field(default_factory=set)

    def note(self, addresses: list[int | None]) -> None:
        self.count += 1
        self.moved |= {i for i, (old, new) in enumerate(zip(self.addresses, addresses, strict=True)) if old != new}
        self.addresses = addresses


@dataclasses.dataclass(eq=False)
class Graph:
    """A captured call, for replays on one stream. The arguments of `fixed` must lie at `addresses`; those of `copied`
    are copied to `places`. `calls` are the execution contexts in it, `uses` what their owners noted at its capture.
    """

    graph: ExecutableGraph
    fixed: list[int]
    addresses: list[int]
    copied: list[int]
    places: list[torch.Tensor]
    results: list[Any]
    calls: list[Any]
    index: int
    stream: int
    uses: list[Any]
    dropped: bool = False
    after: torch.cuda.Event = dataclasses.field(default_factory=torch.cuda.Event)
    replays: int = 0
    weights: Any = None  # what is looked at in a replay, as its owner found at the first

    def __post_init__(self) -> None:
        self.tensors = [result for result in self.results if isinstance(result, torch.Tensor)]
        self.allocate = allocator(torch.device("cuda", self.index))
        copies = [torch.empty_like(result) for result in self.tensors]
        self.layouts = [(tuple(each.shape), each.stride(), each.dtype) for each in copies]
        self.lock = turn(self.index, self.stream)

    def moved(self, args: Sequence[Any]) -> set[int]:
        """The arguments that do not lie where the graph reads them."""
        found = [args[i].data_ptr() for i in self.fixed]
        if found == self.addresses:
            return set()
        return {i for i, old, new in zip(self.fixed, self.addresses, found, strict=True) if old != new}

    def replay(self, args: Sequence[Any]) -> list[Any] | None:
        """The results for arguments of the same shapes, none of them moved; None if the graph was dropped meanwhile. On
        the current stream, in one go: the graphs of a stream write over each other's memory, results included.
        """
        with self.lock:
            if self.dropped:
                return None
            if self.copied:
                torch._foreach_copy_(self.places, [args[i] for i in self.copied])
            self.graph.launch(self.stream)
            fresh = [self.allocate(*layout) for layout in self.layouts]
            if fresh:
                torch._foreach_copy_(fresh, self.tensors)
            self.after.record()
        self.replays += 1
        count("replays")
        remaining = iter(fresh)
        return [next(remaining) if isinstance(result, torch.Tensor) else result for result in self.results]


class Graphs:
    """The captured calls of one function on one GPU, the most recently used `most` of them. Threads may share it."""

    def __init__(self, name: str, index: int, most: int, warm: int = WARM) -> None:
        self.name, self.index, self.most, self.warm = name, index, most, warm
        self.graphs: collections.OrderedDict[Hashable, Graph] = collections.OrderedDict()
        self.seen: dict[Hashable, Seen] = {}
        self.lock = threading.Lock()
        self.refused: str | None = None  # why nothing is captured any more

    def find(self, key: Hashable, args: Sequence[Any], stream: int, run: Function) -> Graph | None:
        """The graph for these arguments, captured now if it is time; None where there is none.

        Args:
            key: what the work depends on beside the values of the tensors: numbers, and all shapes and strides that
                can be others in another call.
            args: tensors on the GPU, and numbers.
            stream: the handle of the current stream.
            run: the function, called to capture it.
        """
        if self.refused is not None:
            return None
        key = (stream, key)
        graph = self.graphs.get(key)
        if graph is None:
            return self.prepare(key, args, stream, run)
        elsewhere = graph.moved(args)
        if not elsewhere:
            with self.lock:
                if key in self.graphs:
                    self.graphs.move_to_end(key)
            return graph
        with self.lock:
            self.graphs.pop(key, None)
            seen = self.seen.get(key)
            if seen is not None:
                seen.moved |= elsewhere
        self.release([graph])
        return self.prepare(key, args, stream, run)

    def prepare(self, key: Hashable, args: Sequence[Any], stream: int, run: Function) -> Graph | None:
        """Counts a call; captures it if its shapes came often enough."""
        addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else None for arg in args]
        with self.lock:
            seen = self.seen.get(key)
            if seen is None:
                if len(self.seen) >= SHAPES_KEPT:
                    self.seen.clear()
                self.seen[key] = Seen(addresses)
                return None
            seen.note(addresses)
            if seen.count < self.warm or key in self.graphs:
                return None
        if not CAPTURING.acquire(blocking=False):
            return None
        try:
            graph = self.captured(seen, args, stream, run)
        except NotNow as error:
            log.debug("%s: no CUDA graph now: %s", self.name, error)
            seen.count = 0
            return None
        except (RuntimeError, EngineError) as error:
            self.refused = words_of(error)
            log.info("%s: runs without a CUDA graph: %s", self.name, self.refused)
            return None
        finally:
            CAPTURING.release()
        self.keep(key, graph)
        return graph

    def keep(self, key: Hashable, graph: Graph) -> None:
        with self.lock:
            self.graphs[key] = graph
            dropped = []
            while len(self.graphs) > self.most:
                oldest = next(iter(self.graphs))
                dropped.append(self.graphs.pop(oldest))
                self.seen.pop(oldest, None)
            if any(each.replays < WORTH for each in dropped):
                self.warm *= 2
        self.release(dropped)

    def captured(self, seen: Seen, args: Sequence[Any], stream: int, run: Function) -> Graph:
        """Captures the call. Of what was enqueued for it, nobody has the results."""
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        if any(args[i].get_device() != self.index for i in tensors):
            raise EngineError("an input is on another device")
        copied = [i for i in tensors if i in seen.moved]
        with torch.cuda.device(self.index), torch.inference_mode(False), torch.no_grad():
            places = [memory_like(args[i]).copy_(args[i]) for i in copied]
            taken = list(args)
            for i, place in zip(copied, places, strict=True):
                taken[i] = place
            capture = Capture()
            try:
                with capture.running(rehearsing=True):
                    run(capture, taken)
                graph, results = captured(capture, functools.partial(run, capture, taken), self.index, stream)
                check_results(results, args)
            except BaseException:
                for call in capture.calls:
                    call.readmit(stream, None)
                raise
        fixed = [i for i in tensors if i not in copied]
        addresses = [args[i].data_ptr() for i in fixed]
        count("cuda_graphs")
        log.info("%s: captured as a CUDA graph, %d of %d inputs copied", self.name, len(copied), len(tensors))
        return Graph(graph, fixed, addresses, copied, places, results, capture.calls, self.index, stream, capture.uses)

    def clear(self) -> None:
        """Drops all graphs."""
        with self.lock:
            dropped = [*self.graphs.values()]
            self.graphs.clear()
            self.seen.clear()
        self.release(dropped)

    def drop(self, graph: Graph) -> None:
        """Drops one graph."""
        with self.lock:
            for key in [key for key, each in self.graphs.items() if each is graph]:
                del self.graphs[key]
                self.seen.pop(key, None)
        self.release([graph])

    def release(self, graphs: Sequence[Graph]) -> None:
        """Gives the execution contexts of dropped graphs back, to run after the last replay. (CUDA keeps a graph that
        is dropped until its replays are done, and its memory serves this stream alone.)
        """
        for graph in graphs:
            with graph.lock:
                gone, graph.dropped = graph.dropped, True
            for call in () if gone else graph.calls:
                call.readmit(graph.stream, graph.after)


def captured(
    capture: Capture, run: Callable[[], Sequence[Any]], index: int, stream: int
) -> tuple[ExecutableGraph, list[Any]]:
    """What `run` enqueues, for replays on `stream`, and its results.

    By the driver's own calls. torch's `CUDAGraph` lets no other thread draw random numbers on the GPU meanwhile, and
    leaves its allocator and its generator unusable when a capture fails.
    """
    side = for_captures(index, stream)
    side.wait_stream(torch.cuda.current_stream(index))
    pool = torch.cuda.use_mem_pool(memory_pool(index, stream))
    with capture.running(rehearsing=False), pool, torch.cuda.stream(side):
        begin_capture(side.cuda_stream)
        try:
            results = list(run())
        except BaseException:
            end_capture(side.cuda_stream)
            raise
        graph = end_capture(side.cuda_stream)
    if graph is None:
        raise EngineError("something in it cannot be captured")
    return ExecutableGraph(graph), results


def memory_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of its own, laid out as the tensor: what eager computes from other strides has other strides, too."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise EngineError("an input that moves has elements which share memory")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@functools.cache
def turn(index: int, stream: int) -> threading.Lock:
    """Held while a thread starts a graph on a stream and takes its results."""
    return threading.Lock()


@functools.cache
def memory_pool(index: int, stream: int) -> torch.cuda.MemPool:
    """The memory of all graphs that are replayed on a stream: it runs one at a time."""
    with torch.cuda.device(index):
        return torch.cuda.MemPool()


def check_results(results: Sequence[Any], args: Sequence[Any]) -> None:
    """Refuses results that are not memory of their own, which a copy would tear apart."""
    given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    made = [r.untyped_storage().data_ptr() for r in results if isinstance(r, torch.Tensor) and r.numel()]
    if given & set(made):
        raise EngineError("a result is an input, or a view of one")
    if len(set(made)) < len(made):
        raise EngineError("two results share memory")
    if any(not r.is_cuda for r in results if isinstance(r, torch.Tensor)):
        raise EngineError("a result is on the CPU")
