"""From symbols to ranges: which sizes an engine is built for. Pure: needs neither TensorRT nor a GPU.

A symbol's range comes from what the user or the guards say (`mark_dynamic(min, max)`, the ShapeEnv); an open end is put
around the sizes seen. `opt`, the size that TensorRT tunes for, is the largest size seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

Dim: TypeAlias = int | sympy.Expr

# An open upper end is put at this many times the largest size seen, and at least at FLOOR; a range that proves too
# narrow grows by the same factor at least, so that n sizes cost O(log n) builds.
GROWTH = 2
FLOOR = 64
DATA_CEILING = 2**16  # a first range of what depends on data ends here
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The sizes from `min` to `max` that an engine takes, tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


def dim_of(size: Any) -> Dim:
    """A size of a fake tensor, or any SymInt, as an int or a sympy expression; never adds a guard."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    if isinstance(size, sympy.Expr):
        return int(size) if size.is_number else size
    return int(size)


def symbols_of(values: Iterable[Any]) -> list[sympy.Symbol]:
    """The symbols in the shapes of fake tensors and in SymInts, in order of first use."""
    found: dict[sympy.Symbol, None] = {}
    for value in values:
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            dim = dim_of(size) if isinstance(size, torch.SymInt) else 0
            if isinstance(dim, sympy.Expr):
                found.update(dict.fromkeys(sorted(dim.free_symbols, key=str)))
    return list(found)


def shape_env_of(values: Iterable[Any]) -> Any:
    """The ShapeEnv behind the first SymInt among the values and the shapes, or None."""
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def ranges_of(values: Iterable[Any]) -> dict[sympy.Symbol, Range]:
    """A range for every symbol in these fake tensors and SymInts."""
    values = list(values)
    shape_env = shape_env_of(values)
    dims = set(symbols_of(value for value in values if isinstance(value, torch.Tensor)))
    return {symbol: range_of(symbol, shape_env, is_number=symbol not in dims) for symbol in symbols_of(values)}


def range_of(symbol: sympy.Symbol, shape_env: Any, *, is_number: bool = False) -> Range:
    """The range of one symbol: the ShapeEnv's where it is closed, else around the size that was seen. A size that
    depends on data was never seen; its bound (all elements of a mask are true) may be far from what comes. Where it
    is a number of its own (`item`), which may say where a slice ends, `opt` is small, so that the slice is sound.
    """
    known = shape_env.var_to_range.get(symbol) or ValueRanges(0, int_oo)
    hint = shape_env.backed_var_to_val.get(symbol)
    lower = max(0, finite(known.lower, 0))
    seen = max(lower, int(hint) if hint is not None else 1)
    upper = finite(known.upper, LARGEST)
    if upper >= LARGEST // 2:
        upper = max(GROWTH * seen, FLOOR)
    if hint is None:
        upper = min(upper, max(DATA_CEILING, GROWTH * lower))
        seen = seen if is_number else (lower + upper) // 2
    return Range(lower, min(max(seen, lower), upper), max(upper, lower))


def finite(bound: Any, otherwise: int) -> int:
    return (
        int(bound)
        if getattr(bound, "is_finite", True) and bound not in (int_oo, -int_oo) and bound.is_number
        else otherwise
    )


def dim_range(dim: Dim, ranges: Mapping[sympy.Symbol, Range], *, signed: bool = False) -> Range:
    """The range of a derived dim such as `2*s0 + 1`, from the ranges of its symbols; `signed`, of a number that may be
    less than 0, as no dim is.
    """
    if isinstance(dim, int):
        return Range(dim, dim, dim)
    bounds = bound_sympy(dim, {s: ValueRanges(r.min, r.max) for s, r in ranges.items() if s in dim.free_symbols})
    opt = int(dim.xreplace({s: sympy.Integer(ranges[s].opt) for s in dim.free_symbols}))
    lower = finite(bounds.lower, 0) if signed else max(0, finite(bounds.lower, 0))
    upper = max(finite(bounds.upper, max(opt, 1) * GROWTH), lower)
    return Range(lower, min(max(opt, lower), upper), upper)


def dims_of(values: Iterable[Any], args: Iterable[Any]) -> list[tuple[Dim, int]]:
    """The symbolic dims and sizes among the graph's inputs, each with what it is in a call: `values` are the fake
    values of the inputs, `args` what it was called with.
    """
    found = []
    for value, arg in zip(values, args, strict=True):
        expected = value.shape if isinstance(value, torch.Tensor) else (value,)
        given = arg.shape if isinstance(arg, torch.Tensor) else (arg,)
        pairs = zip(expected, given, strict=True)
        found += [(dim_of(size), int(number)) for size, number in pairs if isinstance(size, torch.SymInt)]
    return found


def sizes_of(values: Iterable[Any], args: Iterable[Any]) -> dict[sympy.Symbol, int]:
    """The symbols' sizes in a call, as `dims_of` takes it, where they can be told."""
    sizes: dict[sympy.Symbol, int] = {}
    for dim, number in dims_of(values, args):
        known = solved(dim, number)
        if known is not None:
            sizes.setdefault(*known)
    return sizes


def solved(dim: Dim, number: int) -> tuple[sympy.Symbol, int] | None:
    """What the symbol of a linear dim such as `2*s0 + 1` is where the dim is `number`; None where that says nothing."""
    if isinstance(dim, int) or len(dim.free_symbols) != 1:
        return None
    (symbol,) = dim.free_symbols
    slope, rest = dim.coeff(symbol), dim.subs(symbol, 0)
    if not (slope.is_Integer and rest.is_Integer and slope > 0 and sympy.expand(slope * symbol + rest - dim) == 0):
        return None
    return symbol, (number - int(rest)) // int(slope)


def grown(ranges: Mapping[sympy.Symbol, Range], sizes: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, Range]:
    """The ranges, widened geometrically where a size lies outside; `opt` becomes the largest size seen."""
    result = dict(ranges)
    for symbol, size in sizes.items():
        old = ranges.get(symbol)
        if old is None or size in old:
            continue
        lower = old.min if size >= old.min else min(size, old.min // GROWTH, old.min * GROWTH)
        upper = old.max if size <= old.max else max(size, old.max * GROWTH)
        result[symbol] = Range(lower, max(old.opt, size), upper)
    return result


def grown_for(
    ranges: Mapping[sympy.Symbol, Range], values: Iterable[Any], args: Iterable[Any]
) -> dict[sympy.Symbol, Range]:
    """The ranges, widened for a call as `dims_of` takes it. A sum such as `u0 + u1` does not tell its parts: all of
    them are widened, until it fits.
    """
    values, args = list(values), list(args)
    sizes = sizes_of(values, args)
    result = grown(ranges, sizes)
    for dim, number in dims_of(values, args):
        parts = [] if isinstance(dim, int) else [s for s in dim.free_symbols if s in result and s not in sizes]
        while parts and number not in dim_range(dim, result):
            span = dim_range(dim, result)
            wider = {
                s: (result[s].min - 1) // GROWTH if number < span.min else max(result[s].max, 1) * GROWTH for s in parts
            }
            if all(size < 0 or size > LARGEST for size in wider.values()):
                break
            result = grown(result, {s: size for s, size in wider.items() if 0 <= size <= LARGEST})
    return result
