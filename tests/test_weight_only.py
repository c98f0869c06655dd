"""Weights that are codes while their inputs are floats: what is stored, what comes out, and what a plan weighs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization as torchao
from torch import Tensor, nn
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls
from tests.test_quantization import kinds, networks_of
from trt_dynamo.aten_converters.stored_weights import blocks
from trt_dynamo.build import build, profile_of
from trt_dynamo.reports import report, reset_report
from trt_dynamo.settings import Settings

INT3, INT4 = (getattr(torch, name) for name in ("int3", "int4"))  # mypy does not know them


def layers(dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (64, 48, 32)) -> nn.Sequential:
    torch.manual_seed(0)
    a, b, c = sizes
    return nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Linear(b, c, bias=False)).eval().to(dtype).requires_grad_(False)


def intx(dtype: torch.dtype, group: int | None = None, **options: Any) -> Any:
    each = PerAxis(0) if group is None else PerGroup(group)
    return torchao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=each, **options)


def outputs(network: Any, kind: str) -> list[str]:
    """The types of what the layers of a kind give out."""
    raw = network.network.raw
    found = [raw.get_layer(i) for i in range(raw.num_layers)]
    return [layer.get_output(0).dtype.name for layer in found if layer.type.name == kind]


def codes(network: Any) -> list[str]:
    return [name for name in outputs(network, "CONSTANT") if name in ("INT8", "INT4", "FP8")]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which a matrix product adds up."""
    step = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * step)


class Places(nn.Module):
    """A layer, and places in integers that look like codes: nobody multiplies a matrix with them."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(12).view(3, 4))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        turns = self.places.float() * 0.1
        return torch.tanh(self.layer(torch.cat([turns, turns], 1).sin() + x))


def test_integers_that_are_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """RTX builds no concatenation of such codes, and where there are codes, no weight can be replaced."""
    model, x = Places().eval(), torch.randn(3, 8)
    result, networks = networks_of(model, x, monkeypatch=monkeypatch)
    assert_same(result, model(x).detach())
    assert not any(codes(network) for network in networks)
    fast = compiled(model)
    reset_report()
    with torch.no_grad():
        for _ in range(4):
            assert_same(fast(x), model(x))
            model.layer.weight.mul_(1.1)
    counts = report()
    assert (counts["rebuilds"], counts["refits"], counts["eager_calls"]) == (1, 3, 0)


# -- torchao's tensor classes -----------------------------------------------------------------------------------------

CONFIGS: list[tuple[str, Any, str]] = [
    ("int8", torchao.Int8WeightOnlyConfig(), "INT8"),
    ("int8 by rows", intx(torch.int8), "INT8"),
    ("int8 by groups", intx(torch.int8, 16), "INT8"),
    ("int8 around other zero points", intx(torch.int8, 16, mapping_type=MappingType.ASYMMETRIC), "INT8"),
    ("int4 by rows", intx(INT4), "INT4"),
    ("int4 by groups", intx(INT4, 16), "INT4"),
    ("int4 around other zero points", intx(INT4, 16, mapping_type=MappingType.ASYMMETRIC), "INT8"),
    ("int3 by groups", intx(INT3, 16), "INT4"),
    ("float8", torchao.Float8WeightOnlyConfig(), "FP8"),
]


HALVES = [case for case in CONFIGS if case[0] in ("int8", "int8 by groups", "int4 by groups", "float8")]
TYPED = [(*case, torch.float32) for case in CONFIGS]
TYPED += [(*case, dtype) for case in HALVES for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("name", "config", "kind", "dtype"), TYPED, ids=[f"{case[0]}, {case[3]}" for case in TYPED])
def test_what_is_stored_and_comes_out(
    name: str, config: Any, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layers(dtype), torch.randn(5, 64, dtype=dtype)
    torchao.quantize_(model, config)
    result, made = networks_of(model, x, monkeypatch=monkeypatch)
    assert_close(result, model(x))
    assert len(made) == 1
    assert set(codes(made[0])) == {kind}
    assert kinds(made[0]).count("DEQUANTIZE") == len(codes(made[0])) == (4 if "int8 around" in name else 2)
    assert max(value.numel() for value in made[0].constants.values() if value.dtype is dtype) < 64 * 48 / 8


@pytest.mark.parametrize(
    "config",
    [
        torchao.Int8WeightOnlyConfig(),
        intx(torch.int8, 16),
        intx(INT4),
        intx(INT4, 16),
    ],
)
def test_in_half_precision_there_is_no_cast_of_a_weight(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(), torch.randn(5, 64)
    torchao.quantize_(model, config)
    result, (network,) = networks_of(model, x, monkeypatch=monkeypatch, precision="fp16")
    assert F.cosine_similarity(result.flatten(), model(x).flatten(), 0) > 0.999
    assert outputs(network, "DEQUANTIZE") == ["HALF", "HALF"]
    assert kinds(network).count("CAST") == 2  # of the input, and of the result


def test_weights_as_inputs() -> None:
    model, x = layers(), torch.randn(5, 64)
    torchao.quantize_(model, intx(INT4, 16))
    run = compiled(model, cache="off", weights="inputs")
    for _ in range(2):
        before = engine_calls()
        assert_same(run(x), model(x))
        assert engine_calls() == before + 1
        model.get_submodule("0").weight.qdata.neg_()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_codes_and_scales_that_change_are_never_served_stale(part: str) -> None:
    model, x = layers(), torch.randn(5, 64)
    torchao.quantize_(model, intx(torch.int8, 16))
    run = compiled(model, cache="off", rebuild_after=1)
    assert_same(run(x), model(x))
    inner = getattr(model.get_submodule("0").weight, part)
    inner.data.copy_(inner.flip(0))
    for _ in range(4):
        assert_same(run(x), model(x))
    before = engine_calls()
    assert_same(run(x), model(x))
    assert engine_calls() == before + 1


def test_models_of_one_class_have_codes_of_their_own() -> None:
    models, x = [layers(), layers()], torch.randn(5, 64)
    with torch.no_grad():
        models[1].get_submodule("0").weight.mul_(-2)  # type: ignore[operator]
    for model in models:
        torchao.quantize_(model, intx(INT4, 16))
    runs = [compiled(model, cache="off") for model in models]
    for _ in range(2):
        for run, model in zip(runs, models, strict=True):
            assert_same(run(x), model(x))


# -- the same in plain torch ------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A linear layer that makes its weight itself."""

    def __init__(self, weight: Any, **buffers: Tensor) -> None:
        super().__init__()
        self.weight_of = weight
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_of(self))


def unpacked(m: Any) -> Tensor:
    """Two codes in a byte, around 8, as GPTQ's and AWQ's files have them."""
    parts = torch.stack([m.codes & 15, m.codes >> 4], -1).flatten(-2)
    return (parts.to(torch.int8) - 8).float().view(24, 4, 8).mul(m.scales).view(24, 32)


def random_codes(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


positive = torch.rand(24, 1, generator=torch.Generator().manual_seed(2)) + 0.1
signed = positive * torch.where(torch.arange(24)[:, None] % 2 == 0, 1, -1)
wide = random_codes(-128, 128, 24, 32)

PLAIN: list[tuple[str, Any, dict[str, Tensor], list[str]]] = [
    ("by rows", lambda m: m.codes.float() * m.scales, {"codes": wide, "scales": positive}, ["INT8"]),
    ("the scale first", lambda m: m.scales * m.codes, {"codes": wide, "scales": positive}, ["INT8"]),
    ("divided", lambda m: m.codes.float() / m.scales, {"codes": wide, "scales": positive}, ["INT8"]),
    ("by columns", lambda m: m.codes * m.scales, {"codes": wide, "scales": positive.repeat(2, 1)[:32, 0]}, ["INT8"]),
    ("one scale", lambda m: m.codes.float() * 0.25, {"codes": wide}, ["INT8"]),
    (
        "uint8 around 128",
        lambda m: (m.codes.float() - 128) * m.scales,
        {"codes": random_codes(0, 256, 24, 32, dtype=torch.uint8), "scales": positive},
        ["INT8"],
    ),
    (
        "packed",
        unpacked,
        {"codes": random_codes(0, 256, 24, 16, dtype=torch.uint8), "scales": torch.rand(24, 4, 1) + 0.1},
        ["INT4"],
    ),
    ("an odd number of codes", lambda m: m.codes.float() * 0.5, {"codes": random_codes(-8, 8, 5, 31)}, ["INT8"]),
    ("scales below zero", lambda m: m.codes.float() * m.scales, {"codes": wide, "scales": signed}, ["INT8"]),
    ("uint8 around 0", lambda m: m.codes * 0.1, {"codes": random_codes(0, 256, 24, 32, dtype=torch.uint8)}, []),
    (
        "a zero point between codes",
        lambda m: (m.codes.float() - 0.5) * m.scales,
        {"codes": wide, "scales": positive},
        ["INT8"],
    ),
    ("two scales", lambda m: m.codes.float() * m.scales * 0.3, {"codes": wide, "scales": positive}, ["INT8"]),
    (
        "blocks along both dims",
        lambda m: m.codes * m.scales.repeat_interleave(2, 0).repeat_interleave(8, 1),
        {"codes": wide, "scales": torch.rand(12, 4) + 0.1},
        ["INT8"],
    ),
]


@pytest.mark.parametrize(("name", "weight", "buffers", "kind"), PLAIN, ids=[case[0] for case in PLAIN])
def test_codes_in_plain_torch(
    name: str, weight: Any, buffers: dict[str, Tensor], kind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Plain(weight, **buffers)
    x = torch.randn(5, model.weight_of(model).shape[1])
    result, (network,) = networks_of(model, x, monkeypatch=monkeypatch)
    assert_same(result, model(x))
    assert codes(network) == kind


SCALES: list[tuple[Tensor, tuple[int, ...], int | None]] = [
    (torch.ones(1, 1).expand(4, 6), (), None),
    (torch.arange(4.0)[:, None].expand(4, 6), (4,), 0),
    (torch.arange(6.0).expand(4, 6), (6,), 1),
    (torch.arange(12.0).reshape(4, 3).repeat_interleave(2, 1), (4, 3), None),
    (torch.arange(12.0).reshape(2, 6).repeat_interleave(2, 0), (2, 6), None),
    (torch.arange(6.0).reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1), (4, 3), None),
    (torch.arange(4.0).repeat_interleave(6).reshape(4, 6), (4,), 0),
    (torch.arange(3.0).repeat_interleave(2).expand(4, 6), (1, 6), None),
    (torch.arange(24.0).reshape(4, 6), (4, 6), None),
]


@pytest.mark.parametrize(("whole", "shape", "axis"), SCALES)
def test_the_fewest_scales_that_say_the_same(whole: Tensor, shape: tuple[int, ...], axis: int | None) -> None:
    scale, found = blocks(whole)
    assert (tuple(scale.shape), found) == (shape, axis)


# -- trt_dynamo.quantize ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 9)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(F.gelu(self.body(self.table(ids))))
        return result


@pytest.mark.parametrize(
    ("dtype", "options", "kind", "least"),
    [
        ("int8wo", {}, ["INT8", "INT8", "INT8"], 0.9995),
        ("int8wo", {"group": 16}, ["INT8", "INT8", "INT8"], 0.9995),
        ("int8wo", {"keep": ["table"]}, ["INT8", "INT8"], 0.9995),
        ("int4wo", {}, ["INT8", "INT4", "INT4"], 0.98),
        ("int4wo", {"group": 48}, ["INT8", "INT4", "INT4"], 0.97),
        ("int4wo", {"keep": ["he*", "body"]}, ["INT8"], 0.9995),
    ],
)
def test_quantize(
    dtype: str, options: dict[str, Any], kind: list[str], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = Words(), torch.arange(12).reshape(3, 4)
    expected = model(ids).detach()
    made = trt_dynamo.quantize(model, None, dtype, **options)
    result, (network,) = networks_of(made, ids, monkeypatch=monkeypatch)
    assert_same(result, made(ids))
    assert F.cosine_similarity(result.flatten(), expected.flatten(), 0) > least
    assert sorted(codes(network)) == sorted(kind)
    assert torch.equal(model(ids), expected)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_linear_layers_as_transformers_has_them() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(24, 32)).eval(), torch.randn(2, 3, 32)
    made = trt_dynamo.quantize(model, dtype="int8wo")
    assert isinstance(made.get_submodule("0"), nn.Linear)
    assert F.cosine_similarity(made(x).flatten(), model(x).flatten(), 0) > 0.9995


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "int8"}, "give a loader"),
        ({"dtype": "int8wo", "method": "minmax"}, "looks at no batch"),
        ({"dtype": "int4wo", "group": 0}, "a number of weights"),
        ({"dtype": "int8", "group": 32}, "of int8wo and int4wo"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trt_dynamo.quantize(Words(), **given)


@pytest.mark.parametrize("target", ["8.9", "12.0"])
@pytest.mark.parametrize(("dtype", "most"), [("int8wo", 1.15), ("int4wo", 0.8)])
def test_a_plan_has_codes(dtype: str, most: float, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes per weight. A scale for 32 weights of four bits is another byte for eight."""
    model = trt_dynamo.quantize(layers(sizes=(1024, 1024, 1024)), dtype=dtype)
    _, (network,) = networks_of(model, torch.randn(4, 1024), monkeypatch=monkeypatch)
    plan = build(network, profile_of(network, {}), Settings(targets=(target,)))
    assert len(plan) < most * 2 * 1024 * 1024


def test_float8_is_read_and_never_cast_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT saturates at 448, torch makes NaN of what lies beyond."""
    x = torch.tensor([[1.0, 500.0, -0.3]])
    result, made = networks_of(lambda x: (x * 2).to(torch.float8_e4m3fn).float() * 3 + x, x, monkeypatch=monkeypatch)
    assert_same(result, (x * 2).to(torch.float8_e4m3fn).float() * 3 + x)
    assert all("FP8" not in outputs(network, "CAST") for network in made)
