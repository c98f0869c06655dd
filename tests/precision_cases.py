"""What the tests of precision share: segments with and without casts, what is checked of them, and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from benchmarks.models import MODELS
from trt_dynamo import Settings
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.partition import Segment, partition
from trt_dynamo.precision import Chosen, Precision

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def segments_of(model: Any, *args: Any, dynamic: bool | None = None, **options: Any) -> list[tuple[Segment, list[Any]]]:
    """The segments of a model and their weights."""
    settings = Settings(min_segment_nodes=1, **options)
    found: list[tuple[Segment, list[Any]]] = []

    def look(lowered: Lowered) -> Callable[..., Any]:
        original = lowered.module.forward
        with unset_fake_temporarily(), torch.no_grad():
            parts = partition(lowered.module, lowered.names, settings)
            found.extend((segment, lowered.weights_of(segment.weights)) for segment in parts.segments)
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


X = torch.randn(4, 8)
IMAGES = torch.randn(2, 8, 9, 9)
IDS = torch.randint(0, 9, (2, 5))


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


def by_hand(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-12)


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
