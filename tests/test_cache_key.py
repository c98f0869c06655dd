"""The cache's key: everything that shapes an engine changes it, and nothing else does."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import json
import math
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trt_dynamo.cache import digest, segment_key
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Range, ranges_of
from trt_dynamo.settings import Settings

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent


def captured(fn: Callable[..., Any], *inputs: Any, dynamic: tuple[tuple[int, int], ...] = ()) -> fx.GraphModule:
    """The ATen graph that a backend would be given; `dynamic` are pairs (input, dim)."""
    graphs: list[fx.GraphModule] = []

    def compiler(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for index, dim in dynamic:
        torch._dynamo.mark_dynamic(inputs[index], dim)
    with torch.no_grad():
        torch.compile(fn, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(*inputs)
    return graphs[-1]


def key_of(graph: fx.GraphModule, **changes: Any) -> str:
    given = {
        "ranges": ranges_of(vals(graph)),
        "weights": {},
        "settings": Settings(),
        "platform": {"flavor": "tensorrt_rtx", "version": "1.7.1"},
        "converters": "1",
    }
    return segment_key(graph, **{**given, **changes})


def vals(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder" and "val" in node.meta]


class Block(torch.nn.Module):
    """Attention, norms, convolution and literals: many kinds of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(8)
        self.convolution = torch.nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x + self.attention(x, x, x)[0])
        y = self.convolution(y.transpose(1, 2)).transpose(1, 2)[:, 1:, ::2]
        filled = y.masked_fill(mask[:, 1:, None], float("-inf")).softmax(1)
        return filled.to(torch.float16), torch.nn.functional.gelu(y, approximate="tanh").sum(
            (0, 1), dtype=torch.float32
        )


def pieces(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([0.5, 1.5, 2.5])
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int64)
    joined = torch.cat([x, y], dim=0) * 0.5 + (x.shape[0] + 2 * y.shape[0])
    return torch.nn.functional.pad(joined, (1, 2), value=-0.0)[rows] + table.sum() + torch.full((), math.nan)


@functools.cache
def graphs() -> dict[str, fx.GraphModule]:
    torch.manual_seed(0)
    block = Block().eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    return {
        "block": captured(block, x, mask),
        "dynamic block": captured(block, x, mask, dynamic=((0, 0), (0, 1), (1, 0), (1, 1))),
        "pieces": captured(pieces, a, b, dynamic=((0, 0), (1, 0))),
        "traced": make_fx(pieces, tracing_mode="symbolic")(a, b),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: x.softmax(0), lambda x, y: x.softmax(1)),
        (lambda x, y: x * 2, lambda x, y: x * 3),
        (lambda x, y: x * 2, lambda x, y: x * 2.0),
        (lambda x, y: x + 1, lambda x, y: x + True),
        (lambda x, y: x @ y - x, lambda x, y: y @ x - x),
        (lambda x, y: x - y, lambda x, y: y - x),
        (lambda x, y: x * 0.0, lambda x, y: x * -0.0),
        (lambda x, y: x.sum(0), lambda x, y: x.sum(0, keepdim=True)),
        (lambda x, y: x.sum(0), lambda x, y: x.mean(0)),
        (lambda x, y: (x.exp(), x.sin()), lambda x, y: (x.sin(), x.exp())),
        (lambda x, y: x.to(torch.float16), lambda x, y: x.to(torch.bfloat16)),
        (lambda x, y: x.clamp(min=0.5), lambda x, y: x.clamp(max=0.5)),
        (lambda x, y: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), lambda x, y: x + torch.tensor([1.0, 2.0, 3.0, 5.0])),
        (lambda x, y: x + torch.tensor([1, 2, 3, 4]), lambda x, y: x + torch.tensor([1.0, 2.0, 3.0, 4.0])),
        (lambda x, y: x[:, 1:3], lambda x, y: x[1:3]),
        (lambda x, y: x.view(2, 8), lambda x, y: x.view(8, 2)),
        (lambda x, y: x.permute(1, 0), lambda x, y: x.permute(0, 1)),
        (
            lambda x, y: torch.conv2d(x[None, None], y[None, None]),
            lambda x, y: torch.conv2d(x[None, None], y[None, None], padding=1),
        ),
        (
            lambda x, y: torch.conv2d(x[None, None], y[None, None, :2, :2]),
            lambda x, y: torch.conv2d(x[None, None], y[None, None, :2, :2], stride=2),
        ),
    ],
)
def test_different_functions_have_different_keys(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    keys = [key_of(make_fx(fn, tracing_mode="fake")(x, y)) for fn in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("shape", "dtype", "strides"),
    [
        ((4, 5), torch.float32, (5, 1)),
        ((5, 4), torch.float16, (4, 1)),
        ((5, 4), torch.float32, (1, 5)),
        ((5, 4), torch.float32, (8, 2)),
        ((1, 5, 4), torch.float32, (20, 4, 1)),
    ],
)
def test_every_input_counts(shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    usual = torch.empty(5, 4)
    other = torch.empty_strided(shape, strides, dtype=dtype)
    one, two = (make_fx(torch.exp, tracing_mode="fake")(each) for each in (usual, other))
    assert key_of(one) != key_of(two)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in nested arguments, containers included."""
    yield path, value
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {name: replaced(item, path[1:], new) if name == path[0] else item for name, item in value.items()}
    return type(value)(
        [replaced(item, path[1:], new) if index == path[0] else item for index, item in enumerate(value)]
    )


def mutants(value: Any, node: fx.Node, earlier: list[fx.Node]) -> list[Any]:
    """Other values for one place, all different from each other and from `value`."""
    match value:
        case fx.Node():
            return [*[each for each in earlier if each is not value][-3:], None, 0]
        case bool():
            return [not value, int(value), float(value), str(value), None]
        case int():
            return [value + 1, value - 7, float(value), str(value), [value], None]
        case float():
            return [2 * value + 1 if math.isfinite(value) else 1.0, str(value), None, -math.copysign(1.5, value)]
        case None:
            return [0, False, "None", []]
        case torch.dtype():
            return [each for each in (torch.float32, torch.int8, torch.bool) if each != value]
        case torch.device():
            return [torch.device("cuda", 0), torch.device("meta"), str(value)]
        case str():
            return [value + "x", None]
        case list() | tuple():
            wrapped = [[*value, 0], [*value, None], [list(value)], [[*value]] * 2]
            return [type(value)(each) for each in wrapped + ([list(value)[1:]] if value else [])]
        case dict():
            return [{**value, "other": None}]
    return []


@pytest.mark.parametrize("name", ["dynamic block", "pieces", "traced"])
def test_every_single_argument_counts(name: str) -> None:
    graph = graphs()[name]
    key, tried = key_of(graph), 0
    earlier: list[fx.Node] = []
    assert key == key_of(graph)
    for node in graph.graph.nodes:
        for field in ("args", "kwargs"):
            whole = getattr(node, field)
            plain = dict(whole) if field == "kwargs" else tuple(whole)
            for path, leaf in leaves(plain):
                seen = {key}
                for new in mutants(leaf, node, earlier):
                    setattr(node, field, replaced(plain, path, new))
                    seen.add(found := key_of(graph))
                    tried += 1
                    assert found != key, f"{node.format_node()}: {field}{list(path)} {leaf!r} -> {new!r}"
                assert len(seen) == 1 + len(mutants(leaf, node, earlier)), (node, path, leaf)
            setattr(node, field, whole)
        earlier.append(node)
    assert key_of(graph) == key
    assert tried > 100


def test_every_target_and_value_counts() -> None:
    graph = graphs()["dynamic block"]
    key = key_of(graph)
    with FakeTensorMode():
        others = [
            torch.empty(7, 3),
            torch.empty(5, 3),
            torch.empty(3, 7).t(),
            torch.empty(7, 3, dtype=torch.int8),
            [torch.empty(7, 3)],
            7,
            None,
        ]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            target, node.target = node.target, aten.atan.default
            assert key_of(graph) != key, node
            node.target = target
        if "val" in node.meta:
            val = node.meta["val"]
            found = set()
            for other in others:
                node.meta["val"] = other
                found.add(key_of(graph, ranges={}))
            assert len(found) == len(others), node
            node.meta["val"] = val
    assert key_of(graph) == key


def test_overloads_and_their_defaults_count() -> None:
    graph = captured(lambda x: x * 2, torch.randn(3))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    keys = []
    for target in (
        aten.add.Tensor,
        aten.add.Scalar,
        aten.add_.Tensor,
        aten.add,
        torch.add,
        operator.add,
        operator.iadd,
    ):
        node.target = target
        keys.append(key_of(graph))
    for default in (1, 2):
        with torch.library._scoped_library("trt_dynamo_test", "FRAGMENT") as library:
            library.define(f"scaled(Tensor x, int by={default}) -> Tensor")
            node.target = torch.ops.trt_dynamo_test.scaled.default
            keys.append(key_of(graph))
    assert len(set(keys)) == len(keys)


def test_values_that_look_alike_are_told_apart() -> None:
    class Color(enum.IntEnum):
        ONE = 1

    class Shade(enum.IntEnum):
        ONE = 1

    graph = captured(lambda x: x * 2, torch.randn(3))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    x = node.args[0]
    values = [
        1, 1.0, True, "1", b"1", 1 + 0j, Color.ONE, Shade.ONE, sympy.Symbol("s1"), sympy.Float(1), sympy.Rational(1, 3),
        0, 0.0, -0.0, False, None, "", "None", math.nan, math.inf, -math.inf, "nan", complex(0, -0.0), complex(0, 0.0),
        [], (), {}, [[]], [[], []], [1, [2, 3]], [[1, 2], 3], [1, 2, 3], (1, 2, 3), [12, 3], ["1, 2", 3],
        ["ab"], ["a", "b"], ["astr 1:b"], ["astrb"], [[[]]], [[[], []]], [[[]], []], [[], [[]]],
        slice(1, 2), slice(1, 2, None), slice(1, 2, 1), [1, 2, None], slice(None), ...,
        {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, [("a", 1)], ["a", 1],
        torch.float16, "torch.float16", torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu"), "cpu",
        torch.device("cuda"), operator.mul, "mul", x, "x", [x], [x, x], 2**70, -1, 10**30 * 1.0,
        sympy.Symbol("s1") + 1, 1 - sympy.Symbol("s1"), sympy.Symbol("s1") ** 2, sympy.Symbol("s1") * 2, sympy.oo,
    ]  # fmt: skip
    keys: dict[str, Any] = {}
    for value in values:
        node.args = (x, value)
        key = key_of(graph)
        # slice(1, 2) is slice(1, 2, None).
        assert key not in keys or value == slice(1, 2), (value, keys.get(key))
        keys[key] = value
    node.args = (x, sympy.Integer(1))
    assert keys[key_of(graph)] == 1  # a symbol that was found to be 1 is 1


def test_names_order_of_keywords_and_places_do_not_count() -> None:
    graph = graphs()["dynamic block"]
    key = key_of(graph)
    for index, node in enumerate(graph.graph.nodes):
        node.name = f"renamed_{index}"
        if node.op == "placeholder":
            node.target = node.name
        node.kwargs = dict(reversed(node.kwargs.items()))
        node.meta["stack_trace"] = "elsewhere"
    assert key_of(graph) == key

    def first(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([query, value]) * (2 * query.shape[0] + value.shape[0])

    def second(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.cat([b, a]) * (2 * b.shape[0] + a.shape[0])

    x, y = torch.randn(3, 4), torch.randn(5, 4)
    dynamic = ((0, 0), (1, 0))
    one, two = captured(first, x, y, dynamic=dynamic), captured(second, x, y, dynamic=dynamic)
    names = (
        [str(value) for value in vals(one)],
        [str(value) for value in vals(two)],
    )
    assert names[0] != names[1], "the symbols should have other names here"
    assert key_of(one) == key_of(two)


def test_expressions_do_not_depend_on_the_symbols_names() -> None:
    graph = captured(lambda x: x * 2, torch.randn(3))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")

    def key(make: Callable[[Any, Any], Any], one: str, other: str) -> str:
        p, q = (sympy.Symbol(name, integer=True, positive=True) for name in (one, other))
        node.meta["val"] = make(p, q)
        return key_of(graph, ranges={p: Range(1, 2, 3), q: Range(4, 5, 6)})

    makers: list[Callable[[Any, Any], Any]] = [
        lambda p, q: p + 2 * q,
        lambda p, q: 2 * p + q,
        lambda p, q: p**2 * q,
        lambda p, q: sympy.Max(p, 3) * (q + p) + 7,
        lambda p, q: sympy.floor(p / q),
        lambda p, q: [p, q],
        lambda p, q: [q, p],
        lambda p, q: [p, p],
    ]
    keys = [
        {key(make, *names) for names in (("s0", "s1"), ("s1", "s0"), ("s77", "a"), ("zz", "u3"))} for make in makers
    ]
    assert [len(each) for each in keys] == [1] * len(makers)
    assert len(set().union(*keys)) == len(makers)


def test_ranges_of_used_symbols_count_and_others_do_not() -> None:
    graph = graphs()["pieces"]
    ranges = ranges_of(vals(graph))
    key = key_of(graph)
    assert len(ranges) == 2
    for symbol, each in ranges.items():
        for change in ({"min": each.min + 1}, {"opt": each.opt + 1}, {"max": each.max + 1}):
            assert key_of(graph, ranges={**ranges, symbol: dataclasses.replace(each, **change)}) != key
        assert key_of(graph, ranges={other: value for other, value in ranges.items() if other != symbol}) != key
    one, two = ranges
    assert key_of(graph, ranges={one: Range(1, 2, 3), two: Range(1, 2, 4)}) != key_of(
        graph, ranges={one: Range(1, 2, 4), two: Range(1, 2, 3)}
    )
    assert key_of(graph, ranges={**dict(reversed(ranges.items())), sympy.Symbol("unused"): Range(1, 2, 3)}) == key


def test_settings_platform_converters_and_weights_count() -> None:
    graph = graphs()["block"]
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    variants: list[dict[str, Any]] = [
        {},
        {"settings": Settings(optimization_level=1)},
        {"settings": Settings(optimization_level=2)},
        {"settings": Settings(workspace=1)},
        {"settings": Settings(targets=("8.6", "8.9"))},
        {"settings": Settings(targets=("8.6",))},
        {"platform": {"flavor": "tensorrt", "version": "1.7.1"}},
        {"platform": {"flavor": "tensorrt_rtx", "version": "1.7.2"}},
        {"platform": {"flavor": "tensorrt_rtx", "version": "1.7.1", "gpu": "H100"}},
        {"platform": {}},
        {"converters": "2"},
        {"weights": {names[0]: "0" * 64}},
        {"weights": {names[0]: "1" * 64}},
        {"weights": {names[1]: "0" * 64}},
        {"weights": {names[0]: "0" * 64, names[1]: "0" * 64}},
        {"weights": {"of no placeholder": "0" * 64}},
    ]
    keys = [key_of(graph, **variant) for variant in variants]
    assert len(set(keys)) == len(keys)
    irrelevant: dict[str, Any]
    for irrelevant in ({"strict": True}, {"cache": "refresh"}, {"cache_dir": Path("elsewhere")}, {"progress": "on"}):
        assert key_of(graph, settings=Settings(**irrelevant)) == keys[0]
    assert key_of(graph, platform={"version": "1.7.1", "flavor": "tensorrt_rtx"}) == keys[0]
    weights = {names[0]: "0" * 64, names[1]: "1" * 64}
    first = next(iter(graph.graph.nodes))
    first.name = "renamed"
    assert key_of(graph, weights={"renamed": "0" * 64}) == keys[11]
    first.name = names[0]
    assert key_of(graph, weights=weights) == key_of(graph, weights=dict(reversed(weights.items())))


def test_which_gpu_does_not_count_but_how_many_do() -> None:
    def key(*devices: str) -> str:
        made = fx.Graph()
        for device in devices:
            made.call_function(aten.zeros.default, ([3],), {"device": torch.device(device)})
        return key_of(fx.GraphModule(torch.nn.Module(), made))

    assert key("cuda:0", "cuda:0") == key("cuda:3", "cuda:3")
    assert key("cuda:0", "cuda:1") == key("cuda:1", "cuda:0")
    others = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "cuda"), ("cpu", "cuda:0"), ("cpu", "cpu")]
    assert len({key(*devices) for devices in others}) == len(others)


def test_constants_and_nested_graphs_count_by_content() -> None:
    def graph(branch: Callable[..., Any], bias: torch.Tensor) -> fx.GraphModule:
        root = torch.nn.Module()
        root.bias = bias
        root.branch = fx.symbolic_trace(branch)
        made = fx.Graph()
        x = made.placeholder("x")
        inner = made.get_attr("branch")
        y = made.call_function(torch.ops.higher_order.cond, (True, inner, inner, [x]))
        made.output(made.call_function(aten.add.Tensor, (y, made.get_attr("bias"))))
        return fx.GraphModule(root, made)

    one = torch.arange(6.0)
    keys = [
        key_of(graph(branch, bias), ranges={})
        for branch in (lambda x: x + 1, lambda x: x + 2)
        for bias in (one, one + 1, one.view(2, 3), one.int(), one.to(torch.float64))
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(graph(lambda x: x + 1, one.clone()), ranges={}) == keys[0]


@pytest.mark.parametrize("target", [lambda x: x, object(), torch.nn.ReLU(), (lambda: [].append)(), {1, 2}])
def test_what_has_no_content_is_refused(target: Any) -> None:
    graph = captured(lambda x: x * 2, torch.randn(3))
    node = next(node for node in graph.graph.nodes if node.op == "call_function")
    node.args = (node.args[0], target)
    with pytest.raises(Unsupported, match="part of a cache key"):
        key_of(graph)


PROCESS = """
import json, sys
sys.path[:0] = sys.argv[1:]
from test_cache_key import graphs, key_of
print(json.dumps({name: key_of(graph) for name, graph in graphs().items()}))
"""


def test_keys_are_equal_in_every_process() -> None:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process has
    command = [sys.executable, "-c", PROCESS, str(ROOT), str(ROOT / "tests")]
    other = subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
    here = {name: key_of(graph) for name, graph in graphs().items()}
    output, _ = other.communicate(timeout=100)
    assert json.loads(output.splitlines()[-1]) == here


class TestDigest:
    """The content digest of a tensor."""

    def test_dtype_shape_and_content_count(self) -> None:
        zeros = [torch.zeros(4, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.bool, torch.bfloat16)]
        others = [
            torch.zeros(()),
            torch.zeros(1),
            torch.zeros(0),
            torch.zeros(0, 3),
            torch.zeros(2, 2),
            -torch.zeros(4),
        ]
        more = [torch.zeros(4, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)]
        ones = [
            torch.ones(4),
            torch.tensor([0.0, 0.0, 0.0, 1.0]),
            torch.tensor([1.0, 0.0, 0.0, 0.0]),
            torch.tensor(math.nan),
        ]
        digests = [digest(tensor) for tensor in (*zeros, *others, *more, *ones)]
        assert len(set(digests)) == len(digests)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
    def test_strides_do_not_count(self, dtype: torch.dtype) -> None:
        tensor = torch.randn(4, 6).to(dtype)
        expected = digest(tensor.clone())
        padded = torch.zeros(9, 20).to(dtype)
        padded[1:5, 1:13:2] = tensor
        assert digest(tensor.t().contiguous().t()) == expected
        assert digest(padded[1:5, 1:13:2]) == expected
        assert digest(torch.stack([tensor.t().reshape(4, 6), tensor])[1]) == expected
        assert digest(torch.nn.Parameter(tensor, requires_grad=False)) == expected
        assert digest(tensor.t()) != expected

    def test_lazy_signs_are_resolved(self) -> None:
        tensor = torch.randn(3, dtype=torch.complex64)
        assert digest(tensor.conj()) == digest(tensor.conj().resolve_conj()) != digest(tensor)
        assert digest(tensor.conj().imag) == digest(-tensor.imag)

    def test_the_tensor_is_only_read(self) -> None:
        tensor = torch.nn.Parameter(torch.randn(100))
        lazy = torch._lazy_clone(tensor.detach())
        expected = digest(tensor.detach().clone())
        assert digest(tensor) == digest(lazy) == digest(tensor[:]) == expected
        assert torch._C._is_cow_tensor(lazy)  # type: ignore[attr-defined]
        assert tensor._version == 0

    def test_inside_a_trace(self) -> None:
        tensor = torch.randn(3, 4).t()
        with FakeTensorMode():
            inside = digest(tensor)
        assert inside == digest(tensor)

    @pytest.mark.cuda
    def test_the_device_does_not_count(self) -> None:
        tensor = torch.randn(1000, 600)
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64):
            host = tensor.to(dtype)
            device = host.cuda()
            assert digest(device) == digest(host)
            assert digest(device[::3, 1:].t()) == digest(host[::3, 1:].t())
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**8)
            late = tensor.cuda() * 2
            with FakeTensorMode():
                inside = digest(late)
        assert inside == digest(tensor * 2)

    def test_what_has_no_bytes_is_refused(self) -> None:
        emptied = torch.randn(4)
        emptied.untyped_storage().resize_(0)
        with FakeTensorMode():
            fake = torch.randn(4)
        for tensor in (emptied, fake, torch.randn(4, device="meta"), torch.randn(4, 4).to_sparse()):
            with pytest.raises(Unsupported, match="cache key"):
                digest(tensor)


def test_all_pairs_of_graphs_differ() -> None:
    keys = {name: key_of(graph) for name, graph in graphs().items()}
    assert all(keys[one] != keys[other] for one, other in itertools.combinations(keys, 2))


def test_results_that_nobody_uses_take_no_part() -> None:
    """A batch norm's second and third result are empty on the CPU and full on a GPU."""

    def keys(sizes: int, used: int) -> str:
        graph = fx.Graph()
        x = graph.placeholder("x")
        norm = graph.call_function(torch.ops.aten._native_batch_norm_legit_no_training.default, (x,))
        first = graph.call_function(operator.getitem, (norm, used))
        graph.output((first,))
        values = (
            torch.empty(2, 3, device="meta"),
            torch.empty(sizes, device="meta"),
            torch.empty(sizes, device="meta"),
        )
        x.meta["val"], norm.meta["val"], first.meta["val"] = values[0], values, values[0]
        return key_of(fx.GraphModule({}, graph))

    assert keys(0, 0) == keys(3, 0) and keys(0, 1) != keys(3, 1) and keys(3, 0) != keys(3, 1)
