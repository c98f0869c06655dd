"""Models that NVIDIA's ModelOpt quantized: whole graphs, Q/DQ layers, plans, and ModelOpt's own numbers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls
from tests.test_quantization import kinds, networks_of
from trt_dynamo.build import build, profile_of
from trt_dynamo.lowering.modelopt import exportable, replaced_function, teach_dynamo, wait_for_modelopt
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings

# Dynamo makes an object of an autograd function, which torch itself advises against.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def mtq() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which versions of other packages it was not tested with
        import modelopt.torch.quantization as module
    return module


class Net(nn.Module):
    """Convolutions of two kinds, a batch norm, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, 2)
        self.body, self.head = nn.Linear(4, 128), nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.norm(self.conv(x))))).mean((2, 3))
        result: Tensor = self.head(F.relu(self.body(x)))
        return result


def images(size: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(size, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def quantized(mtq: Any, configuration: str, model: nn.Module | None = None, *batches: Tensor) -> Any:
    torch.manual_seed(0)
    made = (model or Net()).eval().requires_grad_(False)
    given = batches or (images(), images(seed=2))
    config = copy.deepcopy(getattr(mtq, configuration))
    return mtq.quantize(made, config, lambda prepared: [prepared(x) for x in given])


SLOW = pytest.mark.slow

CASES: list[Any] = [
    # ModelOpt's configuration, how many Q and DQ layers, how many weights in codes of which type
    ("INT8_DEFAULT_CFG", (4, 8), {torch.int8: 4}),
    pytest.param("INT8_SMOOTHQUANT_CFG", (4, 8), {torch.int8: 4}, marks=SLOW),
    pytest.param("INT8_WEIGHT_ONLY_CFG", (0, 4), {torch.int8: 4}, marks=SLOW),
    ("FP8_DEFAULT_CFG", (4, 8), {FP8: 4}),
    pytest.param("FP8_PER_CHANNEL_PER_TOKEN_CFG", (4, 8), {FP8: 4}, marks=SLOW),
    ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", (0, 2), {torch.int8: 2}),
    pytest.param("INT4_AWQ_CFG", (0, 2), {torch.int8: 2}, marks=SLOW),
    pytest.param("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", (0, 2), {FP8: 2}, marks=SLOW),
    pytest.param("W4A8_AWQ_BETA_CFG", (2, 4), {FP8: 2}, marks=SLOW),
]


@pytest.mark.parametrize(
    ("configuration", "layers", "codes"),
    CASES,
)
def test_what_the_layers_are_and_give(
    mtq: Any,
    configuration: str,
    layers: tuple[int, int],
    codes: dict[torch.dtype, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = layers[1] <= 4 and codes != {torch.int8: 4}
    x = torch.randn(4, 128) if linear else images()
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)) if linear else None
    made = quantized(mtq, configuration, model, *([x] if linear else []))
    expected = made(x)
    result, networks = networks_of(made, x, monkeypatch=monkeypatch, strict=True)
    assert_same(result, expected)
    assert len(networks) == 1
    assert report()["eager_calls"] == 0
    assert (kinds(networks[0]).count("QUANTIZE"), kinds(networks[0]).count("DEQUANTIZE")) == layers
    held = Counter(value.dtype for value in networks[0].constants.values())
    assert {dtype: held[dtype] for dtype in (torch.int8, FP8) if held[dtype]} == codes


@pytest.mark.slow
def test_a_transformer(mtq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ids = torch.arange(18).reshape(2, 9)
    made = quantized(mtq, "INT8_DEFAULT_CFG", transformers.BertModel(config), ids)
    expected = made(ids).last_hidden_state
    result, networks = networks_of(made, ids, monkeypatch=monkeypatch, strict=True)
    assert_same(result.last_hidden_state, expected)
    assert len(networks) == 1
    assert kinds(networks[0]).count("QUANTIZE") >= 2 * 6


def test_any_batch_size(mtq: Any) -> None:
    made = quantized(mtq, "INT8_DEFAULT_CFG")
    run = compiled(made, dynamic=True, cache="off")
    with torch.no_grad():
        for size in (5, 8, 2):
            assert_same(run(images(size)), made(images(size)))
    assert report()["graphs"] == 1


def test_a_second_calibration_is_seen(mtq: Any) -> None:
    made, x = quantized(mtq, "INT8_DEFAULT_CFG"), images()
    run = compiled(made, cache="off", rebuild_after=1)
    with torch.no_grad():
        before = run(x)
        made.body.input_quantizer.amax = made.body.input_quantizer.amax * 0.3
        for _ in range(4):
            assert_same(run(x), made(x))
        assert not torch.allclose(run(x), before)
        mtq.disable_quantizer(made, "*input_quantizer")
        calls = engine_calls()
        assert_same(run(x), made(x))
    assert engine_calls() == calls + 1


@pytest.mark.slow
def test_an_input_that_was_always_0(mtq: Any) -> None:
    """ModelOpt makes zeros of it for ever after."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for configuration in ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"):
        made = quantized(mtq, configuration, copy.deepcopy(model), torch.zeros(2, 8))
        x = torch.randn(3, 8)
        with torch.no_grad():
            assert_same(compiled(made, cache="off")(x), made(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(mtq: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype), torch.randn(4, 64).to(dtype)
    made = quantized(mtq, "INT8_DEFAULT_CFG", model, x)
    result, (network,) = networks_of(made, x, monkeypatch=monkeypatch)
    torch.testing.assert_close(result, made(x), rtol=0.03, atol=0.03)
    assert (kinds(network).count("QUANTIZE"), kinds(network).count("DEQUANTIZE")) == (2, 4)
    assert "CAST" not in kinds(network)


@pytest.mark.parametrize(
    ("configuration", "target"),
    [
        ("INT8_DEFAULT_CFG", "8.9"),
        pytest.param("INT8_DEFAULT_CFG", "12.0", marks=SLOW),
        pytest.param("FP8_DEFAULT_CFG", "8.9", marks=SLOW),
        pytest.param("FP8_DEFAULT_CFG", "12.0", marks=SLOW),
    ],
)
def test_a_plan_is_a_third(mtq: Any, configuration: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(2))), torch.randn(4, 1024)
    made = quantized(mtq, configuration, model, x)
    _, (network,) = networks_of(made, x, monkeypatch=monkeypatch)
    size = len(build(network, profile_of(network, {}), Settings(targets=(target,))))
    assert size < 4 * 2 * 1024 * 1024 * 0.36


def test_training_has_modelopts_gradients(mtq: Any) -> None:
    made = quantized(mtq, "INT8_DEFAULT_CFG").train().requires_grad_(True)
    other, x = copy.deepcopy(made), images()
    F.mse_loss(made(x), torch.ones(4, 6)).backward()
    F.mse_loss(compiled(other, cache="off")(x), torch.ones(4, 6)).backward()
    found = dict(other.named_parameters())
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


# -- ahead of time ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*buffer is not writable")  # torch 2.11's, of the files that it reads
@pytest.mark.parametrize("configuration", ["INT8_DEFAULT_CFG", pytest.param("FP8_DEFAULT_CFG", marks=SLOW)])
def test_an_export(mtq: Any, configuration: str) -> None:
    made, x = quantized(mtq, configuration), images()
    theirs = replaced_function()
    run = trt_dynamo.compile(made, (x,), runtime="reference", cache="off", min_segment_nodes=1)
    before = engine_calls()
    assert_same(run(x), made(x))
    assert engine_calls() == before + 1
    assert replaced_function() is theirs
    with pytest.raises(ZeroDivisionError), exportable():
        raise ZeroDivisionError
    assert replaced_function() is theirs
    program = torch.export.load(saved(made, x))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "trt_dynamo.fake_quantize.default" in ops
    assert not any(op.startswith("tensorrt.") for op in ops)


def saved(model: nn.Module, x: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    with exportable(), torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    return file


def test_a_program_with_modelopts_own_op(mtq: Any) -> None:
    """As `torch.export` makes it within ModelOpt's context; on a CPU it can for FP8."""
    from modelopt.torch.quantization.utils import export_torch_mode

    made, x = quantized(mtq, "FP8_DEFAULT_CFG"), images()
    with export_torch_mode(), torch.no_grad():
        program = torch.export.export(made, (x,))
    assert "tensorrt.quantize_op.default" in {str(node.target) for node in program.graph.nodes}
    run = trt_dynamo.compile(program, runtime="reference", cache="off", min_segment_nodes=1)
    before = engine_calls()
    assert_same(run(x), made(x))
    assert engine_calls() == before + 1


def test_a_dynamo_that_cannot_be_taught(mtq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a ModelOpt that computes otherwise, and a torch that has changed: graphs end, results are right."""
    from torch._dynamo import trace_rules

    monkeypatch.delattr(trace_rules, "add_module_init_func")
    wait_for_modelopt()
    teach_dynamo()  # it knows it already
    module = sys.modules["modelopt.torch.quantization.tensor_quant"]
    monkeypatch.setattr(module, "_tensor_quant", lambda *_: (torch.ones(2), torch.ones(1)))
    assert replaced_function() is None
    teach_dynamo()


# -- trt_dynamo.quantize ----------------------------------------------------------------------------------------------

ASKED: list[Any] = [
    pytest.param({"dtype": "int8"}, (4, 8), 0.99, marks=SLOW),
    pytest.param({"dtype": "int8", "method": "minmax"}, (4, 8), 0.99, marks=SLOW),
    ({"dtype": "int8", "keep": ("head", "co*")}, (2, 4), 0.99),
    ({"dtype": "fp8"}, (4, 8), 0.99),
    ({"dtype": "int8wo"}, (0, 4), 0.995),
    pytest.param({"dtype": "int8wo", "group": 2}, (0, 4), 0.995, marks=SLOW),
]


@pytest.mark.parametrize(("asked", "layers", "least"), ASKED)
def test_quantize_with_modelopt(
    mtq: Any, asked: dict[str, Any], layers: tuple[int, int], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.filterwarnings("ignore", ".*is not calibrated, skip smoothing")
    torch.manual_seed(0)
    model, x = Net().train(), images()
    before = copy.deepcopy(model.state_dict())
    loader = None if asked["dtype"].endswith("wo") else [images(seed=2), (images(seed=3),), {"x": images(seed=4)}]
    made = trt_dynamo.quantize(model, loader, tool="modelopt", **asked)
    assert isinstance(made, Net)
    assert model.training
    assert not made.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result, (network,) = networks_of(made, x, monkeypatch=monkeypatch, strict=True)
    assert_same(result, made(x))
    assert F.cosine_similarity(result.flatten(), model.eval()(x).flatten(), 0) > least
    assert (kinds(network).count("QUANTIZE"), kinds(network).count("DEQUANTIZE")) == layers


def test_norms_stay_in_floats(mtq: Any) -> None:
    """ModelOpt's own configurations quantize what goes into them."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    made: Any = trt_dynamo.quantize(model, [x], tool="modelopt", method="minmax")
    own = quantized(mtq, "INT8_DEFAULT_CFG", copy.deepcopy(model), x)
    assert [m.input_quantizer.is_enabled for m in own] == [True, True, True]
    assert [getattr(getattr(m, "input_quantizer", None), "is_enabled", False) for m in made] == [True, False, True]
    with torch.no_grad():
        assert_same(compiled(own, cache="off")(x), own(x))
        assert_same(compiled(made, cache="off")(x), made(x))


@pytest.mark.parametrize(("method", "group"), [(None, 32), pytest.param("awq", None, marks=SLOW)])
def test_four_bits(mtq: Any, method: str | None, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(8, 256)
    loader = [torch.randn(8, 256)] if method else None
    made = trt_dynamo.quantize(model, loader, "int4wo", tool="modelopt", method=method, group=group)
    assert made[0].weight_quantizer.block_sizes[-1] == (group or 128)  # type: ignore[index]
    result, (network,) = networks_of(made, x, monkeypatch=monkeypatch, strict=True)
    assert_same(result, made(x))
    raw = network.network.raw
    types = [raw.get_layer(i).get_output(0).dtype.name for i in range(raw.num_layers)]
    assert types.count("INT4") == 2


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "entropy"}, "of modelopt's int8 it is one of smooth, minmax"),
    ({"dtype": "fp8", "method": "smooth"}, "of modelopt's fp8 it is one of minmax"),
    ({"dtype": "int4wo", "method": "awq", "loader": None}, "give a loader"),
    ({"loader": []}, "no batch"),
    ({"run": lambda model, batch: None}, "did not call the model"),
    ({"loader": [torch.full((2, 3, 9, 9), torch.nan)]}, "infinite or NaN"),
]


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=[case[1] for case in WRONG])
def test_what_cannot_be(mtq: Any, changed: dict[str, Any], words: str) -> None:
    given = {"loader": [images()], "dtype": "int8", "method": "minmax", **changed}
    with pytest.raises(ValueError, match=words):
        trt_dynamo.quantize(Net().eval(), given.pop("loader"), given.pop("dtype"), tool="modelopt", **given)


def test_modelopt_is_loaded_by_nobody_else() -> None:
    code = "import sys, trt_dynamo.backend, trt_dynamo.quantization; print([n for n in sys.modules if 'modelopt' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = "['trt_dynamo.lowering.modelopt', 'trt_dynamo.quantization.modelopt']"
    assert done.stdout.strip() == loaded
