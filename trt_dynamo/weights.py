"""Which weights a call came with, and whether they are still what an engine was built from.

Nothing in Dynamo guards which parameters a compiled graph is called with: two instances of a class share it. So an
engine belongs to a `WeightSet`, found by the identity of the tensors; a set notices changes by each tensor's version
and address, and by the optimizers' global hook for the fused ones, which bump no version. A doubt is settled by
content.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepCounter:
    """Counts the steps of all optimizers of this process, from the first time that anybody asks."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()
        self.handle: Any = None

    def watch(self) -> None:
        with self.lock:
            if self.handle is None:
                self.handle = register_optimizer_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        self.count += 1


STEPS = StepCounter()


@dataclasses.dataclass(eq=False, slots=True)
class Observed:
    """What could be seen of the weights, without reading them, when their content was last known."""

    versions: list[int]
    pointers: list[int]
    steps: int


def observe(tensors: Sequence[torch.Tensor]) -> Observed:
    return Observed([t._version for t in tensors], [t.data_ptr() for t in tensors], STEPS.count)


class WeightSet:
    """The tensors that engines were built from; when the memory of one is freed, the set is `dead`, and says so.

    It holds their storages weakly, not the tensors: `torch.utils.swap_tensors` refuses tensors that have weak
    references.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        digest: Callable[[torch.Tensor], str],
        on_death: Callable[[], object] = lambda: None,
    ) -> None:
        STEPS.watch()
        self.digest = digest
        self.dead = False
        self.on_death = on_death
        self.references = [weakref.ref(t.untyped_storage(), self.mark_dead) for t in tensors]
        self.seen = observe(tensors)
        self.digests = [digest(t) for t in tensors]

    def mark_dead(self, _: object) -> None:
        self.dead = True
        self.on_death()

    def is_unchanged(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nothing can be seen that points to a change since the content was last read."""
        seen = self.seen
        return (
            seen.steps == STEPS.count
            and [t._version for t in tensors] == seen.versions
            and [t.data_ptr() for t in tensors] == seen.pointers
        )

    def refresh(self, tensors: Sequence[torch.Tensor], *, everything: bool = False) -> bool:
        """Reads the content of whatever may have changed, or of everything. True if any of it did."""
        now, before = observe(tensors), self.seen
        stepped = everything or now.steps != before.steps
        changed = False
        for index, tensor in enumerate(tensors):
            moved = now.versions[index] != before.versions[index] or now.pointers[index] != before.pointers[index]
            if not (moved or stepped):
                continue
            found = self.digest(tensor)
            changed |= found != self.digests[index]
            self.digests[index] = found
        self.seen = now
        return changed


def identity(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The key of a set, as long as the set is not dead; another tensor at the same place has other memory."""
    return tuple(map(id, tensors))
