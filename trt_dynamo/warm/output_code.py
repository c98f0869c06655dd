"""What AOTAutograd's cache keeps for us: the lowered graph as plain data. In: a graph, or such an entry. Out: the call.

An entry holds no engine and no weight: what follows lowering is done anew, with this process's settings, weights and
cache of engines.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._inductor.output_code import OutputCode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from trt_dynamo.warm.graphs import NotPlain, read, written

Call = Callable[[list[Any]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What is done with a lowered graph in this process: `finish` takes it and the positions of its weights, whose
    names are `names`. `hits` counts the graphs that came from the cache.
    """

    finish: Callable[[GraphModule, Mapping[int, torch.Tensor]], Call]
    inputs: Sequence[Any]
    hits: list[str] = dataclasses.field(default_factory=list)


CURRENT: contextvars.ContextVar[Compilation | None] = contextvars.ContextVar("the compilation at work", default=None)


@dataclasses.dataclass
class LoweredCode(OutputCode):  # type: ignore[misc, unused-ignore]
    """A compiled call, with the graph that it was made of; only `payload` and `checksum` are kept."""

    payload: bytes = b""
    checksum: str = ""
    why_not: str = ""
    call: Call | None = None
    _boxed_call: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        assert self.call is not None
        return self.call(inputs)  # type: ignore[arg-type]

    def prepare_for_serialization(self) -> None:
        """
        Raises:
            BypassAOTAutogradCache: the graph is not one for the cache.
        """
        if self.why_not:
            raise BypassAOTAutogradCache(self.why_not)
        self.call = None

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Makes the call of what was kept; any error means that AOTAutograd traces anew."""
        current = CURRENT.get()
        if current is None:
            raise BypassAOTAutogradCache("an entry of trt_dynamo's is read by somebody else")
        if hashlib.sha256(self.payload).hexdigest() != self.checksum:
            raise BypassAOTAutogradCache("the entry is damaged")
        head, _, body = self.payload.partition(b"\n")
        modes = [each.fake_mode for each in example_inputs if isinstance(each, FakeTensor)]
        graph = read(body, modes[0] if modes else FakeTensorMode())
        self.call = current.finish(graph, weights_at(json.loads(head), graph, current.inputs))
        current.hits.append(self.checksum)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """There are no Triton kernels."""


def weights_at(positions: Sequence[int], graph: GraphModule, inputs: Sequence[Any]) -> dict[int, torch.Tensor]:
    """The inputs of this call that are weights.

    Raises:
        BypassAOTAutogradCache: one is not as the graph has it.
    """
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    if len(values) != len(inputs):
        raise BypassAOTAutogradCache("the entry is of another number of inputs")
    for value, real in zip(values, inputs, strict=True):
        if (value.shape, value.stride(), value.dtype) != (real.shape, real.stride(), real.dtype):
            raise BypassAOTAutogradCache("the entry is of other inputs")
        if value.device != real.device:
            raise BypassAOTAutogradCache("the entry is of another device")
    return {position: inputs[position] for position in positions}


def kept(graph: GraphModule, weights: Mapping[int, torch.Tensor]) -> LoweredCode:
    """The entry for a lowered graph, to be made before anything changes the graph; `call` is still to come."""
    try:
        payload = json.dumps(sorted(weights)).encode() + b"\n" + written(graph)
    except NotPlain as error:
        return LoweredCode(why_not=str(error))
    return LoweredCode(payload, hashlib.sha256(payload).hexdigest())
