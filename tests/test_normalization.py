"""Norms against eager: layer, group, instance, batch and root mean square norms, in and out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trt_dynamo.aten_converters import convert
from trt_dynamo.testing import EvaluatedSegment, check, trace
from trt_dynamo.trt import trt

aten = torch.ops.aten

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
HALVES = (torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def kinds(made: Any) -> list[str]:
    raw = made.networks[0].network.raw
    return [raw.get_layer(i).type.name for i in range(raw.num_layers)]


LAYERS = [
    ((5,), (5,)),
    ((3, 5), (5,)),
    ((3, 5), (3, 5)),
    ((2, 3, 5), (5,)),
    ((2, 3, 5), (3, 5)),
    ((2, 3, 4, 5), (4, 5)),
    ((2, 3, 1), (1,)),
]


@both
@pytest.mark.parametrize("shapes", LAYERS, ids=str)
def test_layer_norm(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    shape, inner = shapes
    x, weight, bias = random(*shape) * 3 + 1, random(*inner), random(*inner, seed=1)
    check(lambda x, w, b: F.layer_norm(x, w.shape, w, b), x, weight, bias, dynamic=dynamic)
    check(lambda x, w: F.layer_norm(x, w.shape, w), x, weight, dynamic=dynamic)
    check(lambda x, w: F.layer_norm(x, w.shape, None, w), x, weight, dynamic=dynamic)
    check(lambda x: F.layer_norm(x, x.shape[-len(inner) :], eps=0.5), x, dynamic=dynamic)


@both
def test_layer_norm_is_one_layer(dynamic: bool) -> None:
    made = check(lambda x, w, b: F.layer_norm(x, (5,), w, b), random(2, 3, 5), random(5), random(5), dynamic=dynamic)
    assert kinds(made).count("NORMALIZATION") == 1
    assert "REDUCE" not in kinds(made)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_half_types(dtype: torch.dtype) -> None:
    x, weight, bias = random(2, 4, 6, dtype=dtype) * 3, random(6, dtype=dtype), random(6, dtype=dtype, seed=1)
    near: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2}
    check(lambda x, w, b: F.layer_norm(x, (6,), w, b), x, weight, bias, **near)
    check(lambda x, w, b: F.layer_norm(x, (6,), w, b), x, weight.float(), bias.float(), **near)
    check(lambda x, w: F.rms_norm(x, (6,), w), x, weight, **near)
    check(lambda x, w, b: F.group_norm(x, 2, w, b), x, weight[:4], bias[:4], **near)
    check(lambda x, w, b: F.batch_norm(x, b, w, w, b), x, weight[:4].abs(), bias[:4], **near)
    check(lambda x, m, v: F.batch_norm(x, m, v), x, bias[:4].float(), weight[:4].float().abs(), **near)


@both
def test_results_for_a_backward_pass(dynamic: bool) -> None:
    x, weight = random(2, 3, 4), random(4)
    check(lambda x, w: aten.native_layer_norm(x, [4], w, None, 1e-5), x, weight, dynamic=dynamic)
    check(lambda x: aten.native_group_norm(x, None, None, 2, 4, 6, 2, 1e-5), random(2, 4, 6))
    check(lambda x, w: aten._fused_rms_norm(x, [4], w, 1e-5), x, weight, dynamic=dynamic)


@both
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 3, 5), (2, 4, 3, 2, 2), (1, 4, 1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(shape: tuple[int, ...], groups: int, dynamic: bool) -> None:
    if groups == 4 and shape[2:] in ((), (1, 1)):
        return  # torch refuses one value for each group
    x, weight, bias = random(*shape) * 2 + 3, random(4), random(4, seed=1)
    check(lambda x, w, b: F.group_norm(x, groups, w, b), x, weight, bias, dynamic=dynamic, **NEAR)
    check(lambda x: F.group_norm(x, groups), x, dynamic=dynamic, build_engines=False, **NEAR)


@both
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 3, 5), (1, 4, 3, 5), (2, 4, 3, 2, 2)])
def test_instance_norm(shape: tuple[int, ...], dynamic: bool) -> None:
    x, weight, bias = random(*shape) * 2 + 3, random(4), random(4, seed=1)
    made = check(lambda x, w, b: F.instance_norm(x, None, None, w, b), x, weight, bias, dynamic=dynamic, **NEAR)
    assert dynamic or shape[0] != 1 or "NORMALIZATION" in kinds(made)
    check(F.instance_norm, x, dynamic=dynamic, build_engines=False, **NEAR)
    check(
        lambda x, m, v: F.instance_norm(x, m, v, use_input_stats=False), x, weight, bias.abs(), dynamic=dynamic, **NEAR
    )


@both
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 3, 5), (2, 4, 3, 2, 2), (0, 4, 3)])
def test_batch_norm(shape: tuple[int, ...], dynamic: bool) -> None:
    x, mean, var = random(*shape), random(4), random(4, seed=1).abs() + 0.1
    check(F.batch_norm, x, mean, var, dynamic=dynamic)
    check(F.batch_norm, x, mean, var, random(4, seed=2), random(4, seed=3), dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_norm_of_weights_that_stay(affine: bool, dtype: torch.dtype) -> None:
    """Two layers with numbers known when the network is made, where else layers compute them."""
    weights: list[Any] = [random(4), random(4, seed=1).abs() + 0.1, *(random(4, seed=i) for i in (2, 3) if affine)]
    x = random(2, 4, 3, dtype=dtype)
    graph = trace(F.batch_norm, [x, *weights])
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")][1:]
    baked = dict(zip(names, weights, strict=True))
    fixed, open_ = convert(graph, baked), convert(graph, baked, refit=True)
    raw = fixed.network.raw
    folded = Counter(raw.get_layer(i).type.name for i in range(raw.num_layers))
    assert folded == {"CONSTANT": 2 + len(weights), "ELEMENTWISE": 2, "IDENTITY": 1}
    assert len(open_.weights) == len(weights)
    near: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {"rtol": 1e-6, "atol": 1e-6}
    for network in (fixed, open_):
        got = EvaluatedSegment(network)(x, *weights)[0]
        torch.testing.assert_close(got, F.batch_norm(x, *weights), **near)


def trained(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """The op's form without mutation: running statistics come out as results."""
    results = aten._native_batch_norm_legit_functional(x, weight, bias, mean, var, True, 0.3, 1e-5)
    return results[0], results[3], results[4]


@both
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3, 5)])
def test_batch_norm_in_training(shape: tuple[int, ...], dynamic: bool) -> None:
    x, rest = random(*shape) * 2 + 1, [random(4, seed=i).abs() + 0.1 for i in range(4)]
    check(trained, x, *rest, dynamic=dynamic, **NEAR)
    check(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), x, *rest[2:], dynamic=dynamic, **NEAR)
    check(lambda x: F.batch_norm(x, None, None, training=True), x, dynamic=dynamic, **NEAR)


@both
@pytest.mark.parametrize("shapes", LAYERS[:6], ids=str)
def test_rms_norm(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    shape, inner = shapes
    function: Callable[..., Any] = lambda x, w: (F.rms_norm(x, w.shape, w), F.rms_norm(x, w.shape, eps=0.1))  # noqa: E731
    check(function, random(*shape), random(*inner), dynamic=dynamic)


@both
def test_others(dynamic: bool) -> None:
    x = random(2, 4, 6, 6)
    check(lambda x: F.local_response_norm(x, 3), x, dynamic=dynamic)
    check(
        lambda x: (F.normalize(x, dim=1), F.normalize(x, p=1, dim=-1), F.cosine_similarity(x, x.flip(0), dim=1)),
        x,
        dynamic=dynamic,
    )
    check(lambda g, v: torch._weight_norm(v, g, 0), random(4, 1), random(4, 3), dynamic=dynamic)


def test_older_versions_get_groups_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before `add_normalization_v2` the layer took a scale for each group."""
    import trt_dynamo.aten_converters.normalization as module

    monkeypatch.setattr(
        module, "has", lambda name: name != "add_normalization_v2" and hasattr(trt.INetworkDefinition, name)
    )
    for shape in ((2, 4, 5), (2, 4, 3, 5)):
        check(lambda x, w, b: F.group_norm(x, 2, w, b), random(*shape), random(4), random(4, seed=1), **NEAR)
    check(lambda x, w, b: F.layer_norm(x, (5,), w, b), random(2, 3, 5), random(5), random(5))
    check(
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        random(1, 4, 5, 5),
        random(4),
        random(4),
        rtol=1e-4,
        atol=1e-5,
    )
