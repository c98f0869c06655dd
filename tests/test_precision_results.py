"""What models compute in half types: close to themselves, with masks, changed weights and small plans."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiled import compiled
from tests.precision_cases import (
    HALVES,
    IMAGES,
    X,
    by_hand,
    check_casts,
    chosen_of,
    cosine,
    linear,
    models,
    reasons,
    segments_of,
)
from trt_dynamo import Settings
from trt_dynamo.aten_converters import convert
from trt_dynamo.build import build, profile_of
from trt_dynamo.precision import Precision
from trt_dynamo.reports import report
from trt_dynamo.tf32 import allows_tf32

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


def behind(layer: Any, first: nn.Module) -> nn.Module:
    """A convolution or linear layer, and then the layer or function."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = first, layer if isinstance(layer, nn.Module) else None

        def forward(self, x: Tensor) -> Any:
            return layer(self.first(x)) if self.layer is None else self.layer(self.first(x))

    return Behind().eval()


SPATIAL: dict[str, Any] = {
    "transposed convolution": nn.ConvTranspose2d(8, 4, 3, 2, 1, 1),
    "dilated transposed convolution": nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, dilation=2),
    "circular convolution": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "instance norm": nn.InstanceNorm2d(8),
    "response norm": nn.LocalResponseNorm(3),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    "antialias": lambda x: F.interpolate(x, size=(7, 7), mode="bilinear", antialias=True),
    "adaptive max": nn.AdaptiveMaxPool2d(3),
    "adaptive average": nn.AdaptiveAvgPool2d(5),
    "power pool": nn.LPPool2d(2, 2),
    "unfold": nn.Unfold(3),
    "prelu": nn.PReLU(8),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "selu": nn.SELU(),
    "glu": nn.GLU(1),
    "log sigmoid": nn.LogSigmoid(),
}
ROWS: dict[str, Any] = {
    "log softmax": nn.LogSoftmax(-1),
    "sort": lambda x: x.sort(-1).values,
    "gather": lambda x: x.gather(-1, torch.zeros(4, 9, 2, dtype=torch.int64) + 3),
    "scatter": lambda x: x.scatter(1, torch.zeros(4, 1, 16, dtype=torch.int64), 0.5),
    "scatter add": lambda x: torch.zeros(4, 9, 16).scatter_add(1, torch.ones(4, 9, 16, dtype=torch.int64), x),
    "index put": lambda x: x.index_put((torch.tensor([0, 2]),), torch.zeros(())),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "distances": lambda x: torch.cdist(x, x),
    "unit vectors": lambda x: F.normalize(x, dim=-1),
    "rms norm": nn.RMSNorm(16),
    "encoder layer": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    "gru": nn.GRU(16, 16, 2, batch_first=True),
    "lstm with a projection": nn.LSTM(16, 16, proj_size=8, batch_first=True),
    "spectrum": lambda x: torch.fft.rfft(x).abs(),
    "cross entropy": lambda x: F.cross_entropy(x.flatten(0, 1), torch.zeros(36, dtype=torch.int64)),
    "logarithm": lambda x: x.abs().clamp(min=1e-2).log(),
}
LAYERS = [*((name, "spatial") for name in SPATIAL), *((name, "rows") for name in ROWS)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(("name", "kind"), LAYERS, ids=[name for name, _ in LAYERS])
def test_a_layer_behind_a_product(name: str, kind: str, precision: str) -> None:
    torch.manual_seed(0)
    if kind == "spatial":
        model, x = behind(SPATIAL[name], nn.Conv2d(8, 8, 3, padding=1)), torch.randn(2, 8, 12, 12)
    else:
        model, x = behind(ROWS[name], nn.Linear(16, 16)), torch.randn(4, 9, 16)
    fast = compiled(model, precision=precision, strict=True, cache="off")
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        actual, expected = fast(x), model(x)
        for segment, chosen in chosen_of(model, x, precision=precision):
            check_casts(chosen.module, segment.module)
    actual, expected = (y[0] if isinstance(y, tuple) else y for y in (actual, expected))
    assert actual.dtype is expected.dtype and cosine(actual, expected) > 0.9995
    assert report()["eager_calls"] == 0


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
