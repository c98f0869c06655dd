"""Fourier transforms as matrix products with constant tables of cosines and sines: TensorRT has no layer for them.

A transform of length n is a product with a table of 2n by 2n, which rounds as little as torch's own kernels, since the
table is made in float64. Longer ones are made of two short ones (Cooley and Tukey): n1 * n2 values as a matrix, a
transform along one dim, a turn of each element, a transform along the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.complex_arithmetic import conj, mul
from trt_dynamo.lowering.pairs import Pair, rule
from trt_dynamo.profiles import dim_of

aten = torch.ops.aten

FORWARD, INVERSE = -1, 1

# A table for a longer transform takes more memory and time than two short transforms,
LONGEST_TABLE = 512
# and up to this length it is taken where there are no two of at most LONGEST_TABLE, as for a prime.
LONGEST_ALONE = 1024


def turns(rows: torch.Tensor, columns: torch.Tensor, n: int, sign: int) -> torch.Tensor:
    """`exp(sign * 2j * pi * rows * columns / n)` as pairs of float64, for each row and column."""
    angle = torch.outer(rows, columns).remainder(n).double() * (sign * 2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], -1)


@functools.lru_cache(maxsize=16)
def complex_table(n: int, sign: int, scale: float, device: torch.device) -> torch.Tensor:
    """From the 2n parts of a sequence to the 2n parts of its transform."""
    with _disable_current_modes(), torch.no_grad():
        turn = turns(torch.arange(n), torch.arange(n), n, sign) * scale
        turned = torch.stack([-turn[..., 1], turn[..., 0]], -1)
        return torch.stack([turn, turned], 1).reshape(2 * n, 2 * n).float().to(device)


@functools.lru_cache(maxsize=16)
def real_table(n: int, count: int, sign: int, scale: float, device: torch.device) -> torch.Tensor:
    """From n reals to the parts of the first elements of their transform."""
    with _disable_current_modes(), torch.no_grad():
        turn = turns(torch.arange(n), torch.arange(count), n, sign) * scale
        return turn.reshape(n, 2 * count).float().to(device)


@functools.lru_cache(maxsize=16)
def half_table(n: int, scale: float, device: torch.device) -> torch.Tensor:
    """From the parts of the first half of a transform, of which the other half is the conjugate, to n reals."""
    with _disable_current_modes(), torch.no_grad():
        count = n // 2 + 1
        turn = turns(torch.arange(count), torch.arange(n), n, INVERSE) * scale
        twice = torch.full((count, 1), 2.0, dtype=torch.float64)
        twice[0] = 1
        if n % 2 == 0:
            twice[-1] = 1
        real, imag = turn[..., 0] * twice, -turn[..., 1] * twice
        imag[0] = 0
        if n % 2 == 0:
            imag[-1] = 0
        return torch.stack([real, imag], 1).reshape(2 * count, n).float().to(device)


@functools.lru_cache(maxsize=16)
def turn_table(rows: int, columns: int, sign: int, device: torch.device) -> torch.Tensor:
    """What the elements between two short transforms are multiplied by."""
    with _disable_current_modes(), torch.no_grad():
        return turns(torch.arange(rows), torch.arange(columns), rows * columns, sign).float().to(device)


def factors(n: int) -> tuple[int, int] | None:
    """Two lengths whose transforms make one of length n; None where one table is better.

    Raises:
        Unsupported: there are none, and a table would be too large.
    """
    if n <= LONGEST_TABLE:
        return None
    first = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    if n // first <= LONGEST_TABLE:
        return first, n // first
    if n > LONGEST_ALONE:
        raise Unsupported(
            f"a Fourier transform of length {n}: longer than {LONGEST_ALONE}, and no product of two lengths of at most "
            f"{LONGEST_TABLE}"
        )
    return None


def length_of(x: torch.Tensor, dim: int) -> int:
    """The length of a transform along a dim."""
    n = dim_of(x.shape[dim])
    if not isinstance(n, int):
        raise Unsupported("a Fourier transform whose length is not fixed")
    factors(n)
    return n


def product(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each row times the table; a single row without torch's own way, which writes."""
    result: torch.Tensor = rows @ table if rows.ndim > 1 else (rows.unsqueeze(0) @ table).squeeze(0)
    return result


def transform(x: Pair, dim: int, sign: int, scale: float) -> Pair:
    """The transform along a dim (counted from the front)."""
    n = length_of(x.value, dim)
    value = x.value.movedim(dim, -2)
    return Pair(last_transformed(value, n, sign, scale).movedim(-2, dim))


def last_transformed(value: torch.Tensor, n: int, sign: int, scale: float) -> torch.Tensor:
    """The transform of pairs along the dim before that of the parts."""
    found = factors(n)
    if found is None:
        flat = product(value.flatten(-2), complex_table(n, sign, scale, value.device))
        return torch.unflatten(flat, -1, (n, 2))
    n1, n2 = found
    columns = value.unflatten(-2, (n1, n2)).movedim(-3, -2)
    return joined(last_transformed(columns, n1, sign, scale), n1, n2, sign)


def joined(columns: torch.Tensor, n1: int, n2: int, sign: int) -> torch.Tensor:
    """The whole transform from those of its columns, (..., n2, n1, 2)."""
    turned = mul(Pair(columns), Pair(turn_table(n2, n1, sign, columns.device))).value
    rows = last_transformed(turned.movedim(-2, -3), n2, sign, 1.0)
    return rows.movedim(-3, -2).flatten(-3, -2)


def real_transformed(x: torch.Tensor, dim: int, count: int, scale: float) -> Pair:
    """The first elements of the transform of reals along a dim."""
    n = length_of(x, dim)
    value = x.movedim(dim, -1)
    found = factors(n)
    if found is None:
        flat = product(value, real_table(n, count, FORWARD, scale, value.device))
        return Pair(flat.unflatten(-1, (count, 2)).movedim(-2, dim))
    n1, n2 = found
    columns = value.unflatten(-1, (n1, n2)).transpose(-1, -2)
    columns = product(columns, real_table(n1, n1, FORWARD, scale, value.device))
    whole = joined(columns.unflatten(-1, (n1, 2)), n1, n2, FORWARD)
    return Pair(whole.narrow(-2, 0, count).movedim(-2, dim))


def to_reals(x: Pair, dim: int, n: int, scale: float) -> torch.Tensor:
    """The inverse transform of what is conjugate-symmetric and given by its first half."""
    value = x.value.movedim(dim, -2)
    if factors(n) is None:
        return product(value.flatten(-2), half_table(n, scale, value.device)).movedim(-1, dim)
    mirrored = conj(Pair(value.narrow(-2, 1, (n - 1) // 2).flip(-2))).value
    whole = last_transformed(torch.cat([value, mirrored], -2), n, INVERSE, scale)
    return whole.select(-1, 0).movedim(-1, dim)


# torch's numbers for a normalization: none, by the root of the length, by the length.
SCALES: dict[int, Callable[[int], float]] = {0: lambda n: 1.0, 1: lambda n: 1 / math.sqrt(n), 2: lambda n: 1 / n}


def front(dims: Sequence[int], rank: int) -> list[int]:
    return [dim % rank for dim in dims]


@rule(aten._fft_r2c.default)
def fft_r2c(x: torch.Tensor, dims: Sequence[int], normalization: int, onesided: bool) -> Pair:
    dtype, scale = x.dtype, SCALES[normalization]
    *others, last = front(dims, x.ndim)
    n = length_of(x, last)
    result = real_transformed(x.float(), last, n // 2 + 1 if onesided else n, scale(n))
    for dim in others:
        result = transform(result, dim, FORWARD, scale(length_of(result.value, dim)))
    return Pair(result.value.to(dtype))


@rule(aten._fft_c2c.default)
def fft_c2c(x: Pair, dims: Sequence[int], normalization: int, forward: bool) -> Pair:
    dtype, scale = x.dtype, SCALES[normalization]
    result = Pair(x.value.float())
    for dim in front(dims, x.ndim):
        result = transform(result, dim, FORWARD if forward else INVERSE, scale(length_of(result.value, dim)))
    return Pair(result.value.to(dtype)) if dims else Pair(x.value.clone())


@rule(aten._fft_c2r.default)
def fft_c2r(x: Pair, dims: Sequence[int], normalization: int, last_dim_size: int) -> torch.Tensor:
    n = dim_of(last_dim_size)
    if not isinstance(n, int):
        raise Unsupported("a Fourier transform whose length is not fixed")
    dtype, scale = x.dtype, SCALES[normalization]
    *others, last = front(dims, x.ndim)
    if dim_of(x.shape[last]) != n // 2 + 1:
        raise Unsupported("a Fourier transform of more or fewer elements than half its length")
    factors(n)
    result = Pair(x.value.float())
    for dim in others:
        result = transform(result, dim, INVERSE, scale(length_of(result.value, dim)))
    return to_reals(result, last, n, scale(n)).to(dtype)
