"""Fourier transforms as matrix products with constant tables of cosines and sines: TensorRT has no layer for them.

A transform of length n is a product with a table of 2n by 2n, which rounds as little as torch's own kernels, since the
table is made in float64. Longer ones are made of two short ones (Cooley and Tukey): n1 * n2 values as a matrix, a
transform along one dim, a turn of each element, a transform along the other.

Of a length that varies, the table is made at each call, by the op `trt_dynamo::fourier_table`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.complex_arithmetic import conj, mul
from trt_dynamo.lowering.pairs import Pair, rule
from trt_dynamo.operators.fourier import LONGEST_VARYING, POWERS, fourier_table, too_long, turns
from trt_dynamo.profiles import dim_of, dim_range, range_of

aten = torch.ops.aten

FORWARD, INVERSE = -1, 1

# A table for a longer transform takes more memory and time than two short transforms,
LONGEST_TABLE = 512
# and up to this length it is taken where there are no two of at most LONGEST_TABLE, as for a prime.
LONGEST_ALONE = 1024


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


def length_of(x: torch.Tensor, dim: int) -> int | torch.SymInt:
    """The length of a transform along a dim."""
    return sound(x.shape[dim])


def sound(length: int | torch.SymInt) -> int | torch.SymInt:
    """The length; a SymInt only of what varies.

    Raises:
        Unsupported: a transform of such a length would take too large a table.
    """
    n = dim_of(length)
    if isinstance(n, int):
        factors(n)
        return n
    assert isinstance(length, torch.SymInt)
    env = length.node.shape_env
    longest = dim_range(n, {symbol: range_of(symbol, env) for symbol in n.free_symbols}).max
    if longest > LONGEST_VARYING:
        raise Unsupported(too_long(longest))
    return length


def scale_of(n: int, normalization: int) -> float:
    scale: float = n ** POWERS[normalization]
    return scale


def product(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each row times the table; a single row without torch's own way, which writes."""
    result: torch.Tensor = rows @ table if rows.ndim > 1 else (rows.unsqueeze(0) @ table).squeeze(0)
    return result


def transform(x: Pair, dim: int, sign: int, normalization: int) -> Pair:
    """The transform along a dim (counted from the front)."""
    n = length_of(x.value, dim)
    value = x.value.movedim(dim, -2)
    if isinstance(n, int):
        whole = last_transformed(value, n, sign, scale_of(n, normalization))
    else:
        whole = varying_transformed(value, n, sign, normalization)
    return Pair(whole.movedim(-2, dim))


def varying_transformed(value: torch.Tensor, n: torch.SymInt, sign: int, normalization: int) -> torch.Tensor:
    """The transform of pairs along the dim before that of the parts, whose length varies."""
    turn = fourier_table(n, n, sign, normalization, value.device)
    turned = torch.stack([-turn[..., 1], turn[..., 0]], -1)
    table = torch.stack([turn, turned], 1).reshape(2 * n, 2 * n)
    return torch.unflatten(flat_product(value.flatten(-2), table), -1, (n, 2))


def flat_product(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each row times the table, as one product of two matrices: of two such products of more dims, one along the first
    dim of reals and one of pairs, RTX 1.7 builds no engine ("CHECK_EQ(dim_count(), stride_order().size()) failed").
    """
    if rows.ndim < 3:
        return product(rows, table)
    return torch.unflatten(rows.flatten(0, -2) @ table, 0, rows.shape[:-1])


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


def real_transformed(x: torch.Tensor, dim: int, onesided: bool, normalization: int) -> Pair:
    """The transform of reals along a dim, or its first half, of which the other half is the conjugate."""
    n = length_of(x, dim)
    count = n // 2 + 1 if onesided else n
    value = x.movedim(dim, -1)
    if not isinstance(n, int):
        table = fourier_table(n, count, FORWARD, normalization, value.device).flatten(1)
        return Pair(flat_product(value, table).unflatten(-1, (count, 2)).movedim(-2, dim))
    found, scale = factors(n), scale_of(n, normalization)
    if found is None:
        flat = product(value, real_table(n, count, FORWARD, scale, value.device))
        return Pair(flat.unflatten(-1, (count, 2)).movedim(-2, dim))
    n1, n2 = found
    columns = value.unflatten(-1, (n1, n2)).transpose(-1, -2)
    columns = product(columns, real_table(n1, n1, FORWARD, scale, value.device))
    whole = joined(columns.unflatten(-1, (n1, 2)), n1, n2, FORWARD)
    return Pair(whole.narrow(-2, 0, count).movedim(-2, dim))


def to_reals(x: Pair, dim: int, n: int | torch.SymInt, normalization: int) -> torch.Tensor:
    """The inverse transform of what is conjugate-symmetric and given by its first half."""
    value = x.value.movedim(dim, -2)
    if not isinstance(n, int):
        return varying_to_reals(value, n, normalization).movedim(-1, dim)
    scale = scale_of(n, normalization)
    if factors(n) is None:
        return product(value.flatten(-2), half_table(n, scale, value.device)).movedim(-1, dim)
    mirrored = conj(Pair(value.narrow(-2, 1, (n - 1) // 2).flip(-2))).value
    whole = last_transformed(torch.cat([value, mirrored], -2), n, INVERSE, scale)
    return whole.select(-1, 0).movedim(-1, dim)


def varying_to_reals(value: torch.Tensor, n: torch.SymInt, normalization: int) -> torch.Tensor:
    """The same along the last dim but one. Each element counts twice that has another for a conjugate."""
    count = n // 2 + 1
    place = torch.arange(count, device=value.device)
    middle = place * 2 - n  # type: ignore[operator]
    times = 2 - torch.eq(place, 0).float() - torch.eq(middle, 0).float()
    # Of a product of two complex numbers, the real part: with the other sign, the sines are taken off.
    table = fourier_table(n, count, FORWARD, normalization, value.device).permute(1, 2, 0).reshape(2 * count, n)
    return flat_product((value * times.unsqueeze(-1)).flatten(-2), table)


def front(dims: Sequence[int], rank: int) -> list[int]:
    return [dim % rank for dim in dims]


@rule(aten._fft_r2c.default)
def fft_r2c(x: torch.Tensor, dims: Sequence[int], normalization: int, onesided: bool) -> Pair:
    *others, last = front(dims, x.ndim)
    result = real_transformed(x.float(), last, onesided, normalization)
    for dim in others:
        result = transform(result, dim, FORWARD, normalization)
    return Pair(result.value.to(x.dtype))


@rule(aten._fft_c2c.default)
def fft_c2c(x: Pair, dims: Sequence[int], normalization: int, forward: bool) -> Pair:
    result = Pair(x.value.float())
    for dim in front(dims, x.ndim):
        result = transform(result, dim, FORWARD if forward else INVERSE, normalization)
    return Pair(result.value.to(x.dtype)) if dims else Pair(x.value.clone())


@rule(aten._fft_c2r.default)
def fft_c2r(x: Pair, dims: Sequence[int], normalization: int, last_dim_size: int | torch.SymInt) -> torch.Tensor:
    n = sound(last_dim_size)
    *others, last = front(dims, x.ndim)
    if dim_of(x.shape[last]) != dim_of(n // 2 + 1):
        raise Unsupported("a Fourier transform of more or fewer elements than half its length")
    result = Pair(x.value.float())
    for dim in others:
        result = transform(result, dim, INVERSE, normalization)
    return to_reals(result, last, n, normalization).to(x.dtype)
