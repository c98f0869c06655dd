"""Attention against eager: masks of each form, causal with unequal lengths, grouped queries, rows that see nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trt_dynamo.aten_converters import attention
from trt_dynamo.testing import check, refused
from trt_dynamo.trt import trt

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEAR: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 4e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 2e-2},
}

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def operands(
    queries: int = 5,
    keys: int = 7,
    *,
    heads: int = 4,
    key_heads: int = 4,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = random(2, heads, queries, size, dtype=dtype)
    key, value = (random(2, key_heads, keys, size, dtype=dtype, seed=i) for i in (1, 2))
    return query, key, value


def kinds(made: Any) -> list[str]:
    raw = made.networks[0].network.raw
    return [raw.get_layer(i).type.name for i in range(raw.num_layers)]


def holes(*shape: int) -> torch.Tensor:
    """A mask in which the second query sees nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    if shape[-2] > 1:
        mask[..., 1, :] = False
    return mask


@both
@each_type
def test_plain(dtype: torch.dtype, dynamic: bool) -> None:
    made = check(sdpa, *operands(dtype=dtype), dynamic=dynamic, **NEAR[dtype])
    assert dynamic or ("ATTENTION_INPUT" in kinds(made)) == (dtype in DTYPES[1:])


@both
@each_type
@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_causal(lengths: tuple[int, int], dtype: torch.dtype, dynamic: bool) -> None:
    """torch aligns the triangle to the upper left where there are more keys than queries."""
    made = check(
        lambda q, k, v: sdpa(q, k, v, is_causal=True), *operands(*lengths, dtype=dtype), dynamic=dynamic, **NEAR[dtype]
    )
    assert dynamic or ("ATTENTION_INPUT" in kinds(made)) == (dtype in DTYPES[1:])


MASKS = [(5, 7), (1, 7), (2, 1, 5, 7), (2, 4, 5, 7), (1, 1, 1, 7), (2, 1, 1, 7), (1, 4, 5, 7), (2, 4, 5, 1)]


@both
@each_type
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_of_bools(shape: tuple[int, ...], dtype: torch.dtype, dynamic: bool) -> None:
    made = check(
        sdpa,
        *operands(dtype=dtype),
        holes(*shape),
        dynamic=dynamic,
        build_engines=dtype is torch.float16,
        **NEAR[dtype],
    )
    assert dynamic or ("ATTENTION_INPUT" in kinds(made)) == (dtype in DTYPES[1:])


@both
@each_type
@pytest.mark.parametrize("shape", MASKS[:4], ids=str)
def test_masks_of_floats(shape: tuple[int, ...], dtype: torch.dtype, dynamic: bool) -> None:
    bias = random(*shape, dtype=dtype)
    hidden = bias.masked_fill(~holes(*shape), -math.inf)
    lowest = bias.masked_fill(~holes(*shape), torch.finfo(dtype).min)
    for mask in (bias, hidden, lowest):
        check(sdpa, *operands(dtype=dtype), mask, dynamic=dynamic, build_engines=mask is bias, **NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_float32_mask_for_half_queries(dtype: torch.dtype) -> None:
    mask = torch.zeros(5, 7).masked_fill(~holes(5, 7), torch.finfo(torch.float32).min)
    check(sdpa, *operands(dtype=dtype), mask, **NEAR[dtype])


@both
def test_scale(dynamic: bool) -> None:
    for scale in (0.5, 1.0, 3.0):
        check(lambda q, k, v, s=scale: sdpa(q, k, v, scale=s), *operands(), dynamic=dynamic, **NEAR[torch.float32])


@both
@each_type
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_queries(key_heads: int, dtype: torch.dtype, dynamic: bool) -> None:
    made = check(
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        *operands(key_heads=key_heads, dtype=dtype),
        dynamic=dynamic,
        **NEAR[dtype],
    )
    assert dynamic or ("ATTENTION_INPUT" in kinds(made)) == (dtype in DTYPES[1:])


@both
@each_type
def test_two_attentions_of_one_query(dtype: torch.dtype, dynamic: bool) -> None:
    """Over these, scaled in another way, TensorRT for RTX 1.7's builder crashes."""
    query, key, value = operands(dtype=dtype)
    further = [random(*x.shape, dtype=dtype, seed=9) for x in (key, value)]
    check(lambda q, k, v, *o: (sdpa(q, k, v), sdpa(q, *o)), query, key, value, *further, dynamic=dynamic, **NEAR[dtype])


def test_other_shapes() -> None:
    near = NEAR[torch.float32]
    check(sdpa, random(3, 5, 8), random(3, 6, 8), random(3, 6, 8, seed=1), **near)
    check(sdpa, random(3, 5, 8), random(3, 6, 8), random(3, 6, 8, seed=1), holes(3, 5, 6), **near)
    check(sdpa, random(5, 8), random(6, 8), random(6, 8, seed=1), **near)
    check(sdpa, random(2, 3, 4, 5, 8), random(2, 3, 4, 6, 8), random(2, 3, 4, 6, 8, seed=1), holes(3, 1, 5, 6), **near)
    check(sdpa, random(2, 4, 5, 8), random(2, 4, 6, 8), random(2, 4, 6, 3), **near)
    check(sdpa, random(2, 4, 5, 8), random(1, 1, 6, 8), random(1, 1, 6, 8, seed=1), **near)
    check(sdpa, random(2, 4, 1, 8), random(2, 4, 1, 8), random(2, 4, 1, 8, seed=1), **near)


@both
def test_within_a_layer_of_a_transformer(dynamic: bool) -> None:
    weight = random(96, 32) / 6

    def layer(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in F.linear(x, weight).chunk(3, -1)]
        return sdpa(heads[0], heads[1], heads[2], mask).transpose(1, 2).flatten(2)

    check(layer, random(2, 6, 32), weight, holes(2, 1, 1, 6), dynamic=dynamic, **NEAR[torch.float32])


def test_kernels_of_torch() -> None:
    """What torch makes of it where it is not kept whole; the first result only."""
    query, key, value = operands(5, 5)
    near = NEAR[torch.float32]
    check(lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0], query, key, value, **near)
    check(
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.3)[0],
        query,
        key,
        value,
        **near,
    )
    masked = lambda q, k, v, m: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=m)[0]  # noqa: E731
    check(masked, query, key, value, random(2, 1, 5, 5), **near)
    with refused("only a backward pass reads"):
        check(lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1], query, key, value)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_attention_of_cast_halves(dtype: torch.dtype) -> None:
    """RTX's builder ends the whole process on its own layer here."""
    function = lambda q, k, v, m: sdpa(q.float(), k.float(), v.float(), m).to(dtype)  # noqa: E731
    for mask in (holes(2, 1, 5, 7), random(5, 7)):
        check(function, *operands(dtype=dtype), mask, **NEAR[dtype])


def test_dropout_is_refused() -> None:
    own = torch.ops.trt_dynamo.scaled_dot_product_attention
    with refused("dropout"):
        check(lambda q, k, v: own(q, k, v, None, 0.5), *operands())


@each_type
@pytest.mark.parametrize("missing", [("add_attention", "add_attention_v2"), ("add_attention_v2",)], ids=str)
def test_older_versions(missing: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the layer, or with that of TensorRT 10, which gets causal masks wrong in half precision."""
    monkeypatch.setattr(attention, "has", lambda name: name not in missing and hasattr(trt.INetworkDefinition, name))
    causal = check(lambda q, k, v: sdpa(q, k, v, is_causal=True), *operands(dtype=dtype), **NEAR[dtype])
    assert "ATTENTION_INPUT" not in kinds(causal)
    grouped = check(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *operands(key_heads=2, dtype=dtype), **NEAR[dtype])
    assert ("ATTENTION_INPUT" in kinds(grouped)) == ("add_attention" not in missing and dtype in DTYPES[1:])
    check(sdpa, *operands(dtype=dtype), holes(2, 1, 5, 7), **NEAR[dtype])
