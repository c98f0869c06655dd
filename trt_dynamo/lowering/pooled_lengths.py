"""Keeps the length a symbol that `max_pool1d` goes over, while Dynamo traces for this backend.

torch's code for it, in C++, asks for the length as a number: each new one would be compiled anew, and a dim marked as
dynamic would be an error. Where this backend has asked for the graph, its Python kernel here calls `max_pool2d` on one
row; all others get torch's code as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._C import DispatchKey

from trt_dynamo.lowering.lengths import traced_for_us

aten = torch.ops.aten


@aten.max_pool1d.default.py_impl(DispatchKey.CompositeImplicitAutograd)
def max_pool1d(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> torch.Tensor:
    """torch's op, of `[channels, length]` or `[batch, channels, length]`."""
    varies = any(isinstance(size, torch.SymInt) for size in x.shape)
    result: torch.Tensor
    if not varies or x.ndim not in (2, 3) or not traced_for_us():
        key = DispatchKey.CompositeImplicitAutograd
        result = aten.max_pool1d.default._op_dk(key, x, kernel_size, stride, padding, dilation, ceil_mode)
        return result
    sizes = (kernel_size, stride or kernel_size, padding, dilation)
    across = [[fill, *size] for fill, size in zip((1, 1, 0, 1), sizes, strict=True)]
    result = aten.max_pool2d.default(x.unsqueeze(-2), *across, ceil_mode).squeeze(-2)
    return result
