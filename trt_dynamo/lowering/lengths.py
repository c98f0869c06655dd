"""Keeps the length of a recurrent layer's sequences a symbol while Dynamo traces for this backend.

To learn the shapes of its results, Dynamo runs torch's decomposition of `torch.gru`, one step after the other. The
length becomes a constant by that: each new one would be compiled anew, and a dim marked as dynamic would be an error.
torch's ops get another Python kernel here, which calls our op instead where this backend has asked for the graph; all
others get torch's decomposition as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from trt_dynamo.operators.recurrent import WHOLE

MARK = "_trt_dynamo_keeps_lengths"

B = TypeVar("B", bound=Callable[..., Any])


def keeps_lengths(backend: B) -> B:
    """Marks a backend as one that takes our ops for recurrent layers."""
    vars(backend)[MARK] = True
    return backend


def traced_for_us() -> bool:
    """Whether Dynamo is at work in this thread for a backend that is marked."""
    convert = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(getattr(convert, "tls", None), "current_tx", None)
    backend = getattr(getattr(translator, "output", None), "compiler_fn", None)
    while backend is not None and not getattr(backend, MARK, False):
        names = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
        backend = next((getattr(backend, name) for name in names if hasattr(backend, name)), None)
    return backend is not None


def no_gradients(*args: Any) -> bool:
    tensors = torch.utils._pytree.tree_leaves(args)
    return not torch.is_grad_enabled() or not any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def register(op: OpOverload) -> None:
    """Puts our kernels before torch's decomposition of a recurrent op."""

    def ours(*args: Any, **kwargs: Any) -> Any:
        if not traced_for_us() or autocast() or not no_gradients(args, kwargs):
            return NotImplemented
        return WHOLE[op](*args, **kwargs)

    def with_autograd(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        return op.py_kernels[DispatchKey.Autograd](*args, **kwargs) if result is NotImplemented else result

    def in_inference_mode(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        with mode:
            result = ours(*args, **kwargs)
            return op.decompose(*args, **kwargs) if result is NotImplemented else result

    if DispatchKey.Autograd in op.py_kernels:
        for key in (DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA):
            op.py_impl(key)(with_autograd)
        op.py_impl(FakeTensorMode)(in_inference_mode)


for function in WHOLE:
    if isinstance(function, OpOverload):
        register(function)
