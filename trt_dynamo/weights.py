"""Which weights a call came with, and whether they are still what an engine was built from.

Nothing in Dynamo guards which parameters a compiled graph is called with: two instances of a class share it. So an
engine belongs to a `WeightSet`, found by the identity of the tensors. At each call, beside the engine's own work, the
set compares what it can see of the weights with what it saw when the engine got them; see docs/weights.md for what each
way of looking sees, and what it costs.
"""

from __future__ import annotations

import contextvars
import ctypes
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from trt_dynamo.fingerprints import Fingerprints

POINTER = ctypes.sizeof(ctypes.c_void_p)
ITEMS = tuple.__basicsize__  # where a tuple's items begin

# How a set looks at its weights at each call: it reads all of them; it looks at versions, addresses and the optimizers'
# steps, which misses a write through `.data`; or it only asks which weights they are.
Check = Literal["always", "observed", "frozen"]


class StepCounter:
    """Counts the steps of all optimizers of this process, from the first time that anybody asks, and the changes that
    the user declares.
    """

    def __init__(self) -> None:
        self.count = 0
        self.declared = 0
        self.lock = threading.Lock()
        self.handle: Any = None

    def watch(self) -> None:
        with self.lock:
            if self.handle is None:
                self.handle = register_optimizer_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        self.count += 1

    def declare(self) -> None:
        self.count += 1
        self.declared += 1


STEPS = StepCounter()


def weights_changed() -> None:
    """Says that weights of compiled models changed in a way that the settings keep from being seen: with
    `weights=frozen` any way, with `weights_check=observed` a write through `tensor.data`, NumPy or a CUDA graph.

    Before its next answer every engine compares the content of its weights with what it holds.
    """
    STEPS.declare()


class Reader:
    """Reads the content of the weights of a set where they are. Threads may share one."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        devices: dict[torch.device, list[int]] = {}
        for index, tensor in enumerate(tensors):
            devices.setdefault(tensor.device, []).append(index)
        self.parts = [(places, Fingerprints([tensors[i] for i in places])) for places in devices.values()]

    def record(self) -> None:
        """Marks the point of the caller's stream whose content counts."""
        for _, part in self.parts:
            part.record()

    def read_by_several(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """`read` when it happens once, and not at each call: on the CPU by several threads."""
        if len(self.parts) != 1:
            return self.read(tensors)
        part = self.parts[0][1]
        part.start(tensors)
        return part.read_by_several(tensors)

    def read(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """The content, as bytes that are equal where it is."""
        if len(self.parts) == 1:
            part = self.parts[0][1]
            part.start(tensors)
            return part.read(tensors)
        chosen = [[tensors[i] for i in places] for places, _ in self.parts]
        for (_, part), mine in zip(self.parts, chosen, strict=True):
            part.start(mine)
        return b"".join(part.read(mine) for (_, part), mine in zip(self.parts, chosen, strict=True))


@dataclasses.dataclass(eq=False, slots=True)
class Snapshot:
    """What was seen of the weights when an engine got exactly them; `reader` reads their content at these addresses.

    A call that uses the engine holds on to one snapshot: another thread may take another, and change the engine,
    meanwhile.
    """

    check: Check
    objects: bytes
    pointers: list[int]
    versions: list[int]
    steps: int
    declared: int
    content: bytes
    reader: Reader
    first: tuple[int, ...] = (0,)  # one tensor of each set that it is of
    objects_at: Callable[[int], ctypes.Array[ctypes.c_char]] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.objects_at = bytes_of_pointers(len(self.pointers)).from_address

    def begin(self) -> None:
        """To be called before the engine is started, and `holds` afterwards."""
        if self.check == "always":
            self.reader.record()

    def holds(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether the engine's answer is one for these weights: nothing points to a change since."""
        if self.check == "frozen":
            # Another model has tensors of its own; where it happens to get the names of one that is gone, while the
            # memory of that one lives on, it has memory of its own.
            if self.objects_at(id(tensors) + ITEMS).raw != self.objects or self.declared != STEPS.declared:
                return False
            return [tensors[i].data_ptr() for i in self.first] == [self.pointers[i] for i in self.first]
        if self.check == "observed":
            return (
                self.steps == STEPS.count
                and versions_of(tensors) == self.versions
                and pointers_of(tensors) == self.pointers
            )
        return pointers_of(tensors) == self.pointers and self.reader.read(tensors) == self.content


class Early(Protocol):
    """What was seen of weights before a set was made of them: `trt_dynamo.early_look.EarlyLook`."""

    def seen(self, tensors: Sequence[torch.Tensor]) -> tuple[int, int, list[int], bytes] | None: ...
    def digests(self, tensors: Sequence[torch.Tensor]) -> list[str] | None: ...


EARLY: contextvars.ContextVar[Early | None] = contextvars.ContextVar("an early look at weights", default=None)


class WeightSet:
    """The tensors that engines were built from; when the memory of one is freed, the set says so to `on_death`.

    It holds their storages weakly, not the tensors: `torch.utils.swap_tensors` refuses tensors that have weak
    references.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], check: Check = "always", on_death: Callable[[], object] = lambda: None
    ) -> None:
        STEPS.watch()
        self.check = check
        self.on_death = on_death
        self.references: list[Any] = []
        self.snapshot = self.take(tensors)

    def take(self, tensors: Sequence[torch.Tensor]) -> Snapshot:
        """What there is to see now, or was when a look began in this compilation. The content is read last: a write
        meanwhile shows as a doubt later on.
        """
        early = EARLY.get()
        earlier = early.seen(tensors) if early is not None else None
        steps, declared = STEPS.count, STEPS.declared
        pointers, versions = pointers_of(tensors), versions_of(tensors)
        self.references = [weakref.ref(t.untyped_storage(), self.freed) for t in tensors]
        reader = Reader(tensors)
        if earlier is not None:
            steps, declared, versions, content = earlier
        else:
            reader.record()
            content = reader.read_by_several(tensors)
        return Snapshot(self.check, objects_of(tuple(tensors)), pointers, versions, steps, declared, content, reader)

    def freed(self, _: object) -> None:
        self.on_death()

    def is_content(self, tensors: Sequence[torch.Tensor], content: bytes) -> bool:
        """Whether the tensors hold, now, what `content` says."""
        reader = Reader(tensors)
        reader.record()
        return reader.read_by_several(tensors) == content

    def changed(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the content is another than at the last snapshot; takes a new one."""
        before = self.snapshot.content
        self.snapshot = self.take(tensors)
        return self.snapshot.content != before


def identity(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Which tensors these are, as long as they live; another tensor at the same place has other memory. Not for each
    call: Python reports every `id` to whoever audits the process, which can be dear.
    """
    return tuple(map(id, tensors))


def objects_of(tensors: tuple[torch.Tensor, ...]) -> bytes:
    """Which Python objects these are, as bytes: what a tuple holds, read at once. It stands for nothing once they are
    gone.
    """
    return bytes_of_pointers(len(tensors)).from_address(id(tensors) + ITEMS).raw


@functools.cache
def bytes_of_pointers(count: int) -> type[ctypes.Array[ctypes.c_char]]:
    """The type of so many pointers in a row: to make it takes longer than to read them."""
    return ctypes.c_char * (count * POINTER)


def pointers_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))  # by C alone: a model has hundreds of them


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [t._version for t in tensors]
