"""From symbols to ranges: which sizes an engine is built for. Pure: needs neither TensorRT nor a GPU.

A symbol's range comes from what was recorded or what the user or the guards say (`mark_dynamic(min, max)`, the
ShapeEnv); an open end is put around the sizes seen. `opt`, the size that TensorRT tunes for, is the largest size seen.
docs/shapes.md has the rules in words.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

Dim: TypeAlias = int | sympy.Expr

# An open upper end is put at this many times the largest size seen, and at least at FLOOR; a range that proves too
# narrow grows by the same factor at least, so that n sizes cost O(log n) builds.
GROWTH = 2
FLOOR = 64
DATA_CEILING = 2**16  # a first range of what depends on data ends here
LARGEST = 2**31 - 1
# Up to here an end that a guard has set may be the model's own, as a table of positions has; larger ones are limits of
# torch's kernels, such as the 65,535 images of cuDNN's batch norm.
BY_GUARD = 2**13


@dataclasses.dataclass(frozen=True)
class Range:
    """The sizes from `min` to `max` that an engine takes, tuned for `opt`. All that can come are a multiple of `step`
    from `min`, and so are `opt` and `max`: where a guard lets in even sizes only, half of each is whole.
    """

    min: int
    opt: int
    max: int
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max


Ranges: TypeAlias = Mapping[sympy.Symbol, Range]


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


# What somebody who knows the traffic says about symbols, by the ShapeEnv that they belong to.
DECLARED: MutableMapping[Any, dict[sympy.Symbol, Range]] = weakref.WeakKeyDictionary()


def declare(shape_env: Any, ranges: Mapping[sympy.Symbol, Range]) -> None:
    """Makes these the first ranges of the symbols, within what their guards let in."""
    DECLARED.setdefault(shape_env, {}).update(ranges)


def ranges_of(values: Iterable[Any]) -> dict[sympy.Symbol, Range]:
    """A range for every symbol in these fake tensors and SymInts."""
    values = list(values)
    shape_env = shape_env_of(values)
    dims = set(symbols_of(value for value in values if isinstance(value, torch.Tensor)))
    return {symbol: range_of(symbol, shape_env, is_number=symbol not in dims) for symbol in symbols_of(values)}


def range_of(symbol: sympy.Symbol, shape_env: Any, *, is_number: bool = False) -> Range:
    """The range of one symbol: what was declared, else the ShapeEnv's where it is closed, else around the size seen. A
    large end that a guard has set counts as open: no user has said that such sizes come.

    A size that depends on data was never seen; its bound (all elements of a mask are true) may be far from what comes.
    Where it is a number of its own (`item`, or an int among the arguments, which may be less than 0), which may say
    where a slice ends, `opt` is small, so that the slice is sound.
    """
    known = shape_env.var_to_range.get(symbol) or ValueRanges(0, int_oo)
    hint = shape_env.backed_var_to_val.get(symbol)
    seen = 1 if hint is None else int(hint)
    least = max(finite(known.lower, GROWTH * min(seen, 0)), -LARGEST) if is_number else max(0, finite(known.lower, 0))
    most = max(finite(known.upper, LARGEST), least)
    declared = DECLARED.get(shape_env, {}).get(symbol)
    if declared is not None and max(declared.min, least) <= min(declared.max, most):
        lower, upper = max(declared.min, least), min(declared.max, most)
        return aligned(Range(lower, clamped(declared.opt, lower, upper), upper), *step_of(symbol, shape_env))
    seen = max(seen, least)
    closed = most < LARGEST // 2 and not (most > BY_GUARD and ends_by_guard(symbol, shape_env, most))
    upper = most if closed else min(most, max(GROWTH * seen, FLOOR))
    if hint is None:
        upper = min(upper, max(DATA_CEILING, GROWTH * least))
        seen = seen if is_number else (least + upper) // 2
    upper = max(upper, least)
    return aligned(Range(least, clamped(seen, least, upper), upper), *step_of(symbol, shape_env))


def ends_by_guard(symbol: sympy.Symbol, shape_env: Any, most: int) -> bool:
    """Whether a comparison in the graph, and no declaration, says that the symbol ends there."""
    guards = (guard.expr for guard in getattr(shape_env, "guards", ()))
    return any(
        isinstance(guard, sympy.core.relational.Relational)
        and guard.free_symbols == {symbol}
        and not demands_divisor(guard)
        and lets_in(guard, symbol, most)
        and not lets_in(guard, symbol, most + 1)
        for guard in guards
    )


def clamped(size: int, lower: int, upper: int) -> int:
    return min(max(size, lower), upper)


def aligned(span: Range, step: int, rest: int) -> Range:
    """The largest range inside of this one whose ends and `opt` are `rest` modulo `step`; this one if there is none."""
    lower, upper = span.min + (rest - span.min) % step, span.max - (span.max - rest) % step
    if step == 1 or lower > upper:
        return span
    return Range(lower, clamped(span.opt - (span.opt - rest) % step, lower, upper), upper, step)


def step_of(symbol: sympy.Symbol, shape_env: Any) -> tuple[int, int]:
    """The step and the rest of all sizes that the guards on this symbol alone let in, such as `Eq(Mod(s0, 4), 0)`.

    Found by trying sizes: guards say such things in many forms. (1, 0) where all sizes of a range can come.
    """
    guards = [guard for guard in divisions(shape_env) if guard.free_symbols == {symbol}]
    if not guards:
        return 1, 0
    largest = max(abs(int(number)) for guard in guards for number in (*guard.atoms(sympy.Integer), 2))
    known = shape_env.var_to_range.get(symbol) or ValueRanges(0, int_oo)
    first = max(1, finite(known.lower, 1))
    sizes = list(range(first, first + min(PERIODS * largest, MOST_TRIED)))
    end = sizes[-1] + 1
    for guard in guards[:MOST_GUARDS]:
        sizes = [size for size in sizes if lets_in(guard, symbol, size)]
    step = math.gcd(*(b - a for a, b in itertools.pairwise(sizes)))
    if step < 2 or len(sizes) != len(range(sizes[0], end, step)):
        return 1, 0  # they let in all sizes, or follow no simple rule
    return step, sizes[0] % step


PERIODS, MOST_TRIED, MOST_GUARDS = 8, 1024, 8


def lets_in(guard: sympy.Basic, symbol: sympy.Symbol, size: int) -> bool:
    try:
        return bool(guard.xreplace({symbol: sympy.Integer(size)}) == sympy.true)
    except ZeroDivisionError:  # `s0 // (s0 // 4)` where s0 is 3
        return False


def divisions(shape_env: Any) -> list[sympy.Basic]:
    """The guards that may demand that a division has no rest, in the symbols of now. Each layer of a convolution net
    brings inequalities with quotients; those demand nothing of the kind.
    """
    guards = dict.fromkeys(guard.expr for guard in getattr(shape_env, "guards", ()))
    found = [shape_env.replace(guard) for guard in guards if demands_divisor(guard)]
    return [guard for guard in dict.fromkeys(found) if demands_divisor(guard)]


def demands_divisor(guard: sympy.Basic) -> bool:
    return bool(guard.has(Mod, PythonMod) or (isinstance(guard, sympy.Eq) and guard.has(FloorDiv, CleanDiv)))


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
    if not dim.is_polynomial(symbol):  # divisions and remainders may not even have a value at 0
        return None
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
        upper = old.max if size <= old.max else max(size, min(old.max * GROWTH, LARGEST))
        step = old.step if (size - old.min) % old.step == 0 else 1
        wider = Range(lower, max(old.opt, size), upper)
        result[symbol] = aligned(wider, step, old.min % step)
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


@dataclasses.dataclass(frozen=True)
class Bulk:
    """A tensor whose size depends on symbols: its dims, and the bytes of an element."""

    dims: tuple[Dim, ...]
    itemsize: int

    @property
    def symbols(self) -> set[sympy.Symbol]:
        return {symbol for dim in self.dims if isinstance(dim, sympy.Expr) for symbol in dim.free_symbols}


def bulks_of(values: Iterable[Any]) -> list[Bulk]:
    """The tensors of symbolic shape among these values (fake tensors, tuples of them, anything else), each once."""
    found: dict[Bulk, None] = {}
    for value in values:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                dims = tuple(dim_of(size) for size in tensor.shape)
                if any(isinstance(dim, sympy.Expr) for dim in dims):
                    found[Bulk(dims, tensor.itemsize)] = None
    return list(found)


def fits(bulk: Bulk, ranges: Mapping[sympy.Symbol, Range], limit: int | None) -> bool:
    """Whether the tensor stays within `limit` bytes, and the elements that TensorRT can count, at its largest."""
    size = bytes_of(bulk, ranges)
    return size <= LARGEST * bulk.itemsize and (limit is None or size <= limit)


def bytes_of(bulk: Bulk, ranges: Mapping[sympy.Symbol, Range]) -> int:
    """The tensor's at its largest."""
    return math.prod(dim_range(dim, ranges).max for dim in bulk.dims) * bulk.itemsize


def cut(
    ranges: Mapping[sympy.Symbol, Range],
    needed: Mapping[sympy.Symbol, int],
    bulks: Iterable[Bulk],
    limit: int | None,
) -> dict[sympy.Symbol, Range]:
    """The ranges, their upper ends halved together until each tensor fits, but none below a size that is needed."""
    result = dict(ranges)
    heavy = [bulk for bulk in bulks if bulk.symbols <= result.keys()]
    while heavy := [bulk for bulk in heavy if not fits(bulk, result, limit)]:
        lower = {symbol: halved(result[symbol], needed.get(symbol)) for bulk in heavy for symbol in bulk.symbols}
        if all(result[symbol] == span for symbol, span in lower.items()):
            break
        result.update(lower)
    return result


def halved(span: Range, needed: int | None) -> Range:
    """The range with half the upper end, that keeps the size that is needed."""
    floor = span.min if needed is None else max(needed, span.min)
    upper = min(max(span.max // GROWTH, floor), span.max)
    upper = max(upper - (upper - span.min) % span.step, floor)
    return dataclasses.replace(span, opt=min(span.opt, upper), max=upper)


class Sizes:
    """The ranges of one graph, from the values of its inputs and of all its nodes: the first, and those that grow.

    No range lets a tensor pass `limit` bytes, unless a call brings sizes that do.
    """

    def __init__(self, inputs: Iterable[Any], values: Iterable[Any], limit: int | None) -> None:
        self.inputs = list(inputs)
        self.bulks = bulks_of(values)
        self.limit = limit
        wanted = ranges_of(self.inputs)
        shape_env = shape_env_of(self.inputs)
        seen = {symbol: shape_env.backed_var_to_val.get(symbol) for symbol in wanted}
        self.needed = {symbol: min(int(size), wanted[symbol].max) for symbol, size in seen.items() if size is not None}
        self.first = cut(wanted, self.needed, self.bulks, self.limit)
        self.note = self.shortened(wanted)  # what to say of ranges that were cut, if any were

    def grown(self, ranges: Mapping[sympy.Symbol, Range], args: Iterable[Any]) -> dict[sympy.Symbol, Range]:
        """The ranges, widened for a call with these arguments. None shrinks."""
        args = list(args)
        wanted = grown_for(ranges, self.inputs, args)
        told = sizes_of(self.inputs, args)
        needed = {s: max(ranges[s].max, told.get(s, span.max)) for s, span in wanted.items() if s in ranges}
        return cut(wanted, needed, self.bulks, self.limit)

    def narrower(self, ranges: Mapping[sympy.Symbol, Range]) -> dict[sympy.Symbol, Range] | None:
        """The ranges with the largest tensors a quarter at most of what they were, but none below the sizes that the
        graph was traced with; None where these are all that there are.
        """
        known = [bulk for bulk in self.bulks if bulk.symbols <= ranges.keys()]
        largest = max((bytes_of(bulk, ranges) for bulk in known), default=0)
        narrowed = cut(ranges, self.needed, known, largest // 4)
        return narrowed if narrowed != ranges else None

    def shortened(self, wanted: Mapping[sympy.Symbol, Range]) -> str:
        gone = [f"{wanted[s].max} to {span.max}" for s, span in self.first.items() if span.max < wanted[s].max]
        if not gone:
            return ""
        limit = "" if self.limit is None else f"max_tensor_bytes={self.limit}, or "
        return f"the largest size was cut from {', '.join(gone)}: a tensor would pass {limit}what TensorRT can count"
