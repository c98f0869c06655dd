"""`trt_dynamo::fourier_table`: the cosines and sines of a Fourier transform whose length varies, made of the length at
each call. Those of a fixed length are constants, by the same `turns`.
"""

from __future__ import annotations

import math

import torch

# torch's numbers for a normalization: none, by the root of the length, by the length. What the length is raised to.
POWERS = {0: 0.0, 1: -0.5, 2: -1.0}

# A table for a longer one takes too much memory and time.
LONGEST_VARYING = 2048


def too_long(longest: int) -> str:
    return f"a Fourier transform whose length varies up to {longest}: longer than {LONGEST_VARYING}"


def turns(rows: torch.Tensor, columns: torch.Tensor, n: int, sign: int) -> torch.Tensor:
    """`exp(sign * 2j * pi * rows * columns / n)` as pairs of float64, for each row and column."""
    angle = torch.outer(rows, columns).remainder(n).double() * (sign * 2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], -1)


@torch.library.custom_op("trt_dynamo::fourier_table", mutates_args=())
def fourier_table(n: int, count: int, sign: int, normalization: int, device: torch.device) -> torch.Tensor:
    """[n, count, 2], float32: from each element of a sequence to the parts of the first elements of its transform."""
    rows, columns = (torch.arange(size, device=device) for size in (n, count))
    table: torch.Tensor = turns(rows, columns, n, sign) * n ** POWERS[normalization]
    return table.float()


@fourier_table.register_fake
def fake_fourier_table(n: int, count: int, sign: int, normalization: int, device: torch.device) -> torch.Tensor:
    return torch.empty((n, count, 2), dtype=torch.float32, device=device)
