"""Tensors of subclasses that change nothing but Python's view of them, such as torchvision's `tv_tensors.Image`.

Comes in: a compiled graph. Goes out: the same, called with plain tensors of the same memory. In a graph's first call
AOTAutograd looks at each op that runs in eager, and refuses all tensors whose type it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

KNOWN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def with_plain_tensors(run: Callable[[list[Any]], Any], inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """`run`, which takes a list, called with no tensor of a subclass of Python's. As it is where `inputs`, whose types
    Dynamo guards, have none.
    """
    if not any(isinstance(value, torch.Tensor) and type(value) not in KNOWN for value in inputs):
        return run

    def call(args: list[Any]) -> Any:
        args[:] = [plain(value) for value in args]
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def plain(value: Any) -> Any:
    """The tensor itself, without its class; one that dispatches as it likes stays as it is."""
    if not isinstance(value, torch.Tensor) or type(value) in KNOWN:
        return value
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return value
    with torch._C._DisableTorchDispatch():  # whatever mode is on
        return value.as_subclass(torch.Tensor)
