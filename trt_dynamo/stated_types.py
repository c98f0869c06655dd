"""Numbers that come as another type than their graph states.

Comes in: a backend. Goes out: the same, whose compiled graphs get what they were compiled for. Python's `random` makes
floats, and Dynamo traces one as a float32 tensor without dims, but hands in a float64 at each call: an engine, or
Inductor's code, would read the memory of the one as the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

Backend = Callable[..., Callable[..., Any]]


def gives_stated_types(backend: Backend) -> Backend:
    """A backend's compiled graphs are called with numbers of the dtypes that Dynamo's graphs state."""

    @functools.wraps(backend)
    def typed(module: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
        numbers = {
            position: node.meta["example_value"].dtype
            for position, node in enumerate(module.graph.find_nodes(op="placeholder"))
            if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        }
        run = backend(module, inputs, **keywords)
        if not numbers:
            return run
        return lambda *args: run(*[a.to(numbers[i]) if i in numbers else a for i, a in enumerate(args)])

    return typed
