"""Memory for results, from torch's caching allocator on the current stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trt_dynamo.runtime.ports import Shape


def allocator(device: torch.device) -> Callable[[Shape, Shape, torch.dtype], torch.Tensor]:
    """Makes an uninitialized tensor of a shape, strides and dtype on the device, which is the current one. For CUDA
    what Inductor's code uses, if torch has it: half the time.
    """
    fast = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if device.type == "cuda" and fast is not None:
        return fast  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
