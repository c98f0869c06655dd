"""The setting `precision`: what computes in a half type, what stays in float32, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from trt_dynamo import Settings
from trt_dynamo.backend import placeholder_names
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import Segment, partition
from trt_dynamo.precision import Chosen, Precision
from trt_dynamo.precision.recording import forget_all

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

    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        backend = lambda module, inputs: lower(module, inputs, look, settings)  # noqa: E731
        torch.compile(model, backend=backend, dynamic=dynamic)(*args)
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
        str(node.target.overloadpacket).split(".")[-1]  # type: ignore[union-attr]
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
    return list(output.args[0])  # type: ignore[arg-type]


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
        return (x + F.silu(self.out(x))).mean(1)


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
