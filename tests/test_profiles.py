"""Ranges of sizes: where each comes from, that it holds what it must, how it grows, and where it is cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tests.compiled import assert_same, compiled
from trt_dynamo import explain
from trt_dynamo.profiles import (
    LARGEST,
    Bulk,
    Range,
    Sizes,
    bulks_of,
    cut,
    declare,
    dim_of,
    dim_range,
    fits,
    grown,
    range_of,
    ranges_of,
)
from trt_dynamo.reports import report
from trt_dynamo.testing import evaluate

S, T = (sympy.Symbol(name, integer=True) for name in "st")


def values_of(f: Callable[..., Any], *args: Any, dynamic: bool | None = True) -> list[Any]:
    """The values of the inputs of the graph that Dynamo makes of a call."""
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.extend(node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder"))
        return module.forward

    with torch.no_grad():
        torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return found


def spans_of(f: Callable[..., Any], *args: Any, dynamic: bool | None = True) -> list[list[tuple[int, int, int]]]:
    """For each tensor among the inputs, what its dims can be."""
    values = values_of(f, *args, dynamic=dynamic)
    ranges = ranges_of(values)
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return [[ends(dim_range(dim_of(size), ranges)) for size in v.shape] for v in tensors]


def ends(span: Range) -> tuple[int, int, int]:
    return span.min, span.opt, span.max


def marked(shape: Sequence[int], **bounds: int) -> torch.Tensor:
    x = torch.randn(*shape)
    torch._dynamo.mark_dynamic(x, 0, **bounds)
    return x


class Env:
    """What `range_of` reads of a ShapeEnv."""

    def __init__(self, lower: Any, upper: Any, hint: int | None, *guards: sympy.Basic) -> None:
        self.var_to_range = {S: ValueRanges(lower, upper)}
        self.backed_var_to_val = {} if hint is None else {S: sympy.Integer(hint)}
        self.guards = [Guard(guard) for guard in guards]

    def replace(self, expression: sympy.Basic) -> sympy.Basic:
        return expression


@dataclasses.dataclass
class Guard:
    expr: sympy.Basic


# -- where a range comes from ------------------------------------------------------------------------------------------


def check_four(x: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[0] >= 4)
    torch._check(x.shape[0] <= 20)
    return x + 1


SOURCES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[list[tuple[int, int, int]]]]] = {
    "a small size": (lambda x: x + 1, (torch.randn(5, 3),), [[(2, 5, 64), (2, 3, 64)]]),
    "a large size": (lambda x: x + 1, (torch.randn(100),), [[(2, 100, 200)]]),
    "a size of one": (lambda x: x + 1, (torch.randn(1, 3),), [[(1, 1, 1), (2, 3, 64)]]),
    "a size of none": (lambda x: x + 1, (torch.randn(0, 3),), [[(0, 0, 0), (2, 3, 64)]]),
    "a check": (check_four, (torch.randn(5),), [[(4, 5, 20)]]),
    "a comparison": (lambda x: x + 1 if x.shape[0] < 9 else x, (torch.randn(5),), [[(2, 5, 8)]]),
    "a table": (lambda x: x + torch.ones(12)[: x.shape[0]], (torch.randn(5),), [[(2, 5, 12)]]),
    "a comparison far away": (lambda x: x + 1 if x.shape[0] < 5000 else x, (torch.randn(5),), [[(2, 5, 4999)]]),
    "a limit of a kernel": (lambda x: x + 1 if x.shape[0] <= 65535 else x, (torch.randn(5),), [[(2, 5, 64)]]),
    "a limit that is near": (lambda x: x + 1 if x.shape[0] <= 9000 else x, (torch.randn(8000),), [[(2, 8000, 9000)]]),
    "equal dims": (
        lambda x, y: x @ y,
        (torch.randn(5, 6), torch.randn(6, 7)),
        [[(2, 5, 64), (2, 6, 64)], [(2, 6, 64), (2, 7, 64)]],
    ),
    "twice": (lambda x, y: torch.cat([x, x]) + y, (torch.randn(5), torch.randn(10)), [[(2, 5, 64)], [(4, 10, 128)]]),
    "one more": (lambda x, y: x[1:] + y, (torch.randn(6), torch.randn(5)), [[(3, 6, 65)], [(2, 5, 64)]]),
    "even": (lambda x: x + 1 if x.shape[0] % 2 == 0 else x, (torch.randn(7 + 1),), [[(2, 8, 64)]]),
    "odd": (lambda x: x + 1 if x.shape[0] % 2 == 1 else x, (torch.randn(7),), [[(3, 7, 63)]]),
    "by seven": (lambda x: x.view(-1, 7) * 2, (torch.randn(21),), [[(7, 21, 63)]]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_range_comes_from(name: str) -> None:
    f, args, expected = SOURCES[name]
    assert spans_of(f, *args) == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"min": 4, "max": 32}, (4, 5, 32)),
        ({"min": 1, "max": 8}, (2, 5, 8)),
        ({"min": 5, "max": 5000}, (5, 5, 5000)),
        ({"min": 2, "max": 100000}, (2, 5, 100000)),
        ({}, (2, 5, 64)),
    ],
)
def test_a_mark_is_a_range(bounds: dict[str, int], expected: tuple[int, int, int]) -> None:
    assert spans_of(lambda x: x + 1, marked((5, 3), **bounds), dynamic=None) == [[expected, (3, 3, 3)]]


def test_without_special_sizes_a_range_starts_at_none() -> None:
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        assert spans_of(lambda x: x + 1, torch.randn(5)) == [[(0, 5, 64)]]


def test_inputs_that_share_a_symbol_share_its_range() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    values = values_of(lambda x, y: x.sum(1) + y.sum(1), x, y)
    assert len(ranges_of(values)) == 3


def test_what_was_declared_comes_first_within_the_guards() -> None:
    env = Env(2, int_oo, 5)
    declare(env, {S: Range(1, 8, 32)})
    assert range_of(S, env) == Range(2, 8, 32)
    declare(env, {S: Range(0, 0, 1)})  # torch compiles those sizes apart
    assert range_of(S, env) == Range(2, 5, 64)
    even = Env(2, int_oo, 6, sympy.Eq(Mod(S, 2), 0))
    declare(even, {S: Range(3, 7, 33)})
    assert range_of(S, even) == Range(4, 6, 32, step=2)


@pytest.mark.parametrize(
    ("guards", "first", "step"),
    [
        ([], 2, 1),
        ([sympy.Eq(Mod(S, 4), 0)], 4, 4),
        ([sympy.Eq(Mod(S, 4), 3)], 3, 4),
        ([sympy.Eq(Mod(2 * S, 4), 0)], 2, 2),
        ([sympy.Eq(Mod(S, 4), 0), sympy.Eq(Mod(S, 6), 0)], 12, 12),
        ([sympy.Eq(Mod(S + 1, 5), 0)], 4, 5),
        ([sympy.Ne(Mod(S, 2), 0)], 3, 2),
        ([sympy.Ne(Mod(S, 3), 0)], 2, 1),
        ([sympy.Eq(Mod(S, FloorDiv(S, 4)), 0), sympy.Eq(FloorDiv(S, FloorDiv(S, 4)), 4)], 4, 4),
        ([sympy.Eq(Mod(S * T, 4), 0)], 2, 1),
        ([sympy.Ne(FloorDiv(S - 1, 32) + 1, 1)], 2, 1),
    ],
)
def test_guards_that_let_in_every_so_many(guards: list[sympy.Basic], first: int, step: int) -> None:
    span = range_of(S, Env(2, int_oo, 24 + first % step, *guards))
    assert (span.min, span.step) == (first, step)
    assert all((size - first) % step == 0 for size in ends(span))


@pytest.mark.parametrize(
    ("lower", "upper", "hint", "expected"),
    [
        (-int_oo, int_oo, 3, Range(0, 3, 64)),
        (-int_oo, int_oo, -3, Range(-6, -3, 64)),
        (-10, int_oo, -3, Range(-10, -3, 64)),
        (-int_oo, -1, -3, Range(-6, -3, -1)),
        (0, int_oo, 100, Range(0, 100, 200)),
    ],
)
def test_a_number_may_be_negative(lower: Any, upper: Any, hint: int, expected: Range) -> None:
    assert range_of(S, Env(lower, upper, hint), is_number=True) == expected


bounds = st.one_of(st.integers(0, 100), st.integers(0, LARGEST), st.just(int_oo))


@given(st.integers(0, 10**6), bounds, st.one_of(st.none(), st.integers(0, 10**6)), st.booleans())
def test_opt_lies_inside(lower: int, upper: Any, hint: int | None, is_number: bool) -> None:
    span = range_of(S, Env(lower, max(lower, upper), hint), is_number=is_number)
    assert lower <= span.min <= span.opt <= span.max
    assert span.max <= max(lower, upper)
    if hint is not None and lower <= hint <= upper:
        assert span.opt == hint


# -- derived dims ------------------------------------------------------------------------------------------------------

DERIVED = st.recursive(
    st.sampled_from([S, T, 2 * S + 1, S - 1, sympy.Integer(3)]),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, b: a - b, inner, st.integers(0, 9)),
        st.builds(FloorDiv, inner, st.integers(1, 9)),
        st.builds(lambda a, k: Mod(Max(a, 0), k), inner, st.integers(1, 9)),
        st.builds(Max, inner, inner),
        st.builds(Min, inner, inner),
    ),
    max_leaves=6,
)


@st.composite
def spans(draw: st.DrawFn) -> Range:
    step = draw(st.sampled_from([1, 1, 1, 2, 8]))
    low = draw(st.integers(0, 50))
    a, b = sorted(draw(st.tuples(st.integers(0, 60), st.integers(0, 60))))
    return Range(low, low + a * step, low + b * step, step)


@given(DERIVED, spans(), spans(), st.floats(0, 1), st.floats(0, 1))
def test_a_derived_range_holds_every_value(dim: sympy.Expr, s: Range, t: Range, at_s: float, at_t: float) -> None:
    ranges = {S: s, T: t}
    sizes = {
        symbol: sympy.Integer(r.min + round(at * (r.max - r.min))) for symbol, r, at in ((S, s, at_s), (T, t, at_t))
    }
    number = int(dim.xreplace(sizes))
    span = dim_range(int(dim) if dim.is_number else dim, ranges, signed=True)
    assert span.min <= span.opt <= span.max
    assert number in span
    if number >= 0:
        assert number in dim_range(int(dim) if dim.is_number else dim, ranges)


# -- growth ------------------------------------------------------------------------------------------------------------


@given(spans(), st.lists(st.integers(0, 2**20), max_size=40))
def test_ranges_grow_to_what_comes_and_never_shrink(first: Range, sizes: list[int]) -> None:
    span, builds = first, 0
    for size in sizes:
        before, span = span, grown({S: span}, {S: size})[S]
        assert size in span and before.min in span and before.max in span
        assert span.min <= span.opt <= span.max
        assert (span == before) == (size in before)
        builds += span != before
    assert builds <= 2 * math.log2(2**21) + 2


@given(spans(), st.lists(st.integers(0, 2**15), max_size=40))
def test_what_grows_in_steps_stays_in_step(first: Range, multiples: list[int]) -> None:
    span = first
    for multiple in multiples:
        span = grown({S: span}, {S: first.min % first.step + multiple * first.step})[S]
        assert span.step == first.step
        assert all((size - first.min) % first.step == 0 for size in ends(span))


@given(st.lists(st.integers(-(2**20), 2**20), max_size=40))
def test_numbers_grow_below_nothing_too(numbers: list[int]) -> None:
    span, builds = Range(0, 3, 64), 0
    for number in numbers:
        before, span = span, grown({S: span}, {S: number})[S]
        assert number in span
        builds += span != before
    assert builds <= 2 * 22


def test_growth_ends_where_tensorrt_ends() -> None:
    assert grown({S: Range(2, 5, 2**30)}, {S: 2**30 + 1}) == {S: Range(2, 2**30 + 1, LARGEST)}


# -- tensors that would be too large -----------------------------------------------------------------------------------


@given(spans(), spans(), st.integers(1, 10**6), st.lists(DERIVED, min_size=1, max_size=3), st.floats(0, 1))
def test_what_is_cut_fits_or_is_needed(s: Range, t: Range, limit: int, dims: list[sympy.Expr], at: float) -> None:
    ranges = {S: s, T: t}
    need = s.min + int(at * ((s.max - s.min) // s.step)) * s.step
    bulk = Bulk(tuple(int(dim) if dim.is_number else dim for dim in dims), 4)
    made = cut(ranges, {S: need}, [bulk], limit)
    for symbol, floor in ((S, need), (T, t.min)):
        old, new = ranges[symbol], made[symbol]
        assert (new.min, new.step) == (old.min, old.step)
        assert floor <= new.max <= old.max
        assert new.min <= new.opt <= new.max and (new.max - new.min) % new.step == 0
    if not fits(bulk, made, limit):
        assert all(made[symbol].max == floor for symbol, floor in ((S, need), (T, t.min)) if symbol in bulk.symbols)
    if fits(bulk, ranges, limit):
        assert made == ranges


def test_only_what_makes_a_tensor_large_is_cut() -> None:
    ranges = {S: Range(2, 8, 1024), T: Range(2, 8, 1024)}
    assert cut(ranges, {S: 8}, [Bulk((S, 1000), 4), Bulk((T,), 4)], 10**6) == {**ranges, S: Range(2, 8, 128)}
    assert cut(ranges, {S: 300}, [Bulk((S, 1000), 4)], 10**6) == {**ranges, S: Range(2, 8, 300)}
    assert cut(ranges, {}, [Bulk((S, T), 4)], 4 * 256 * 256) == {S: Range(2, 8, 256), T: Range(2, 8, 256)}
    assert cut(ranges, {}, [Bulk((S,), 4)], None) == ranges


def test_no_tensor_has_more_elements_than_tensorrt_counts() -> None:
    ranges = {S: Range(2, 8, 2**20)}
    assert cut(ranges, {S: 8}, [Bulk((S, 2**16), 1)], None) == {S: Range(2, 8, 2**14)}


def test_the_tensors_of_a_graph() -> None:
    values = values_of(lambda x: torch.stack([x, x]), torch.randn(5, 3))
    (x,) = [value for value in values if isinstance(value, torch.Tensor)]
    half = torch.ops.aten.mul(x, 2)
    assert bulks_of([x, (half, x[:, :1].bool()), 3, None, torch.ones(7)]) == [
        Bulk(tuple(dim_of(d) for d in x.shape), 4),
        Bulk((dim_of(x.shape[0]), 1), 1),
    ]


def test_sizes_of_a_graph_grow_within_the_limit() -> None:
    values = values_of(lambda x: x + 1, marked((5, 250), min=2, max=4000), dynamic=None)
    sizes = Sizes(values, values, 10**6)
    (first,) = sizes.first.values()
    assert ends(first) == (2, 5, 1000) and "4000 to 1000" in sizes.note and "max_tensor_bytes" in sizes.note

    def after(*rows: int) -> list[int]:
        ranges, found = sizes.first, []
        for n in rows:
            ranges = sizes.grown(ranges, [n, torch.empty(n, 250)] if len(values) == 2 else [torch.empty(n, 250)])
            found += [span.max for span in ranges.values()]
        return found

    assert after(999, 1000, 1001, 1500, 7, 1200) == [1000, 1000, 1001, 1500, 1500, 1500]
    assert Sizes(values, values, None).note == ""


# -- in engines --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) @ y.mT).sum(-1)


def test_one_engine_from_no_rows_on() -> None:
    net, args = Net(), [(n, m) for n, m in ((5, 3), (1, 1), (0, 4), (9, 0), (64, 64))]
    with torch.fx.experimental._config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        fast = compiled(net, dynamic=True)
        for n, m in args:
            x, y = torch.randn(n, 6), torch.randn(m, 4)
            assert_same(fast(x, y), net(x, y))
    assert report()["engines_built"] == 1 and report()["eager_calls"] == 0


def test_a_limit_on_tensors_cuts_the_range_and_not_the_answers() -> None:
    net = Net()
    fast = compiled(net, dynamic=True, max_tensor_bytes="64K")
    with torch.no_grad():
        for n in (5, 60, 200, 3000, 2999, 2):
            x, y = torch.randn(n, 6), torch.randn(8, 4)
            assert_same(fast(x, y), net(x, y))
    assert report()["engines_built"] == 3 and report()["eager_calls"] == 0


def test_a_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.outer(x, x).exp().sum(0)

    options: dict[str, Any] = {"runtime": "reference", "min_segment_nodes": 1, "max_tensor_bytes": 4096}
    words = "the largest size was cut from 64 to 32: a tensor would pass max_tensor_bytes=4096"
    found = explain(f, torch.randn(5), dynamic=True, options=options)
    assert words in found.cuts[0] and words in str(found) and found.as_dict()["cuts"] == list(found.cuts)
    with caplog.at_level("INFO", "trt_dynamo"):
        torch.compile(f, backend="tensorrt", dynamic=True, options=options)(torch.randn(5))
    assert any(words in record.getMessage() for record in caplog.records)
    assert explain(f, torch.randn(5), dynamic=True, options={**options, "max_tensor_bytes": None}).cuts == ()


@pytest.mark.parametrize("size", [8, 24])
def test_sizes_in_steps_build_and_run(size: int) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.view(x.shape[0] // 8, 8, -1).tanh() * 2).flatten(0, 1) + x

    fast = compiled(f, dynamic=True)
    with torch.no_grad():
        for n in (size, 40, 64, 16, 136, 800):
            x = torch.randn(n, 3)
            assert_same(fast(x), f(x))
    assert report()["eager_calls"] == 0


def test_a_name_for_each_symbol_of_a_network() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.mT).exp() + x.sum()

    net = evaluate(f, torch.randn(4, 6), torch.randn(5, 6), dynamic=True).networks[0].network.raw
    inputs = {net.get_input(i).name: net.get_input(i) for i in range(net.num_inputs)}
    names = [[inputs[name].get_dimension_name(axis) for axis in (0, 1)] for name in sorted(inputs)]
    assert len({*names[0], *names[1]}) == 3 and names[0][1] == names[1][1]
    assert all(name.startswith("size_") for pair in names for name in pair)
