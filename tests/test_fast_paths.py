"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer` as eager runs them in evaluation: by fused kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import explain
from trt_dynamo.testing import check

aten = torch.ops.aten

# Some versions of the profiler warn of how they count.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")

MASKS: dict[str, tuple[torch.Tensor | None, int | None]] = {
    "none": (None, None),
    "positions": (torch.ones(5, 5, dtype=torch.bool).triu(1), 0),
    "keys": (torch.tensor([[False] * 5, [False, False, True, True, True]]), 1),
    "all": (torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.7, 2),
    "floats": (torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf")), 0),
    "nothing_left": (torch.tensor([[False] * 5, [True] * 5]), 1),
}


def layer(**more: Any) -> nn.TransformerEncoderLayer:
    made = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **more).eval().requires_grad_(False)
    for norm in (made.norm1, made.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made


def has_kernel(name: str, module: nn.Module, *args: Any, **more: Any) -> bool:
    """Whether eager runs the module by this kernel, without which these tests would say nothing."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(*args, **more)
    return f"aten::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("weights", ["no weights", "averaged", "each"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_attention_kernel(mask: str, weights: str, dynamic: bool) -> None:
    attention, x = nn.MultiheadAttention(8, 2).requires_grad_(False), torch.randn(2, 5, 8)
    given, kind = MASKS[mask]

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = aten._native_multi_head_attention(
            x, x, x, 8, 2, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
            attention.out_proj.bias, given, weights != "no weights", weights == "averaged", kind,
        )  # fmt: skip
        return tuple(f for f in found if f is not None)

    check(function, x, dynamic=dynamic and mask == "none")


def test_the_attention_kernel_of_three_inputs() -> None:
    attention = nn.MultiheadAttention(8, 2).requires_grad_(False)
    x, y, z = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = aten._native_multi_head_attention(
            *inputs, 8, 2, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
            attention.out_proj.bias, None, False,
        )[0]  # fmt: skip
        return result

    check(function, x, y, z)


@pytest.mark.parametrize("gelu", [False, True], ids=["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm_last", "norm_first"])
def test_a_layer_is_one_engine(norm_first: bool, gelu: bool) -> None:
    module, x = layer(norm_first=norm_first, activation="gelu" if gelu else "relu"), torch.randn(3, 5, 8)
    assert has_kernel("_transformer_encoder_layer_fwd", module, x)
    with torch.no_grad():
        assert not explain(module, x).eager
        assert_same(compiled(module)(x), module(x))
    assert engine_calls() == 1


@pytest.mark.parametrize("mask", ["src_mask", "src_key_padding_mask", "both"])
def test_a_layer_with_masks(mask: str) -> None:
    module, x = layer(), torch.randn(2, 5, 8)
    causal, padded = MASKS["positions"][0], MASKS["keys"][0]
    masks = {"src_mask": causal, "src_key_padding_mask": padded}
    given = masks if mask == "both" else {mask: masks[mask]}
    assert has_kernel("_transformer_encoder_layer_fwd", module, x, **given)
    with torch.no_grad():
        assert_same(compiled(module)(x, **given), module(x, **given))
    assert engine_calls() == 1


def test_a_module_that_is_both_trained_and_evaluated() -> None:
    module = layer()
    module.requires_grad_(True)
    fast: Any = compiled(module, rebuild_after=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        fast.train()
        fast(torch.randn(3, 5, 8)).square().mean().backward()
        optimizer.step()
        fast.eval()
        x = torch.randn(3, 5, 8)
        with torch.no_grad():
            assert_same(fast(x), module(x))
    assert engine_calls() == 2
