"""Which nodes compute in a half type and which in float32, and that the graph with casts is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trt_dynamo
from tests import precision_cases
from tests.compiled import compiled
from tests.precision_cases import (
    HALVES,
    IDS,
    IMAGES,
    Mixed,
    X,
    by_hand,
    check_casts,
    chosen_of,
    computes_in,
    linear,
    low_ops,
    reasons,
    segments_of,
)
from trt_dynamo.aten_converters import Network
from trt_dynamo.aten_converters.registry import CONVERTERS, Converter, match_parameters
from trt_dynamo.precision.keep import kept_by


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


LOW: dict[str, tuple[nn.Module | Callable[..., Any], Tensor, set[str]]] = {
    "a linear layer alone": (nn.Linear(8, 8), X, {"addmm"}),
    "nothing but elementwise work": (lambda x: (x * 2 + 1).relu(), X, set()),
    "a transformer": (
        Mixed(),
        IDS,
        {"embedding", "addmm", "unbind", "scaled_dot_product_attention", "add", "silu"},
    ),
    "a convolution, its batch norm, pooling": (
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)).eval(),
        IMAGES,
        {"convolution", "_native_batch_norm_legit_no_training", "relu", "max_pool2d_with_indices", "avg_pool2d"},
    ),
    "an average of many": (nn.Sequential(nn.Conv2d(8, 8, 1), nn.AvgPool2d(9)), IMAGES, {"convolution"}),
    "activations": (linear(lambda x: F.gelu(x).tanh().sigmoid()), X, {"addmm", "gelu", "tanh", "sigmoid"}),
    "softmax": (linear(lambda x: x.softmax(-1)), X, {"addmm"}),
    "what grows": (linear(lambda x: x.exp().log1p().pow(3).cumsum(0)), X, {"addmm"}),
    "layer norm": (linear(nn.LayerNorm(8)), X, {"addmm"}),
    "a norm by the root mean square": (linear(rms), X, {"addmm"}),
    "a norm written out": (linear(by_hand), X, {"addmm"}),
    "a square": (linear(lambda x: x * x), X, {"addmm"}),
    "a quotient": (linear(lambda x: x / (x.abs() + 1)), X, {"addmm", "add", "abs"}),
    "a mask of -1e9": (linear(lambda x: x.masked_fill(x > 0, -1e9)), X, {"addmm"}),
    "a mask of minus infinity": (linear(lambda x: x.masked_fill(x > 9, -torch.inf)), X, {"addmm", "where"}),
    "an epsilon": (linear(lambda x: (x + 1e-8).relu()), X, {"addmm"}),
    "a large integer": (linear(lambda x: x + torch.arange(4)[:, None] * 70000), X, {"addmm"}),
    "a large factor": (linear(lambda x: x * 1e6), X, {"addmm"}),
    "one-hot numbers": (lambda x: F.one_hot(x, 9).float() @ torch.ones(9, 3), IDS, set()),
    "angles": (lambda x: torch.outer(x[0].float(), X[0]).sin(), IDS, set()),
    "places": (lambda x: (x @ torch.ones(8, 3)).sin(), X, set()),
    "images of bytes": (
        nn.Sequential(nn.Flatten(1), nn.Linear(8, 8)),
        X,
        {"addmm"},
    ),
    "who casts means it": (lambda x: x.half().float() @ torch.ones(8, 3), X, set()),
    "float64 in it": (lambda x: (x.double() @ torch.ones(8, 3, dtype=torch.float64)).float(), X, set()),
    "LSTM": (nn.LSTM(8, 8), torch.randn(3, 2, 8), {"lstm"}),
}


@pytest.mark.parametrize("name", LOW)
def test_what_computes_in_the_half_type(name: str) -> None:
    model, x, expected = LOW[name]
    call = model if isinstance(model, nn.Module) else (lambda *args: model(*args))
    for precision in ("fp16",):
        assert low_ops(call, x, precision=precision) - {"full"} == expected
    for segment, chosen in chosen_of(call, x, precision="fp16"):
        check_casts(chosen.module, segment.module)


def test_bytes_may_be_rounded_but_not_numbers_of_places() -> None:
    weight = torch.ones(8, 3)
    assert low_ops(lambda x: (x.float() / 255) @ weight, torch.zeros(4, 8, dtype=torch.uint8)) >= {"mm"}
    assert low_ops(lambda x: (x.float() / 255) @ weight, torch.zeros(4, 8, dtype=torch.int32)) == set()


def test_native_changes_nothing() -> None:
    for segment, chosen in chosen_of(Mixed(), IDS):
        assert chosen.module is segment.module


KEPT: list[tuple[str, set[str]]] = [
    ("addmm", {"embedding", "scaled_dot_product_attention", "add"}),
    ("aten.silu", {"embedding", "addmm", "unbind", "scaled_dot_product_attention", "add"}),
    ("trt_dynamo.scaled_dot*", {"embedding", "addmm", "unbind", "silu"}),
    ("qkv", {"embedding", "scaled_dot_product_attention", "addmm", "add", "silu"}),
    ("Linear", {"embedding", "scaled_dot_product_attention", "add"}),
    ("nothing-of-this-name", {"embedding", "addmm", "unbind", "scaled_dot_product_attention", "add", "silu"}),
]


@pytest.mark.parametrize(("pattern", "expected"), KEPT, ids=[pattern for pattern, _ in KEPT])
def test_what_the_user_keeps(pattern: str, expected: set[str]) -> None:
    assert low_ops(Mixed(), IDS, precision_keep=(pattern,)) - {"full"} == expected


LINES: list[tuple[str, bool]] = [
    ("precision_cases.py:{here}", True),
    ("*/precision_cases.py:{here}", True),
    ("precision_cases.py:{before}-{here}", True),
    ("precision_cases.py:{before}", False),
    ("other.py:{here}", False),
    ("Linear", True),
    ("last", True),
    ("l?st", True),
    ("las", False),
]


@pytest.mark.parametrize(("pattern", "expected"), LINES, ids=[pattern for pattern, _ in LINES])
def test_patterns_name_lines_and_modules(pattern: str, expected: bool) -> None:
    model = linear(torch.exp)
    ((segment, _),) = segments_of(model, X)
    *_, node = (n for n in segment.module.graph.nodes if "addmm" in n.name)
    here = next(
        i
        for i, text in enumerate(Path(precision_cases.__file__).read_text().splitlines(), 1)
        if "self.last(function" in text
    )
    wanted = pattern.format(here=here, before=here - 1)
    assert (kept_by(node, ["nothing", wanted]) == wanted) is expected


def test_what_a_converter_refuses_in_the_half_type_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    known = CONVERTERS[torch.ops.aten.gelu.default]

    def picky(net: Network, x: trt_dynamo.Tensor, *, approximate: str = "none") -> Any:
        if x.dtype is torch.float16:
            raise trt_dynamo.Unsupported("not in half")
        return known.function(net, x, approximate=approximate)

    replaced = Converter(known.target, picky, match_parameters(known.target, picky))
    monkeypatch.setitem(CONVERTERS, torch.ops.aten.gelu.default, replaced)
    model = linear(F.gelu)
    assert low_ops(model, X) == {"addmm"}
    assert "in float16: not in half" in reasons(model, X)
    assert low_ops(model, X, precision="bf16") == {"addmm", "gelu"}


def test_half_models_and_autocast_are_honoured() -> None:
    x = torch.randn(4, 8)
    half = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16()
    for precision in ("native", "fp16", "bf16"):
        for segment, chosen in chosen_of(half, x.bfloat16(), precision=precision):
            assert chosen.module is segment.module

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, torch.ones(8, 8)).softmax(-1)

    (before,), (after,) = segments_of(autocast, x), chosen_of(autocast, x, precision="fp16")
    kept = computes_in(before[0].module, torch.bfloat16)
    assert kept and computes_in(after[1].module, torch.bfloat16) == kept


def test_eager_between_engines_keeps_its_types() -> None:
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    seen = []

    def watched(x: Tensor) -> Tensor:
        x = F.gelu(first(x))
        return F.gelu(last(torch.linalg.det(x[:, :, None] * x[:, None]) * 0 + x.mT).mT)

    x = torch.randn(8, 8)
    found = chosen_of(watched, x, precision="fp16")
    assert len(found) == 2
    for segment, chosen in found:
        check_casts(chosen.module, segment.module)
        seen.append(computes_in(chosen.module, torch.float16))
    assert all(seen)


def test_explain_tells_the_precision() -> None:
    told = trt_dynamo.explain(Mixed(), IDS, options={"precision": "fp16", "precision_keep": "silu"})
    text, data = str(told), told.as_dict()
    assert "nodes compute in fp16" in text and "precision_keep=silu" in text
    assert data["precision"][0]["kept"][0]["reason"] == "precision_keep=silu"
    assert trt_dynamo.explain(Mixed(), IDS).precision == ()
    assert "recorded no values yet" in str(trt_dynamo.explain(Mixed(), IDS, options={"precision": "auto"}))


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.relu,
    torch.tanh,
    torch.exp,
    F.gelu,
    lambda x: x.softmax(-1),
    lambda x: F.layer_norm(x, (6,)),
    lambda x: x.mean(-1, keepdim=True).expand(4, 6),
    lambda x: x.flip(0),
    lambda x: x[:, torch.arange(6)],
    lambda x: x.masked_fill(x > 0.5, -1e9).clamp(-2, 2),
    lambda x: x + 1e-7,
    lambda x: x.reshape(6, 4).mT.contiguous().view(4, 6),
    lambda x: torch.cat(x.chunk(3, -1)[::-1], -1),
    lambda x: x.double().mul(0.5).float(),
    lambda x: x.half().float(),
    lambda x: x.round().to(torch.int64).clamp(-9, 9).float(),
    lambda x: torch.where(x.isnan(), 0.0, x),
    lambda x: x.cumsum(0).clamp(-3, 3),
    lambda x: torch.fft.fft(x).real.clamp(-3, 3),
    lambda x: x.topk(6, -1).values,
]


BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.mul,
    torch.maximum,
    lambda a, b: a @ (b.mT @ a).tanh(),
    lambda a, b: F.scaled_dot_product_attention(a[None, None], b[None, None], a[None, None])[0, 0],
    lambda a, b: torch.where(a > b, a, b),
    lambda a, b: a / (b.abs() + 1e-12).clamp(min=0.1),
    lambda a, b: torch.stack([a, b]).sum(0),
]


def random_function(seed: int) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A graph of 14 ops, half of them on two values, with a linear layer in it."""
    choices = random.Random(seed)
    steps = [(choices.random() < 0.5, choices.randrange(100), choices.random(), choices.random()) for _ in range(14)]
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        made = [x, F.linear(y, weight)]
        for two, which, first, second in steps:
            a, b = made[int(first * len(made))], made[int(second * len(made))]
            made.append(BINARY[which % len(BINARY)](a, b) if two else UNARY[which % len(UNARY)](a))
        return made[-1], made[len(made) // 2], F.linear(made[-2].clamp(-5, 5), weight)

    return function


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))])
def test_any_graph_keeps_its_types_and_casts_nothing_in_vain(seed: int) -> None:
    function, (x, y) = random_function(seed), torch.randn(2, 4, 6)
    precision = random.Random(seed).choice([*HALVES])
    for segment, chosen in chosen_of(function, x, y, precision=precision):
        check_casts(chosen.module, segment.module)
    torch._dynamo.reset()
    fast = compiled(function, precision=precision, strict=True, cache="off")
    for actual, expected in zip(fast(x, y), function(x, y), strict=True):
        assert actual.dtype is expected.dtype and actual.shape == expected.shape
        assert torch.equal(actual.isfinite(), expected.isfinite())
