"""`trt_dynamo.quantize`, and models that torchao quantized: calibration, what comes of it, and what cannot be."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import trt_dynamo
from benchmarks import quantization as benchmark
from tests.compiled import assert_same, compiled
from tests.test_quantization import kinds, networks_of
from trt_dynamo.build import build, profile_of
from trt_dynamo.demo import embedding
from trt_dynamo.quantization.ranges import Entropy, Histogram, Percentile
from trt_dynamo.settings import Settings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        x = F.gelu(self.body(x))
        result: Tensor = self.head(x if gain is None else x * gain)
        return result


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 9, 9, generator=generator) for size in sizes]


def net() -> Net:
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for x in images(8, 8, 8):
            model(x)
    return model.eval()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), 0))


@pytest.mark.parametrize(
    ("dtype", "method", "least"),
    [
        ("int8", None, 0.995),
        ("int8", "minmax", 0.995),
        ("int8", "entropy", 0.98),
        ("int8", "percentile", 0.995),
        ("fp8", None, 0.995),
        ("fp8", "smooth", 0.995),
    ],
)
def test_what_it_gives(dtype: str, method: str | None, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    made = trt_dynamo.quantize(model, images(1, 8, 5), dtype, method=method)
    (x,) = images(6)
    result, networks = networks_of(made, x, monkeypatch=monkeypatch)
    with torch.no_grad():
        expected = model(x)
    assert cosine(result, expected) > least
    assert not torch.equal(result, expected)
    assert_same(result, made(x))
    assert len(networks) == 1
    assert (kinds(networks[0]).count("QUANTIZE"), kinds(networks[0]).count("DEQUANTIZE")) == (3, 6)
    codes = torch.int8 if dtype == "int8" else torch.float8_e4m3fn
    assert sum(value.dtype is codes for value in networks[0].constants.values()) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    made.eval()


@pytest.mark.parametrize(("dtype", "precision"), [("int8", "fp16"), ("int8", "bf16"), ("fp8", "fp16")])
def test_in_a_half_type(dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are read into the half type at once, and made of it: no cast stands between them and a product."""
    made, (x,) = trt_dynamo.quantize(net(), images(8, 5), dtype), images(6)
    result, (network,) = networks_of(made, x, monkeypatch=monkeypatch, precision=precision)
    assert result.dtype is torch.float32
    assert cosine(result, made(x)) > 0.999
    raw = network.network.raw
    layers = [raw.get_layer(index) for index in range(raw.num_layers)]
    half = {"fp16": "HALF", "bf16": "BF16"}[precision]
    read = [layer.get_output(0).dtype.name for layer in layers if layer.type.name == "DEQUANTIZE"]
    assert read == [half] * 6
    products = [layer for layer in layers if layer.type.name in ("MATRIX_MULTIPLY", "CONVOLUTION")]
    assert [layer.get_output(0).dtype.name for layer in products] == [half] * 3
    made_of = [layer.get_input(0).dtype.name for layer in layers if layer.type.name == "QUANTIZE"]
    assert made_of.count("FLOAT") <= 2  # what comes in, and a mean


def test_any_batch_size_goes_through_what_was_exported_with_one() -> None:
    made = trt_dynamo.quantize(net(), images(1, 4))
    run = compiled(made, dynamic=True, cache="off")
    with torch.no_grad():
        for x in images(3, 7):
            assert_same(run(x), made(x))


LOADERS: list[tuple[str, Callable[[Tensor], Any], Any]] = [
    ("tensors", lambda x: x, None),
    ("tuples", lambda x: (x,), None),
    ("lists with a second tensor", lambda x: [x, torch.ones(1)], None),
    ("mappings", lambda x: {"x": x}, None),
    ("mappings in another order", lambda x: {"gain": torch.ones(1), "x": x}, None),
    ("labels beside", lambda x: (x, torch.zeros(len(x))), lambda model, batch: model(batch[0])),
]


@pytest.mark.parametrize(("name", "batch", "run"), LOADERS, ids=[case[0] for case in LOADERS])
def test_batches_of_every_kind(name: str, batch: Any, run: Any) -> None:
    model = net()
    made = trt_dynamo.quantize(model, (batch(x) for x in images(4, 4)), run=run)
    (x,) = images(5)
    given = batch(x)
    call = run or (lambda m, b: m(**b) if isinstance(b, dict) else m(*b) if isinstance(b, tuple | list) else m(b))
    assert cosine(call(made, given), model(x)) > 0.995


@pytest.mark.parametrize(
    ("keep", "count"), [((), 3), (("head",), 2), (("body*", "head"), 1), (("body",), 2), (("*",), 0), (("none",), 3)]
)
def test_what_shall_stay_in_floats(keep: tuple[str, ...], count: int) -> None:
    made: Any = trt_dynamo.quantize(net(), images(4), keep=keep)
    found = [node for node in made.graph.nodes if "decomposed.quantize_per_tensor" in str(node.target)]
    assert len(found) == count


def test_channels_that_reach_far_are_smoothed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    reach = torch.ones(32)
    reach[3] = 300.0
    with torch.no_grad():
        model.get_submodule("0").weight[:, 3] /= 300  # type: ignore[operator, index]
    batches = [torch.randn(16, 32) * reach for _ in range(4)]
    expected = model(batches[0])
    found = {m: cosine(trt_dynamo.quantize(model, batches, method=m)(batches[0]), expected) for m in METHODS}
    assert found["smooth"] > 0.999 > found["minmax"]


METHODS = ("minmax", "smooth")

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int4"}, "int8, fp8, int8wo, int4wo"),
    ({"method": "best"}, "smooth, minmax, entropy, percentile"),
    ({"dtype": "fp8", "method": "entropy"}, "evenly spaced"),
    ({"tool": "brevitas"}, "torchao, modelopt"),
    ({"dtype": "int8wo", "method": "minmax"}, "looks at no batch"),
    ({"group": 16}, "int8wo and int4wo"),
    ({"loader": None}, "give a loader"),
    ({"percentile": 0}, "between 0 and 100"),
    ({"strength": 2}, "between 0 and 1"),
    ({"loader": []}, "no batch"),
    ({"run": lambda model, batch: None}, "did not call the model"),
    ({"loader": [torch.full((2, 3, 9, 9), torch.inf)], "method": "percentile"}, "infinite or NaN"),
    ({"loader": [torch.full((2, 3, 9, 9), torch.nan)]}, "infinite or NaN"),
]


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=[case[1] for case in WRONG])
def test_what_cannot_be(changed: dict[str, Any], words: str) -> None:
    given = {"loader": images(2), "dtype": "int8", **changed}
    with pytest.raises(ValueError, match=words):
        trt_dynamo.quantize(net(), given.pop("loader"), given.pop("dtype"), **given)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(ImportError, match=r"trt-dynamo\[quantize\]"):
        trt_dynamo.quantize(net(), images(2))


def test_without_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'trt-dynamo\[modelopt\]'"):
        trt_dynamo.quantize(net(), images(2), tool="modelopt")


# -- quantized outside ------------------------------------------------------------------------------------------------


def x86(**options: Any) -> Any:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


def test_a_model_that_torchao_calibrated() -> None:
    """Its inputs are uint8 around other zero points, which TensorRT has not: computed in floats, and right."""
    model, (x,) = net(), images(4)
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), x86())
        prepared(x)
        made = convert_pt2e(prepared)
        assert_same(compiled(made, cache="off")(x), made(x))


@pytest.mark.slow
def test_a_model_that_torchao_trained() -> None:
    model, (x,) = Net().train(), images(8)
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), x86(is_qat=True))
    allow_exported_model_train_eval(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(3):
        loss = F.cross_entropy(prepared(x), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prepared.eval()
    with torch.no_grad():
        trained = prepared(x)
        made = convert_pt2e(prepared)
        result = compiled(made, cache="off")(x)
        assert_same(result, made(x))
        assert cosine(result, trained) > 0.99


# -- ranges -----------------------------------------------------------------------------------------------------------


def test_a_histogram_grows() -> None:
    histogram = Histogram()
    for x in (torch.zeros(3), torch.tensor([1.0, -0.5]), torch.tensor([7.0, 0.1])):
        histogram.see(x)
    assert histogram.counts is not None
    assert (histogram.reach, float(histogram.counts.sum())) == (8.0, 4)
    assert float(histogram.counts[: 2048 // 8 + 1].sum()) == 3


@pytest.mark.parametrize(("percent", "limit"), [(50.0, 0.5), (99.0, 0.99), (100.0, 1.0)])
def test_a_percentile(percent: float, limit: float) -> None:
    seen = Percentile(percent)
    seen.see(torch.linspace(-1, 1, 20001))
    found = seen.limit()
    assert found is not None
    assert abs(float(found) - limit) < 0.002


def test_entropy_cuts_off_what_is_rare_and_keeps_what_is_even() -> None:
    torch.manual_seed(0)
    rare, even = Entropy(), Entropy()
    rare.see(torch.cat([torch.randn(200_000), torch.tensor([60.0])]))
    even.see(torch.rand(200_000) * 3)
    limits = rare.limit(), even.limit()
    assert limits[0] is not None
    assert limits[1] is not None
    assert 3 < float(limits[0]) < 12
    assert 2.8 < float(limits[1]) <= 3


# -- real plans, a real model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "target"), [("int8", "8.9"), ("int8", "12.0"), ("fp8", "8.9"), ("fp8", "12.0")])
def test_a_plan_is_a_third(dtype: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(2))).eval()
    made = trt_dynamo.quantize(model, [torch.randn(4, 1024)], dtype)
    _, (network,) = networks_of(made, torch.randn(4, 1024), monkeypatch=monkeypatch)
    size = len(build(network, profile_of(network, {}), Settings(targets=(target,))))
    assert size < 4 * 2 * 1024 * 1024 * 0.36


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "method"), [("int8", "smooth"), ("fp8", "minmax")])
def test_similar_sentences_stay_similar(dtype: str, method: str) -> None:
    model, tokenizer = embedding.load(torch.device("cpu"))
    made = benchmark.compiled(benchmark.quantized(model, tokenizer, dtype, method))
    expected, found = (benchmark.similarities(m, tokenizer, benchmark.CALIBRATED, 300) for m in (model, made))
    assert benchmark.spearman(expected, found) > 0.98
