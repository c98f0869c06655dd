"""The setting `precision`: what computes in a half type, what stays in float32, and what comes of it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

import trt_dynamo
from benchmarks.models import MODELS
from tests.compiled import compiled
from trt_dynamo import Settings
from trt_dynamo.aten_converters import Network, convert
from trt_dynamo.aten_converters.registry import CONVERTERS, Converter, match_parameters
from trt_dynamo.backend import placeholder_names
from trt_dynamo.build import build, profile_of
from trt_dynamo.cache import open_store
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import Segment, partition
from trt_dynamo.precision import Chosen, Precision
from trt_dynamo.precision.keep import kept_by
from trt_dynamo.precision.magnitudes import Magnitude, measured
from trt_dynamo.precision.recording import forget_all
from trt_dynamo.reports import report
from trt_dynamo.tf32 import allows_tf32

aten = torch.ops.aten
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    forget_all()
    yield
    forget_all()


def segments_of(model: Any, *args: Any, dynamic: bool | None = None, **options: Any) -> list[tuple[Segment, list[Any]]]:
    """The segments of a model and their weights."""
    settings = Settings(min_segment_nodes=1, **options)
    found: list[tuple[Segment, list[Any]]] = []

    def look(lowered: Lowered) -> Callable[..., Any]:
        original = lowered.module.forward
        with unset_fake_temporarily(), torch.no_grad():
            parts = partition(lowered.module, lowered.names, settings)
            names = placeholder_names(lowered.module)
            weights = [[lowered.weights[names.index(name)] for name in s.weights] for s in parts.segments]
            found.extend(zip(parts.segments, weights, strict=True))
        return original

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return lower(module, inputs, look, settings)

    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        run: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=dynamic)
        run(*args)
    return found


def chosen_of(model: Any, *args: Any, dynamic: bool | None = None, **options: Any) -> list[tuple[Segment, Chosen]]:
    settings = Settings(min_segment_nodes=1, strict=True, **options)
    return [
        (segment, Precision(segment.module, segment.weights, settings).graph(weights))
        for segment, weights in segments_of(model, *args, dynamic=dynamic, **options)
    ]


def computes_in(module: GraphModule, dtype: torch.dtype) -> list[str]:
    """The ops with a result of the type, casts left out, by name and in order."""
    return [
        str(node.target.overloadpacket).split(".")[-1]
        for node in module.graph.nodes
        if hasattr(node.target, "overloadpacket")
        and node.target not in CASTS
        and any(isinstance(v, Tensor) and v.dtype is dtype for v in values(node))
    ]


def values(node: Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value if isinstance(value, tuple | list) else (value,)


def low_ops(model: Any, *args: Any, precision: str = "fp16", **options: Any) -> set[str]:
    """The ops that compute in the half type, those left out that only move."""
    moving = {"view", "t", "permute", "expand", "unsqueeze", "transpose", "_unsafe_view", "clone", "select", "slice"}
    found = [
        computes_in(c.module, HALVES[precision]) for _, c in chosen_of(model, *args, precision=precision, **options)
    ]
    return {name for names in found for name in names} - moving


def reasons(model: Any, *args: Any, precision: str = "fp16", **options: Any) -> str:
    chosen = chosen_of(model, *args, precision=precision, **options)
    return "; ".join(f"{kept.target}: {kept.reason}" for _, each in chosen for kept in each.kept)


def check_casts(module: GraphModule, original: GraphModule) -> None:
    """Arguments and results have their types, no cast is undone, none is made twice or for nothing."""
    for mine, old in zip(
        module.graph.find_nodes(op="placeholder"), original.graph.find_nodes(op="placeholder"), strict=True
    ):
        assert mine.name == old.name and same_type(mine, old)
    for mine, old in zip(results_of(module), results_of(original), strict=True):
        assert same_type(mine, old), mine
    made, own = set(), {node.name for node in original.graph.nodes if node.target in CASTS}
    for node in module.graph.nodes:
        if node.target in CASTS and node.name not in own:
            (source, *_), dtype = node.args, node.meta["val"].dtype
            assert source.meta["val"].dtype is not dtype or "memory_format" in node.kwargs, f"{node} casts nothing"
            assert (source, dtype) not in made, f"{node} is made twice"
            made.add((source, dtype))
            if source.target in CASTS:
                assert source.args[0].meta["val"].dtype is not dtype, f"{node} undoes {source}"
        assert node.op in ("placeholder", "output") or node.users, f"{node} has no reader"


def results_of(module: GraphModule) -> list[Node]:
    (output,) = module.graph.find_nodes(op="output")
    return list(output.args[0])


def same_type(a: Node, b: Node) -> bool:
    return getattr(a.meta["val"], "dtype", None) is getattr(b.meta["val"], "dtype", None)


def cosine(actual: Tensor, expected: Tensor) -> float:
    a, b = actual.double().flatten(), expected.double().flatten()
    return float(F.cosine_similarity(a, b, dim=0))


# What runs how


X = torch.randn(4, 8)
IMAGES = torch.randn(2, 8, 9, 9)


class Mixed(nn.Module):
    """Embedding, attention with a mask of the least float32, norms, a gate, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.qkv, self.out = (
            nn.Embedding(9, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        result: Tensor = (x + F.silu(self.out(x))).mean(1)
        return result


IDS = torch.randint(0, 9, (2, 5))


def linear(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A linear layer before and behind the function."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(function(self.first(x)))
            return result

    return Between()


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_hand(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-12)


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
    ("test_precision.py:{here}", True),
    ("*/test_precision.py:{here}", True),
    ("test_precision.py:{before}-{here}", True),
    ("test_precision.py:{before}", False),
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
    here = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "self.last(function" in text)
    wanted = pattern.format(here=here, before=here - 1)
    assert (kept_by(node, ["nothing", wanted]) == wanted) is expected


def test_what_a_converter_refuses_in_the_half_type_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    known = CONVERTERS[aten.gelu.default]

    def picky(net: Network, x: trt_dynamo.Tensor, *, approximate: str = "none") -> Any:
        if x.dtype is torch.float16:
            raise trt_dynamo.Unsupported("not in half")
        return known.function(net, x, approximate=approximate)

    replaced = Converter(known.target, picky, match_parameters(known.target, picky))
    monkeypatch.setitem(CONVERTERS, aten.gelu.default, replaced)
    model = linear(F.gelu)
    assert low_ops(model, X) == {"addmm"}
    assert "in float16: not in half" in reasons(model, X)
    assert low_ops(model, X, precision="bf16") == {"addmm", "gelu"}


def test_a_magnitude_tells_what_does_not_fit() -> None:
    half = torch.float16

    def misfit(values: Tensor) -> str:
        return Magnitude(*measured(values, half).tolist()).misfit(half)

    torch.manual_seed(0)
    assert misfit(torch.randn(1000)) == misfit(torch.zeros(3)) == misfit(torch.empty(0)) == ""
    assert misfit(torch.tensor([1.0, torch.inf, torch.nan, 16000])) == ""
    assert "reach 1.7e+04" in misfit(torch.tensor([1.0, -17000]))
    assert "would change it" in misfit(torch.randn(1000) * 1e-6)
    assert misfit(torch.cat([torch.randn(1000), torch.randn(1000) * 1e-9])) == ""
    both = Magnitude(1, 0.5, 0.1) | Magnitude(2, 0.7, 0.05)
    assert both == Magnitude(2, 0.5, 0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16", "auto"])
def test_a_model_in_a_half_type_on_a_gpu(precision: str) -> None:
    model, args = models("cnn")
    model, args = model.cuda(), tuple(arg.cuda() for arg in args)
    fast = compiled(model, precision=precision, calibration_calls=2, strict=True, cache="off")
    with torch.no_grad():
        for _ in range(3):
            assert cosine(fast(*args), model(*args)) > 0.9999
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert report()["engine_calls"] >= 1


# What comes of it


class Small(nn.Module):
    """A residual network with a norm, for images of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(x + self.block(x), 2)
        result: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTM(12, 24, 2, bidirectional=True), nn.GRU(48, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.gru(self.lstm(x)[0])[0])
        return result


def models(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if name == "cnn":
        return Small().eval(), (torch.randn(2, 3, 16, 16),)
    if name == "recurrent":
        return Recurrent().eval(), (torch.randn(9, 2, 12),)
    if name == "transformer":
        return Mixed().eval(), (IDS,)
    model, args = MODELS[name](layers=2, hidden=128, length=12)
    return model, tuple(args)


LARGE = [pytest.param(name, precision, marks=pytest.mark.slow) for name in ("gpt2", "bert") for precision in HALVES]
QUICK = [("cnn", "fp16"), ("cnn", "bf16"), ("recurrent", "fp16"), ("recurrent", "bf16"), ("transformer", "fp16")]


@pytest.mark.parametrize(("name", "precision"), [*QUICK, *LARGE])
def test_a_model_in_a_half_type_stays_close_to_itself(name: str, precision: str) -> None:
    model, args = models(name)
    fast = compiled(model, precision=precision, strict=True, cache="off")
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        (expected, *_), (actual, *_) = results(model(*args)), results(fast(*args))
    assert actual.dtype is expected.dtype is torch.float32
    assert cosine(actual, expected) > 1 - 1e-4
    assert not torch.equal(actual, expected)
    assert report()["eager_calls"] == 0


def results(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [v for v in output.to_tuple() if isinstance(v, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_minilm_in_a_half_type_ranks_as_itself(precision: str) -> None:
    embedding = pytest.importorskip("trt_dynamo.demo.embedding")
    model, tokenizer = embedding.load(torch.device("cpu"))
    batch = tokenizer.batch(embedding.lines_of("sentences"), range(24))
    fast = compiled(model, precision=precision, strict=True, cache="off")
    with torch.no_grad():
        expected, actual = model(batch.ids, batch.mask), fast(batch.ids, batch.mask)
    assert F.cosine_similarity(actual, expected).min() > 0.999
    rows = (expected @ expected.mT - 2 * torch.eye(24)).argmax(1)
    assert torch.equal(rows, (actual @ actual.mT - 2 * torch.eye(24)).argmax(1))


class Attend(nn.Module):
    """Attention by torch's function, and written out, with a mask that is added."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.project, self.written_out = nn.Linear(16, 48), written_out

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        if self.written_out:
            result: Tensor = (q @ k.mT / 4 + mask).softmax(-1) @ v
            return result
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask[:, None])[:, 0]


MASKS = {
    "the least float32": torch.finfo(torch.float32).min,
    "-1e9": -1e9,
    "-1e4": -1e4,
    "minus infinity": -torch.inf,
}


@pytest.mark.parametrize("written_out", [False, True], ids=["a function", "written out"])
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("value", MASKS.values(), ids=MASKS)
def test_a_mask_stays_a_mask(value: float, precision: str, written_out: bool) -> None:
    torch.manual_seed(0)
    model, x = Attend(written_out).eval(), torch.randn(3, 6, 16)
    mask = torch.zeros(3, 6, 6).masked_fill(torch.rand(3, 6, 6) > 0.6, value)
    mask[0, 1] = 0
    mask[1] = value  # rows that may look at nothing
    fast = compiled(model, precision=precision, strict=True, cache="off")
    with torch.no_grad():
        actual, expected, value_of = fast(x, mask), model(x, mask), model.project(x)[..., 32:]
    if value < -1e5 and value != -torch.inf:  # float32 has no digits left for the scores then
        assert actual[1].abs().max() <= value_of[1].abs().max() * 1.01
        actual, expected = actual[[0, 2]], expected[[0, 2]]
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2, equal_nan=True)


def test_a_small_epsilon_keeps_a_quotient_finite() -> None:
    model = linear(by_hand).eval()
    fast, x = compiled(model, precision="fp16", strict=True, cache="off"), torch.zeros(4, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("weights", ["auto", "inputs"])
def test_changed_weights_are_followed(weights: str) -> None:
    model, args = models("cnn")
    fast = compiled(model, precision="fp16", weights=weights, strict=True, cache="off")
    with torch.no_grad():
        for _ in range(3):
            assert cosine(fast(*args), model(*args)) > 0.9999
            for parameter in model.parameters():
                parameter.mul_(1.1).add_(0.01)
        fast(*args)
        assert cosine(fast(*args), model(*args)) > 0.9999
    assert report()["refits"] == (0 if weights == "inputs" else 3)


def test_weights_beyond_the_half_type_stay_in_float32() -> None:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    model, x = nn.Sequential(first, last), torch.randn(3, 4) / 1e5
    with torch.no_grad():
        first.weight.fill_(1e5)
        assert "its values reach 1e+05" in reasons(model, x)
        fast = compiled(model, precision="fp16", strict=True, cache="off")
        assert cosine(fast(x), model(x)) > 0.9999
        last.weight.fill_(1e6)
        for _ in range(12):
            assert cosine(fast(x), model(x)) > 0.9999


def test_a_weight_is_held_in_the_half_type_alone() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Conv1d(6, 6, 1)).eval()
    ((segment, chosen),) = chosen_of(model, torch.zeros(2, 6, dtype=torch.int64), precision="fp16")
    weights = dict(zip(segment.weights, [p.detach() for p in model.parameters()], strict=True))
    network = convert(chosen.module, weights)
    assert {value.dtype for value in network.constants.values() if value.is_floating_point()} == {torch.half}
    assert sum(v.nbytes for v in network.constants.values()) <= sum(p.nbytes for p in model.parameters()) // 2 + 64


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


class Rotated(nn.Module):
    """Complex numbers between two products, and a buffer of them."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.randn(6, 4)))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.layer(x).unflatten(-1, (4, 2)).contiguous()) * self.turns
        result: Tensor = self.layer(torch.view_as_real(pairs).flatten(-2))
        return result


@pytest.mark.parametrize("precision", ["fp16", "auto"])
def test_complex_numbers_stay_and_one_engine_serves_many_sizes(precision: str) -> None:
    model = Rotated().eval()
    fast = compiled(model, dynamic=True, precision=precision, calibration_calls=1, strict=True, cache="off")
    with torch.no_grad():
        fast(torch.randn(4, 6, 8))
        for size in (2, 5, 3):
            x = torch.randn(size, 6, 8)
            assert cosine(fast(x), model(x)) > 0.9999
    assert report()["engines_built"] == 1


# Values that were recorded


class Logits(nn.Module):
    """Logits of about 1e6 from inputs of about 1, for a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.grow = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        big = self.grow(self.body(x).relu() * 300) * 9000
        result: Tensor = self.head(big).mul(1e-6).tanh() + self.body(x)[:, :4]
        return result


def overflowing() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return Logits().eval(), torch.randn(8, 16)


def test_an_overflow_is_seen_and_kept_out() -> None:
    model, x = overflowing()
    with torch.no_grad():
        naive = compiled(model, precision="fp16", cache="off")(x)
        assert not cosine(naive, model(x)) > 0.999
        torch._dynamo.reset()
        fast = compiled(model, precision="auto", calibration_calls=3, strict=True, cache="off")
        for _ in range(5):
            assert cosine(fast(x), model(x)) > 0.999
    assert report()["eager_reasons"] == {"precision=auto records the values": 3}
    assert report()["engine_calls"] >= 2


def test_calibrate_tells_what_stays_and_spares_the_first_calls() -> None:
    model, x = overflowing()
    found = trt_dynamo.calibrate(model, [x, (x * 0.5,), {"x": x[:3]}], options={"min_segment_nodes": 1})
    assert found.batches == 3 and any("its values reach" in kept.reason for kept in found.kept)
    assert "float16 ends at 6.55e+04" in str(found)
    told = trt_dynamo.explain(model, x, options={"precision": "auto", "min_segment_nodes": 1})
    (precision,) = told.precision
    assert precision.recorded and {k.reason for k in precision.chosen.kept} <= {k.reason for k in found.kept}
    fast = compiled(model, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        assert cosine(fast(x), model(x)) > 0.999
    assert report()["eager_calls"] == 0
    with pytest.raises(ValueError, match="no batch"):
        trt_dynamo.calibrate(model, [])


def test_small_values_are_kept_too() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), torch.randn(4, 8) * 1e-7
    found = trt_dynamo.calibrate(model, [x], options={"min_segment_nodes": 1})
    assert any("rounding to float16" in kept.reason for kept in found.kept)
    fast = compiled(model, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        assert cosine(fast(x), model(x)) > 0.9999


def test_the_choice_lies_beside_the_engine_and_two_choices_never_share_one(tmp_path: Path) -> None:
    model, x = overflowing()
    options: dict[str, Any] = {"precision": "auto", "strict": True, "cache_dir": tmp_path}
    with torch.no_grad():
        fast = compiled(model, calibration_calls=1, **options)
        fast(x), fast(x)
        assert report()["engines_built"] == 1
        forget_all()  # as in another process
        torch._dynamo.reset()
        again = compiled(model, **options)
        assert cosine(again(x), model(x)) > 0.999
        assert report()["cache_hits"] == 1 and report()["eager_calls"] == 1
        (entry,) = open_store(Settings(cache_dir=tmp_path)).entries()
        assert entry.manifest["precision"]["misfits"]
        forget_all()
        torch._dynamo.reset()
        trt_dynamo.calibrate(model, [x * 1e-3], options={"min_segment_nodes": 1})  # another choice
        other = compiled(model, **options)
        other(x * 1e-3)
        assert report()["engines_built"] == 2


def test_what_was_recorded_serves_other_sizes() -> None:
    model, x = overflowing()
    trt_dynamo.calibrate(model, [x], options={"min_segment_nodes": 1})
    fast = compiled(model, dynamic=True, precision="auto", strict=True, cache="off")
    with torch.no_grad():
        for size in (8, 5, 3):
            assert cosine(fast(x[:size]), model(x[:size])) > 0.999
    assert report()["eager_calls"] == 0


def test_explain_tells_the_precision() -> None:
    told = trt_dynamo.explain(Mixed(), IDS, options={"precision": "fp16", "precision_keep": "silu"})
    text, data = str(told), told.as_dict()
    assert "nodes compute in fp16" in text and "precision_keep=silu" in text
    assert data["precision"][0]["kept"][0]["reason"] == "precision_keep=silu"
    assert trt_dynamo.explain(Mixed(), IDS).precision == ()
    assert "recorded no values yet" in str(trt_dynamo.explain(Mixed(), IDS, options={"precision": "auto"}))


# TensorRT


def plan_of(model: nn.Module, *args: Any, targets: tuple[str, ...] = (), **options: Any) -> bytes:
    settings = Settings(targets=targets, **options)
    ((segment, weights),) = segments_of(model, *args, targets=targets, **options)
    chosen = Precision(segment.module, segment.weights, settings).graph(weights)
    wide = settings.fp16_accumulate == "float32"
    copies = dict(zip(segment.weights, weights, strict=True))
    network = convert(chosen.module, copies, wide_products=wide)
    return build(network, profile_of(network, {}), settings)


def wide_mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024)) for _ in range(2)]
    return nn.Sequential(*layers).eval(), torch.randn(4, 1024)


@pytest.mark.parametrize("target", ["8.9", "12.0"])
@pytest.mark.parametrize("options", [{}, {"fp16_accumulate": "float32"}], ids=["default", "accumulate in float32"])
def test_a_plan_of_halves_is_half_as_large(target: str, options: dict[str, Any]) -> None:
    model, x = wide_mlp()
    native = len(plan_of(model, x, targets=(target,)))
    for precision in HALVES:
        assert len(plan_of(model, x, targets=(target,), precision=precision, **options)) < 0.56 * native


@pytest.fixture
def switch() -> Iterator[Callable[[str, str], None]]:
    """Sets one of torch's switches for TF32; all are as before afterwards."""
    before: dict[str, str] = {}

    def change(which: str, value: str) -> None:
        owner = operator.attrgetter(which)(torch.backends)
        before.setdefault(which, owner.fp32_precision)
        owner.fp32_precision = value

    yield change
    for which, value in before.items():
        operator.attrgetter(which)(torch.backends).fp32_precision = value


TF32: list[tuple[str, Callable[[Tensor], Tensor], Tensor, dict[str, str], bool]] = [
    ("products, by default", lambda x: x @ torch.ones(8, 3), X, {}, False),
    ("products, switched on", lambda x: x @ torch.ones(8, 3), X, {"cuda.matmul": "tf32"}, True),
    ("convolutions, by default", lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)), IMAGES, {}, True),
    ("convolutions, off", lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)), IMAGES, {"cudnn.conv": "ieee"}, False),
    ("both, by default", lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1)).mT @ torch.ones(9, 2), IMAGES, {}, False),
    ("neither", lambda x: x.exp(), X, {"cuda.matmul": "tf32"}, False),
]


@pytest.mark.parametrize(("name", "function", "x", "switches", "expected"), TF32, ids=[case[0] for case in TF32])
def test_tf32_follows_torch(
    name: str,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    switches: dict[str, str],
    expected: bool,
    switch: Callable[[str, str], None],
) -> None:
    for which, value in switches.items():
        switch(which, value)
    ((segment, _),) = segments_of(function, x)
    assert allows_tf32(segment.module) is expected


def test_tf32_is_part_of_the_key(switch: Callable[[str, str], None], tmp_path: Path) -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    for value in ("tf32", "ieee", "tf32"):
        switch("cuda.matmul", value)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled(model, cache_dir=tmp_path, strict=True)(x)
    assert report()["engines_built"] == 2 and report()["cache_hits"] == 1


def test_products_of_halves_add_up_in_float32_where_asked() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    ((segment, chosen),) = chosen_of(model, x, precision="fp16")
    weights = dict(zip(segment.weights, model.parameters(), strict=True))
    for wide in (False, True):
        network = convert(chosen.module, weights, wide_products=wide).network.raw
        kinds = [network.get_layer(i) for i in range(network.num_layers)]
        (product,) = [layer for layer in kinds if layer.type.name == "MATRIX_MULTIPLY"]
        assert product.get_input(0).dtype.name == ("FLOAT" if wide else "HALF")
    fast = compiled(model, precision="fp16", fp16_accumulate="float32", strict=True, cache="off")
    with torch.no_grad():
        assert cosine(fast(x), model(x)) > 0.9999


# Any graph


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
