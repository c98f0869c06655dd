"""Parameters that got another shape or other strides than those that their graph was traced with.

Since torch 2.13 Dynamo's guards see `weight.data = other` (tried: 2.13 and 2.14), and trace again. Before (tried: 2.11)
they look no further than the module's dict, which holds the same parameter; what was made for its sizes would read it
as if it still had them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards
from torch.fx import GraphModule
from torch.torch_version import TorchVersion

from trt_dynamo.reports import count
from trt_dynamo.runtime.ports import items_at

GUARDED = TorchVersion(torch.__version__) >= TorchVersion("2.13")

OTHER_LAYOUT = "a parameter got another shape or other strides, which this torch's guards do not see"


class SameLayouts:
    """Calls `run` with arguments (as a list) of the shapes and strides that the graph was compiled for, and the graph
    itself, in eager, with others. Arguments whose sizes vary are the business of guards and of profiles.
    """

    _boxed_call = True

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], module: GraphModule) -> None:
        self.run, self.eager = run, module
        self.fixed: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape):
                self.fixed.append(index)
                self.shapes.append(tuple(value.shape))
        self.tensors_of = items_at(self.fixed)
        self.strides: list[tuple[int, ...]] | None = None  # those of the first call, which the guards have just seen
        self.quick: Callable[..., bool] = lambda *_: False

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        tensors = self.tensors_of(args)
        if self.quick(*tensors) or self.same(tensors):
            return self.run(args)
        count("eager_calls", OTHER_LAYOUT)
        return self.eager.forward(*args)  # type: ignore[no-any-return]

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """What `quick` says in a third of the time; but it also says no where the state of the thread is another."""
        if [tuple(t.shape) for t in tensors] != self.shapes:
            return False
        strides = [t.stride() for t in tensors]
        if self.strides is None:
            self.strides = strides
            sizes: list[Any] = [[*shape] for shape in self.shapes]
            steps: list[Any] = [[*each] for each in strides]
            self.quick = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps).check
        return strides == self.strides


def with_same_layouts(run: Callable[[list[Any]], Sequence[Any]], module: GraphModule) -> Callable[..., Any]:
    """`run`, which takes its arguments as a list; with the check where this torch's guards lack it."""
    return run if GUARDED else SameLayouts(run, module)
