"""`trt_dynamo::fake_quantize`, the op that ModelOpt's quantizers become: numbers, layers, types, and plans."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiled import assert_same, compiled
from tests.test_quantization import kinds, networks_of
from trt_dynamo.build import build, profile_of
from trt_dynamo.operators.fake_quantize import fake_quantize
from trt_dynamo.settings import Settings
from trt_dynamo.testing import check

# bits, of the exponent, unsigned, narrow
INT8, NARROW, UINT8 = (8, 0, False, False), (8, 0, False, True), (8, 0, True, False)
INT4, INT3, FP8 = (4, 0, False, False), (3, 0, False, True), (8, 4, False, False)


def by_hand(x: float, amax: float, bits: int, exponent_bits: int, unsigned: bool, narrow: bool) -> float:
    """What one number becomes, written down once more."""
    if exponent_bits:
        amax = 1.0 if amax <= 2**-24 else amax
        near = max(-448.0, min(448.0, x / amax * 448))
        return float(torch.tensor(near).to(torch.float8_e4m3fn)) * amax / 448
    high = 2 ** (bits if unsigned else bits - 1) - 1
    low = 0 if unsigned else -high if narrow else -high - 1
    return 0.0 if amax <= 2**-24 else max(low, min(high, round(x * high / amax))) * amax / high


@pytest.mark.parametrize("how", [INT8, NARROW, UINT8, INT4, INT3, FP8], ids=str)
@pytest.mark.parametrize("amax", [2.0, 0.37, 1e4, 0.0])
def test_the_numbers(how: Any, amax: float) -> None:
    x = torch.tensor([0.0, 0.011, 0.4, 1.9, -1.9, 2.0, -2.0, 7.0, -7.0, 3e4, -3e4])
    found = fake_quantize(x, torch.tensor(amax), *how)
    expected = [by_hand(number, amax, *how) for number in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-9)


LAYOUTS = {
    "dense": torch.randn(2, 3, 4, 5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
    "a slice": torch.randn(2, 3, 4, 10)[..., ::2],
    "half": torch.randn(2, 3, 4, 5).to(torch.bfloat16),
}


@pytest.mark.parametrize("amax", [torch.tensor(2.0), torch.rand(3, 1, 1) + 1], ids=["one", "several"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_torch_asks_of_an_op(layout: str, amax: Tensor) -> None:
    torch.library.opcheck(fake_quantize, (LAYOUTS[layout], amax, *INT8))
    x = LAYOUTS[layout]
    assert fake_quantize(x, amax, *FP8).stride() == torch.empty_like(x).stride()


def test_what_it_does_not_know() -> None:
    with pytest.raises(NotImplementedError, match="6 bits with an exponent of 3"):
        fake_quantize(torch.ones(2), torch.tensor(1.0), 6, 3, False, False)


class Layer(nn.Module):
    """A linear layer whose input and weight are quantized."""

    limit: Tensor
    reach: Tensor

    def __init__(self, inputs: Any, weights: Any, dtype: torch.dtype = torch.float32, size: int = 16) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 24).to(dtype).requires_grad_(False)
        self.how = tuple(how[1:] for how in (inputs, weights))
        self.register_buffer("limit", torch.tensor(inputs[0]))
        w = self.layer.weight.float()
        several = {"row": w.abs().amax(1, keepdim=True), "all": w.abs().amax(), "block": w.reshape(-1, 8).abs().amax(1)}
        self.register_buffer("reach", several[weights[0]])
        self.block = weights[0] == "block"

    def forward(self, x: Tensor) -> Tensor:
        w = self.layer.weight
        if self.block:
            w = fake_quantize(w.reshape(-1, 8), self.reach[:, None], *self.how[1]).reshape(w.shape)
        else:
            w = fake_quantize(w, self.reach, *self.how[1])
        return F.linear(fake_quantize(x, self.limit, *self.how[0]), w, self.layer.bias)


CASES: list[tuple[str, Any, Any, tuple[int, int], torch.dtype]] = [
    # name, amax and type of the input, those of the weight, how many Q and DQ layers, the type of the weight's codes
    ("int8", (3.0, *INT8), ("row", *INT8), (1, 2), torch.int8),
    ("int8, one scale", (3.0, *INT8), ("all", *INT8), (1, 2), torch.int8),
    ("a narrow range", (3.0, *NARROW), ("row", *NARROW), (1, 2), torch.int8),
    ("four bits", (3.0, *INT4), ("row", *INT4), (1, 2), torch.int8),
    ("blocks of four bits", (3.0, *UINT8), ("block", *INT4), (0, 1), torch.int8),
    ("blocks, and an int8 input", (3.0, *INT8), ("block", *INT4), (1, 2), torch.int8),
    ("an int8 input and an fp8 weight", (3.0, *INT8), ("row", *FP8), (1, 1), torch.float32),
    ("an fp8 input and blocks of four bits", (3.0, *FP8), ("block", *INT4), (1, 1), torch.float32),
    ("uint8", (3.0, *UINT8), ("row", *INT8), (0, 1), torch.int8),
    ("an input that was always 0", (0.0, *INT8), ("row", *INT8), (0, 1), torch.int8),
    ("fp8", (3.0, *FP8), ("all", *FP8), (1, 2), torch.float8_e4m3fn),
    ("fp8 per row", (3.0, *FP8), ("row", *FP8), (1, 2), torch.float8_e4m3fn),
    ("fp8 of an input that was always 0", (0.0, *FP8), ("all", *FP8), (1, 2), torch.float8_e4m3fn),
    ("an input per channel", ([1.0] * 15 + [0.0], *INT8), ("row", *INT8), (0, 1), torch.int8),
    ("fp8 of an input per channel", ([2.0] * 15 + [0.0], *FP8), ("row", *FP8), (1, 2), torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("name", "inputs", "weights", "layers", "codes"), CASES, ids=[case[0] for case in CASES])
def test_what_the_layers_are_and_give(
    name: str, inputs: Any, weights: Any, layers: tuple[int, int], codes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Layer(inputs, weights), torch.randn(5, 16) * 2
    result, (network,) = networks_of(model, x, monkeypatch=monkeypatch)
    assert_same(result, model(x))
    assert (kinds(network).count("QUANTIZE"), kinds(network).count("DEQUANTIZE")) == layers
    held = [value.dtype for value in network.constants.values() if value.numel() == model.layer.weight.numel()]
    assert set(held) == {codes}
    assert build(network, profile_of(network, {}), Settings(targets=("8.9",)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [INT8, FP8], ids=["int8", "fp8"])
def test_half_types(dtype: torch.dtype, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Layer((3.0, *how), ("row", *how), dtype), torch.randn(5, 16).to(dtype)
    result, (network,) = networks_of(model, x, monkeypatch=monkeypatch)
    torch.testing.assert_close(result, model(x), rtol=0.02, atol=0.02)
    assert (kinds(network).count("QUANTIZE"), kinds(network).count("DEQUANTIZE")) == (1, 2)
    assert "CAST" not in kinds(network)
    assert build(network, profile_of(network, {}), Settings(targets=("8.9",)))


class Chain(nn.Module):
    """Two layers, with something between."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.first, self.last = Layer((3.0, *how), ("row", *how)), Layer((1.0, *how), ("row", *how), size=24)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.gelu(self.first(x)))
        return result


@pytest.mark.parametrize(("how", "precision"), [(INT8, "fp16"), (FP8, "bf16")])
def test_precision(how: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts only where values come in and go out: the scale stays float32 all the same."""
    torch.manual_seed(0)
    model, x = Chain(how), torch.randn(5, 16)
    result, (network,) = networks_of(model, x, monkeypatch=monkeypatch, precision=precision)
    assert F.cosine_similarity(result.flatten(), model(x).flatten(), 0) > 0.999
    assert (kinds(network).count("QUANTIZE"), kinds(network).count("DEQUANTIZE")) == (2, 4)
    assert kinds(network).count("CAST") == 2


def test_a_limit_that_is_computed() -> None:
    def own(x: Tensor) -> tuple[Tensor, Tensor]:
        reach = x.abs().amax(-1, keepdim=True)
        return fake_quantize(x, reach, *INT8), fake_quantize(x, reach, *FP8)

    x = torch.randn(6, 9)
    x[2] = 0
    check(own, x)


def test_a_row_of_zeros_stays_zero() -> None:
    model = Layer((3.0, *INT8), ("row", *INT8))
    model.layer.weight[3] = 0
    model.reach[3] = 0
    x = torch.randn(5, 16)
    result = compiled(model, cache="off")(x)
    assert_same(result, model(x))
    assert_same(result[:, 3], model.layer.bias[3].expand(5))


def test_any_batch_size() -> None:
    model = Layer((3.0, *INT8), ("row", *INT8))
    run = compiled(model, dynamic=True, cache="off")
    for size in (3, 8, 2):
        x = torch.randn(size, 16)
        assert_same(run(x), model(x))


def test_what_lies_beyond_is_cut_off() -> None:
    def f(x: Tensor) -> Tensor:
        result: Tensor = fake_quantize(x, torch.tensor(2.0), *INT8) + fake_quantize(x, torch.tensor(2.0), *FP8)
        return result

    x = torch.tensor([[math.inf, -math.inf, 50.0, 1.0]])
    found = compiled(f, cache="off")(x)
    assert_same(found, f(x))
    assert_same(found[0, 0], torch.tensor(4.0))
