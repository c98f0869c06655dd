"""A first look at the weights of a graph, in a thread of its own, while AOTAutograd traces the graph.

In: Dynamo's graph and its inputs. Out: for the weight sets and cache keys that are made in the same compilation, what
they need of the weights' content, a fingerprint and a SHA-256. The fingerprint of each weight is the older one of the
two: so who compares it with later content sees every write that the SHA-256 may have missed.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trt_dynamo.cache import digest
from trt_dynamo.errors import Unsupported
from trt_dynamo.fingerprints import ROW, fingerprint
from trt_dynamo.runtime.slots import takes_inputs
from trt_dynamo.settings import Settings
from trt_dynamo.side_threads import BYTES_PER_THREAD, processors, started
from trt_dynamo.weights import EARLY, STEPS, identity, versions_of

# Bytes. What is smaller is not worth a wait for Python's lock, and the caller looks at it when it needs the rest.
LARGE = 2**16

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class EarlyLook:
    """What is seen of `weights`, tensors on the CPU, from now on. It holds them, so that no other gets the `id` of one;
    whoever makes it must `end` it.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        STEPS.watch()
        self.steps, self.declared = STEPS.count, STEPS.declared
        self.weights = [*weights]
        large = sorted((w for w in weights if w.nbytes >= LARGE), key=lambda tensor: -tensor.nbytes)
        self.large = collections.deque(large)  # those that nobody has begun with
        self.small = [weight for weight in weights if weight.nbytes < LARGE]
        self.places = {id(tensor): place_of(tensor) for tensor in weights}
        self.versions = dict(zip(map(id, weights), versions_of(weights), strict=True))
        self.found: dict[int, tuple[bytes, str]] = {}
        self.errors: list[BaseException] = []
        self.ended = False
        self.given: set[tuple[int, ...]] = set()  # what a weight set was made of
        self.valid: set[tuple[int, ...]] = set()  # which of these have not been looked at again
        self.thread: threading.Thread | None = started(self.look)

    def look(self) -> None:
        """Looks at what is left, beside whoever does the same."""
        try:
            while self.large and not self.ended:
                try:
                    tensor = self.large.popleft()
                except IndexError:  # another thread has just taken the last
                    return
                self.look_at([tensor])
        except BaseException as error:  # noqa: BLE001  raised where the thread is waited for
            self.errors.append(error)

    def look_at(self, tensors: Sequence[torch.Tensor]) -> None:
        try:
            rows = fingerprint(tensors)
        except Unsupported:  # whoever needs that one meets it again
            for each in tensors if len(tensors) > 1 else ():
                self.look_at([each])
            return
        for index, each in enumerate(tensors):
            with contextlib.suppress(Unsupported):
                self.found[id(each)] = rows[ROW * index : ROW * (index + 1)], digest(each)

    def seen(self, tensors: Sequence[torch.Tensor]) -> tuple[int, int, list[int], bytes] | None:
        """For a set of these tensors, once: steps, declared changes, versions and content as they were. None where it
        must look for itself.

        Raises:
            BaseException: what went wrong in the thread.
        """
        key = identity(tensors)
        again = key in self.given
        self.given.add(key)
        self.valid.discard(key)
        if again or not self.knows(tensors):
            return None
        self.valid.add(key)
        content = b"".join(self.found[each][0] for each in key)
        return self.steps, self.declared, [self.versions[each] for each in key], content

    def digests(self, tensors: Sequence[torch.Tensor]) -> list[str] | None:
        """The SHA-256 of each, for an engine of the set that was made of what `seen` gave."""
        key = identity(tensors)
        return [self.found[each][1] for each in key] if key in self.valid and self.knows(tensors) else None

    def knows(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all of them were looked at, and lie where they lay."""
        small, self.small = self.small, []
        self.look_at(small)
        if self.thread is not None:
            self.look()  # rather than wait for all of it
            self.thread.join()
        if self.errors:
            raise self.errors[0]
        return all(id(t) in self.found and self.places[id(t)] == place_of(t) for t in tensors)

    def end(self) -> None:
        """Lets the thread end behind the weight that it is at, and waits for it."""
        self.ended = True
        if self.thread is not None:
            self.thread.join()


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


@contextlib.contextmanager
def early_look(module: GraphModule, inputs: Sequence[Any], settings: Settings) -> Iterator[None]:
    """While it is entered, weights on the CPU that Dynamo marks as such are looked at by another thread, if engines
    shall hold copies of them and they are many enough; in the end that thread is gone.
    """
    weights = marked_weights(module, inputs)
    much = sum(tensor.nbytes for tensor in weights) >= 2 * BYTES_PER_THREAD
    if not much or takes_inputs(weights, settings) or processors() < 2:
        yield
        return
    look = EarlyLook(weights)
    token = EARLY.set(look)
    try:
        yield
    finally:
        EARLY.reset(token)
        look.end()


def marked_weights(module: GraphModule, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The plain tensors on the CPU among the inputs that are the same at each call, each once."""
    found: dict[int, torch.Tensor] = {}
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=False):
        marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", ())
        if marked and type(value) in PLAIN and value.device.type == "cpu" and not value.is_inference():
            found[id(value)] = value
    return list(found.values())
