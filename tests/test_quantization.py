"""Quantize, dequantize and fake quantize: the layers that they become, the numbers, and the bytes of the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.aten_converters import ConvertedNetwork, convert
from trt_dynamo.build import build, profile_of
from trt_dynamo.quantization import freeze_fake_quantize
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings
from trt_dynamo.testing import check

decomposed = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)
NARROW = (-127, 127, torch.int8)
UINT8 = (0, 255, torch.uint8)


class Linear(nn.Module):
    """A linear layer whose input and weight pass through functions of the test."""

    def __init__(
        self,
        inputs: Callable[[Any, Tensor], Tensor],
        weights: Callable[[Any, Tensor], Tensor],
        shape: tuple[int, int] = (24, 16),
        zero: int = 0,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[1], shape[0])
        self.inputs, self.weights, self.zero = inputs, weights, zero
        self.register_buffer("scale", torch.tensor([0.03]))
        self.register_buffer("offset", torch.tensor([zero], dtype=torch.int32))
        self.register_buffer("scales", self.layer.weight.detach().abs().amax(1) / 127)
        self.register_buffer("offsets", torch.zeros(shape[0], dtype=torch.int32))
        codes = decomposed.quantize_per_channel(self.layer.weight.detach(), self.scales, self.offsets, 0, *NARROW)
        self.register_buffer("codes", codes)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(self, x), self.weights(self, self.layer.weight), self.layer.bias)


def there_and_back(x: Tensor, scale: Any, zero: Any, *grid: Any) -> Tensor:
    kind = decomposed.quantize_per_tensor, decomposed.dequantize_per_tensor
    result: Tensor = kind[1](kind[0](x, scale, zero, *grid), scale, zero, *grid)
    return result


def plain(m: Any, x: Tensor) -> Tensor:
    return x


def folded(m: Any, w: Tensor) -> Tensor:
    result: Tensor = decomposed.dequantize_per_channel(m.codes, m.scales, m.offsets, 0, *NARROW)
    return result


def unfolded(m: Any, w: Tensor) -> Tensor:
    codes = decomposed.quantize_per_channel(w, m.scales, m.offsets, 0, *NARROW)
    result: Tensor = decomposed.dequantize_per_channel(codes, m.scales, m.offsets, 0, *NARROW)
    return result


def fake_weight(m: Any, w: Tensor) -> Tensor:
    return torch.fake_quantize_per_channel_affine(w, m.scales, m.offsets, 0, -127, 127)


def fake(low: int, high: int) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: torch.fake_quantize_per_tensor_affine(x, 0.03, m.zero, low, high)


def fake_by_tensors(m: Any, x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, m.scale, m.offset, -128, 127)


def both(*grid: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: there_and_back(x, 0.03, m.zero, *grid)


def both_by_tensors(m: Any, x: Tensor) -> Tensor:
    return there_and_back(x, m.scale, m.offset, *INT8)


def both_per_channel(m: Any, x: Tensor) -> Tensor:
    scales, zeros = m.scales[:16], m.offsets[:16]
    codes = decomposed.quantize_per_channel(x, scales, zeros, 1, *INT8)
    result: Tensor = decomposed.dequantize_per_channel(codes, scales, zeros, 1, *INT8)
    return result


def own_scale(m: Any, x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, x.abs().amax() / 127, m.offset[0], -128, 127)


def by_weight(m: Any, w: Tensor) -> Tensor:
    """The grid is made of the weight in the graph, as a folded batch norm's is."""
    turned = w * 2.0
    return torch.fake_quantize_per_channel_affine(turned, turned.abs().amax(1) / 127, m.offsets, 0, -127, 127) * 0.5


def kinds(network: ConvertedNetwork) -> list[str]:
    raw = network.network.raw
    return [raw.get_layer(index).type.name for index in range(raw.num_layers)]


def networks_of(
    model: Callable[..., Any], *args: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, list[Any]]:
    """The results of the compiled model, and the networks that were made for it."""
    made: list[ConvertedNetwork] = []

    def keep(*args: Any, **kwargs: Any) -> ConvertedNetwork:
        made.append(convert(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("trt_dynamo.engine_making.convert", keep)
    with torch.no_grad():
        return compiled(model, cache="off", **options)(*args), made


CASES: list[tuple[str, Any, Any, int, tuple[int, int]]] = [
    # name, what is done to the input, to the weight, the zero point, how many Q and DQ layers there are
    ("fake quantize", fake(-128, 127), fake_weight, 0, (1, 2)),
    ("a narrow range", fake(-127, 127), fake_weight, 0, (1, 2)),
    ("a range of four bits", fake(-8, 7), plain, 0, (1, 1)),
    ("uint8 around its middle", fake(0, 255), fake_weight, 128, (1, 2)),
    ("half of uint8", fake(0, 127), fake_weight, 0, (1, 2)),
    ("uint8 around 0", fake(0, 255), fake_weight, 0, (0, 1)),
    ("another zero point", fake(-128, 127), fake_weight, 7, (0, 1)),
    ("scale and zero point as buffers", fake_by_tensors, fake_weight, 0, (1, 2)),
    ("a zero point in a buffer", fake_by_tensors, fake_weight, -5, (0, 1)),
    ("a scale that is computed", own_scale, fake_weight, 0, (0, 1)),
    ("a weight that is computed from weights", plain, by_weight, 0, (0, 1)),
    ("quantize and dequantize", both(*INT8), unfolded, 0, (1, 2)),
    ("a weight that is stored as codes", both(*INT8), folded, 0, (1, 2)),
    ("codes in uint8", both(*UINT8), folded, 128, (1, 2)),
    ("codes in uint8 around 3", both(*UINT8), folded, 3, (0, 1)),
    ("a grid in buffers", both_by_tensors, folded, 0, (1, 2)),
    ("an input per channel", both_per_channel, folded, 0, (0, 1)),
]


@pytest.mark.parametrize(("name", "inputs", "weights", "zero", "layers"), CASES, ids=[case[0] for case in CASES])
def test_what_the_layers_are_and_give(
    name: str, inputs: Any, weights: Any, zero: int, layers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Linear(inputs, weights, zero=zero), torch.randn(5, 16) * 3
    result, made = networks_of(model, x, monkeypatch=monkeypatch)
    assert_same(result, model(x))
    assert len(made) == 1
    assert (kinds(made[0]).count("QUANTIZE"), kinds(made[0]).count("DEQUANTIZE")) == layers


def test_codes_that_the_user_reads_are_torchs() -> None:
    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        q = decomposed.quantize_per_tensor(x, 0.1, 3, *INT8)
        return q, decomposed.dequantize_per_tensor(q, 0.1, 3, *INT8)

    x = torch.tensor([0.04, 0.06, -0.1, 50.0, -50.0, 0.0])
    check(codes, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        q = decomposed.quantize_per_tensor(x, 0.25, 0, *INT8)
        result: Tensor = decomposed.dequantize_per_tensor(q, 0.25, 0, *INT8, out_dtype=dtype)
        return result + 1

    check(f, torch.randn(4, 9).to(dtype))


def test_a_batch_of_any_size() -> None:
    model = Linear(fake(-128, 127), fake_weight)
    run = compiled(model, dynamic=True, cache="off")
    with torch.no_grad():
        for size in (3, 8, 2):
            x = torch.randn(size, 16)
            assert_same(run(x), model(x))


def test_a_weight_that_changes_is_never_served_stale() -> None:
    """The codes in an engine cannot be refitted from a float weight: another engine is built."""
    model = Linear(fake(-128, 127), fake_weight)
    run, x = compiled(model, cache="off", rebuild_after=1), torch.randn(5, 16)
    with torch.no_grad():
        run(x)
        refits = report()["refits"]
        model.layer.weight.mul_(0.5)
        for _ in range(5):
            assert_same(run(x), model(x))
        before = engine_calls()
        assert_same(run(x), model(x))
    assert engine_calls() == before + 1
    assert report()["refits"] == refits


class Small(nn.Module):
    """A network for quantization-aware training, with the modules that torch has for it."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
        from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver as PerChannel

        def activation() -> Any:
            return FakeQuantize(
                MovingAverageMinMaxObserver,
                quant_min=-128,
                quant_max=127,
                dtype=torch.qint8,
                qscheme=torch.per_tensor_symmetric,
            )

        def weight() -> Any:
            return FakeQuantize(
                PerChannel, quant_min=-127, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
            )

        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.before, self.between = activation(), activation()
        self.kernel, self.matrix = weight(), weight()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(self.before(x), self.kernel(self.conv.weight), self.conv.bias))
        return F.linear(self.between(x.mean((2, 3))), self.matrix(self.head.weight), self.head.bias)


def trained(model: Small, steps: int = 5) -> Small:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(model(torch.randn(8, 3, 10, 10)), torch.randint(0, 4, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model


def assert_within_a_step(actual: Tensor, expected: Tensor, step: float) -> None:
    """Nearly all equal: where a value lies halfway, a code may be the next one."""
    assert float((actual - expected).abs().max()) <= step
    assert float(((actual - expected).abs() > 1e-5).float().mean()) < 0.05


def test_a_network_that_was_trained_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(Small())
    model.apply(torch.ao.quantization.disable_observer)
    x = torch.randn(16, 3, 10, 10)
    expected = model(x)
    run: Any = freeze_fake_quantize(copy.deepcopy(model))
    assert torch.equal(run(x), expected)
    result, made = networks_of(run, x, monkeypatch=monkeypatch)
    assert len(made) == 1
    assert (kinds(made[0]).count("QUANTIZE"), kinds(made[0]).count("DEQUANTIZE")) == (2, 4)
    step = run.between.scale.detach() * model.head.weight.detach().abs().sum(1).max()
    assert_within_a_step(result, expected.detach(), float(step))


def test_fake_quantizers_that_are_off_or_have_seen_nothing() -> None:
    with pytest.raises(ValueError, match="before has seen no data"):
        freeze_fake_quantize(Small())
    model = trained(Small())
    model.apply(torch.ao.quantization.disable_observer)
    model.between.disable_fake_quant()
    x = torch.randn(4, 3, 10, 10)
    expected = model(x)
    assert torch.equal(freeze_fake_quantize(model)(x), expected)
    assert isinstance(model.between, nn.Identity)


def test_plans_hold_codes() -> None:
    """Built for real; for compute capability 8.9, since one cannot ask a GPU here."""
    sizes = {}
    for name, model in {
        "float": Linear(plain, plain, (1024, 1024)),
        "int8": Linear(fake(-128, 127), fake_weight, (1024, 1024)),
        "stored": Linear(both(*INT8), folded, (1024, 1024)),
    }.items():
        (network,) = baked(model, torch.randn(4, 1024))
        sizes[name] = len(build(network, profile_of(network, {}), Settings(targets=("8.9",))))
    weight = 1024 * 1024
    assert sizes["float"] > 4 * weight
    assert weight < sizes["int8"] < 2 * weight
    assert weight < sizes["stored"] < 2 * weight


def baked(model: nn.Module, *args: Tensor) -> list[ConvertedNetwork]:
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        torch._dynamo.reset()
        return networks_of(copy.deepcopy(model), *args, monkeypatch=context)[1]
