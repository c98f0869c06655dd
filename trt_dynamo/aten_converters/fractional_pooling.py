"""Fractional max pooling: its windows start where random samples, which eager draws, say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pooling import first_largest
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import product
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim

aten = torch.ops.aten

# Which of the samples moves which of the last dims.
SAMPLE = {2: (1, 0), 3: (0, 1, 2)}


def register_fractional(target: torch._ops.OpOverload, dims: int) -> None:
    @converter(target)
    def fractional_max_pool(
        net: Network, x: Tensor, size: Sequence[int], count: Sequence[Dim], samples: Tensor
    ) -> tuple[Tensor, Tensor]:
        if x.dtype is not torch.float32:
            raise Unsupported(f"the rounding of window starts in {x.dtype}")
        shape = net.result_shape()
        batched = x if x.ndim == dims + 2 else net.unsqueeze(x, [0])
        outer, inner = batched.shape[:2], batched.shape[2:]
        places = net.scalar(0, torch.int64, 2 + 2 * dims)
        for i, which in enumerate(SAMPLE[dims]):
            start = window_starts(net, net.narrow(samples, 2, which, 1), inner[i], count[i], size[i])
            element = net.elementwise(
                "SUM", net.unsqueeze(start, [3]), net.linspace((1, 1, 1, size[i]), 0, (0, 0, 0, 1))
            )
            pitch = net.elementwise("PROD", element, product(inner[i + 1 :]))
            spread = [d for j in range(dims) for d in ((count[i], size[i]) if i == j else (1, 1))]
            places = net.elementwise("SUM", places, net.reshape(pitch, [*outer, *spread]))
        flat = net.reshape(batched, [*outer, product(inner)])
        found = net.gather_elements(flat, net.reshape(places, [*outer, product(places.shape[2:])]), 2)
        largest, first = first_largest(net, net.reshape(found, places.shape), places, [3 + 2 * i for i in range(dims)])
        return net.reshape(largest, shape), net.reshape(first, shape)


def window_starts(net: Network, sample: Tensor, size: Dim, count: Dim, window: int) -> Tensor:
    """[batch, channels, count] for samples of [batch, channels, 1]; the last window ends where the input does."""
    room = net.operand(size - window, torch.float32, 3)
    step = net.elementwise("DIV", room, net.elementwise("MAX", net.operand(count - 1, torch.float32, 3), 1.0))
    index = net.cast(net.linspace((1, 1, count), 0, (0, 0, 1)), torch.float32)
    moved = net.cast(net.elementwise("PROD", net.elementwise("SUM", index, sample), step), torch.int64)
    start = net.elementwise("SUB", moved, net.cast(net.elementwise("PROD", sample, step), torch.int64))
    last = net.elementwise("EQUAL", net.linspace((1, 1, count), 0, (0, 0, 1)), count - 1)
    return net.where(last, size - window, start)


register_fractional(aten.fractional_max_pool2d.default, 2)
register_fractional(aten.fractional_max_pool3d.default, 3)
