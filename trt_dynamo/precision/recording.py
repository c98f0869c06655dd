"""What values a segment's tensors take: for `precision=auto`, which keeps in float32 what a half type cannot hold.

Comes in: calls of a segment, run in eager. Goes out: the names of the nodes whose values do not fit, and why. What was
recorded serves all graphs of the same ops on the same weights, whatever their sizes; the cache keeps it beside the
engines that were made by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from trt_dynamo.cache import open_store
from trt_dynamo.precision.choice import is_float32
from trt_dynamo.precision.magnitudes import Findings, Magnitude, measured
from trt_dynamo.precision.tables import Role, role_of
from trt_dynamo.processes import renewed_in_children
from trt_dynamo.reports import count
from trt_dynamo.settings import Settings

log = logging.getLogger(__name__)

# The type that `precision=auto` computes in.
LOW = torch.float16

BEING_RECORDED = "precision=auto records the values"

# So many elements of each weight tell one model from another.
SAMPLE = 64


@dataclasses.dataclass
class Recorded:
    """How many calls were recorded, and a `Magnitude` for nodes by their place."""

    calls: int = 0
    magnitudes: dict[int, Magnitude] = dataclasses.field(default_factory=dict)

    def misfits(self) -> dict[int, Magnitude]:
        return {place: magnitude for place, magnitude in self.magnitudes.items() if magnitude.misfit(LOW)}


LOCK = threading.Lock()
RECORDED: dict[str, Recorded] = {}  # by signature


def recorded_nodes(module: GraphModule) -> list[Node]:
    """The nodes whose places signatures and records count: those that make values, not those that move them, of which
    graphs for other sizes have others.
    """
    return [n for n in module.graph.nodes if is_value(n) and not moves(n)]


def is_value(node: Node) -> bool:
    return node.op != "output" and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


def moves(node: Node) -> bool:
    if node.target is operator.getitem:
        return moves(node.args[0])  # type: ignore[arg-type]
    return node.op == "call_function" and role_of(node) is Role.MOVEMENT


def signature(module: GraphModule, weights: Mapping[str, torch.Tensor]) -> str:
    """What is the same for two graphs that can share a record: ops, edges, types and weights; not sizes and names."""
    places: dict[Node, list[int]] = {}
    parts: list[str] = []
    for node in filter(is_value, module.graph.nodes):
        edges = [place for each in node.all_input_nodes for place in places.get(each, ())]
        if moves(node):
            places[node] = list(dict.fromkeys(edges))
            continue
        places[node] = [len(parts)]
        dtype = getattr(node.meta["val"], "dtype", None)
        what = sampled(weights[node.name]) if node.name in weights else ""
        parts.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {edges} {dtype} {what}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sampled(weight: torch.Tensor) -> str:
    """A digest of a few elements, evenly spread."""
    plain = weight.detach()
    flat = (torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain).reshape(-1)
    found = flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].double() if flat.numel() else flat
    return f"{tuple(weight.shape)} {found.cpu().tolist()}"


class Watching(Interpreter):
    """Runs a graph in eager and measures what each of its nodes makes."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, torch.Tensor] = {}
        self.measured = {n for n in recorded_nodes(module) if is_float32(n) and n.op != "get_attr"}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.measured and isinstance(value, torch.Tensor):
            new = measured(value, LOW)
            old = self.found.get(n, new)
            self.found[n] = torch.stack([max_of(old, new, 0), torch.minimum(old[1], new[1]), max_of(old, new, 2)])
        return value


def max_of(old: torch.Tensor, new: torch.Tensor, index: int) -> torch.Tensor:
    return torch.maximum(old[index], new[index])


class Recording(torch.nn.Module):
    """Answers a segment's calls in eager and records them.

    Args:
        module: the segment's graph.
        weights: its placeholders that are parameters and buffers, with their values of now.
        calls: after so many of them `make` makes what answers from then on; None: never.
        make: gets what was found and the weights of the call.
        check: called before a call is answered in eager; raises where that must not be.
    """

    def __init__(
        self,
        module: GraphModule,
        weights: Mapping[str, torch.Tensor],
        calls: int | None = None,
        make: Callable[[Findings, Sequence[torch.Tensor]], torch.nn.Module] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.eager = module
        self.signature = signature(module, weights)
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        self.positions = [names.index(name) for name in weights]
        self.watching = Watching(module)
        self.left = calls
        self.seen = 0
        self.make = make
        self.check = check
        self.runner: torch.nn.Module | None = None
        self.lock = threading.Lock()

    def forward(self, *args: Any) -> Any:
        runner = self.runner
        if runner is not None:
            return runner(*args)
        self.check()
        if not self.lock.acquire(blocking=False):  # another thread records its own call
            return self.eager.forward(*args)
        try:
            if self.make is not None:
                count("eager_calls", BEING_RECORDED)
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return self.eager.forward(*args)
            with torch.no_grad():
                result = self.watching.run(*args)
            self.seen += 1
            if self.left is not None and self.make is not None and self.seen >= self.left:
                self.runner = self.make(self.finish(), [args[position] for position in self.positions])
            return result
        finally:
            self.lock.release()

    def finish(self) -> Findings:
        """Keeps what was recorded so far for all graphs of this signature."""
        places = {node: place for place, node in enumerate(recorded_nodes(self.eager))}
        with LOCK:
            record = RECORDED.setdefault(self.signature, Recorded())
            for node, numbers in self.watching.found.items():
                found, place = Magnitude(*numbers.tolist()), places[node]
                record.magnitudes[place] = record.magnitudes.get(place, found) | found
            record.calls += self.seen
        self.seen = 0
        return findings(self.eager, self.signature, record)


def findings(module: GraphModule, mark: str, record: Recorded) -> Findings:
    """What a record says of the nodes of a graph."""
    nodes, found = recorded_nodes(module), record.misfits()
    misfits = {nodes[place].name: magnitude.misfit(LOW) for place, magnitude in found.items()}
    numbers = {str(place): dataclasses.astuple(magnitude) for place, magnitude in found.items()}
    return Findings(misfits, {"signature": mark, "calls": record.calls, "misfits": numbers})


def recall(module: GraphModule, weights: Mapping[str, torch.Tensor], settings: Settings) -> Findings | None:
    """What this process or the cache knows of the values of a graph; None: nothing."""
    mark = signature(module, weights)
    with LOCK:
        record = RECORDED.get(mark)
    if record is not None:
        return findings(module, mark, record)
    if settings.cache in ("off", "refresh"):
        return None
    for entry in open_store(settings).entries():
        note = entry.manifest.get("precision")
        if isinstance(note, dict) and note.get("signature") == mark:
            known = {int(place): Magnitude(*numbers) for place, numbers in note["misfits"].items()}
            with LOCK:
                record = RECORDED.setdefault(mark, Recorded(note["calls"], known))
            return findings(module, mark, record)
    return None


@renewed_in_children
def renew() -> None:
    """A forked child gets a lock that no other thread holds."""
    global LOCK
    LOCK = threading.Lock()
