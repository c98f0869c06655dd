"""2:4 sparsity: what `sparsify` prunes, what `explain` says of it, and which engines may take sparse kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import sparsify
from trt_dynamo.build import configure
from trt_dynamo.log import logger
from trt_dynamo.settings import Settings, warn_once
from trt_dynamo.sparsity import SegmentSparsity
from trt_dynamo.sparsity.pattern import largest_two, share_of_dense_groups
from trt_dynamo.trt import LazyModule, load, trt


class Conv1D(nn.Module):
    """As transformers': a linear layer with a weight of [inputs, outputs]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def brute_force(weight: Tensor, dim: int) -> Tensor:
    """The pruned weight, element by element."""
    result = weight.detach().clone().movedim(dim, -1).contiguous()
    for row in result.view(-1, 4):
        order = sorted(range(4), key=lambda i: (-abs(float(row[i])), i))
        row[order[2:]] = 0
    return result.movedim(-1, dim)


@pytest.mark.parametrize("shape", [(8, 16), (3, 4), (4, 8, 3), (4, 8, 3, 5), (2, 4, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_mask_keeps_the_two_largest_of_four(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    mask = largest_two(weight, 1)
    assert torch.equal(weight * mask, brute_force(weight, 1))
    assert share_of_dense_groups(weight, 1) == 1 and share_of_dense_groups(weight * mask, 1) == 0


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0]),
        ([0.0, -3.0, 2.0, 3.0], [0, 1, 0, 1]),
        ([float("nan"), 1.0, float("-inf"), 2.0], [1, 0, 1, 0]),
    ],
    ids=["equal", "signs", "not finite"],
)
def test_the_mask_of_one_group(values: list[float], kept: list[int]) -> None:
    assert largest_two(torch.tensor([values]), 1).int().tolist() == [kept]


def test_weights_of_other_strides() -> None:
    weight = torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(weight * largest_two(weight, 1), brute_force(weight, 1))
    turned = torch.randn(16, 8).t()
    assert torch.equal(turned * largest_two(turned, 1), brute_force(turned, 1))


class Model(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.projection = Conv1D(12, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight
        self.twin = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.twin.weight


def test_what_is_pruned_and_what_is_not() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    found = sparsify(model)
    after = model.state_dict()
    dims = {weight.name: weight.dim for weight in found.weights}
    assert dims == {
        "conv.weight": 1,
        "attention.in_proj_weight": 1,
        "attention.out_proj.weight": 1,
        "projection.weight": 0,
        "twin.weight": 1,
    }
    assert {name: reason.split(":")[0] for name, reason in found.skipped} == {
        "stem.weight": "its dim 1, which is added up, has 3 elements",
        "depthwise.weight": "its dim 1, which is added up, has 1 elements",
        "normed.weight": "it is computed, not a parameter (a parametrization or weight norm)",
        "head.weight": "something other than a linear layer or convolution reads it too",
    }
    for name, old in before.items():
        expected = brute_force(old, dims[name]) if name in dims else old
        expected = after["twin.weight"] if name == "again.weight" else expected
        assert torch.equal(after[name], expected), name
    for weight in found.weights:
        old, new = before[weight.name], after[weight.name]
        assert weight.shape == tuple(new.shape) and weight.kept == pytest.approx(0.5)
        assert weight.lost == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-4)
        assert f"{weight.name} {list(new.shape)}: 50.0% kept" in str(found)
    assert [each["name"] for each in found.as_dict()["weights"]] == list(dims)


@pytest.mark.parametrize(
    ("options", "pruned"),
    [
        ({}, ["0.weight", "1.0.weight", "1.1.weight"]),
        ({"only": ["1"]}, ["1.0.weight", "1.1.weight"]),
        ({"keep": ["1"]}, ["0.weight"]),
        ({"only": ["*.1"]}, ["1.1.weight"]),
        ({"only": ["1"], "keep": ["1.0"]}, ["1.1.weight"]),
    ],
    ids=str,
)
def test_the_modules_can_be_chosen(options: dict[str, Any], pruned: list[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert [weight.name for weight in sparsify(model, **options).weights] == pruned


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    head = nn.Linear(8, 8)
    before = head.weight.clone()
    with pytest.raises(ValueError, match="'heads' names no module"):
        sparsify(nn.Sequential(head), keep=["heads"])
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(8, 8, device="meta"), "no plain tensor of floats (torch.float32 on meta)"),
        (lambda: nn.LazyLinear(8), "no shape yet"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "no plain tensor of floats (torch.complex64"),
    ],
)
def test_weights_without_values_of_their_own_are_left(make: Callable[[], nn.Module], words: str) -> None:
    found = sparsify(make())
    assert not found.weights and words in found.skipped[0][1] and found.skipped[0][0] == "weight"


def test_pruning_twice_changes_nothing_more() -> None:
    model = nn.Linear(16, 16)
    sparsify(model)
    once = model.weight.clone()
    (weight,) = sparsify(model).weights
    assert torch.equal(model.weight, once) and weight.lost == 0 and weight.kept == 0.5


def test_training_keeps_the_zeros_with_the_hook() -> None:
    model = nn.Linear(8, 8)
    found = sparsify(model)
    zeros = model.weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = optimizer.register_step_post_hook(found.reapply)
    for _ in range(3):
        with torch.enable_grad():
            model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model.weight == 0, zeros)
    hook.remove()
    optimizer.step()
    assert share_of_dense_groups(model.weight, 1) == 1
    del model, optimizer
    with pytest.raises(RuntimeError, match="gone"):
        found.reapply()


# -- explain ----------------------------------------------------------------------------------------------------------


def told(model: nn.Module, *args: Any, **options: Any) -> SegmentSparsity:
    options = {"sparse_weights": True, "min_segment_nodes": 1, "precision": "fp16", **options}
    (segment,) = trt_dynamo.explain(model, *args, options=options).sparsity
    return segment


class Explained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)
        self.linear, self.wide, self.odd = nn.Linear(8, 6), Conv1D(8, 6), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv(self.stem(x))).mean((2, 3))
        z: Tensor = self.odd(self.wide(self.linear(y)))
        return z @ z.t()


def test_explain_says_which_products_qualify() -> None:
    model = Explained()
    sparsify(model)
    with torch.no_grad():
        model.odd.weight[0, :3] = 1.0
    found = told(model, torch.randn(2, 3, 8, 8))
    assert {product.weight: product.reason for product in found.products} == {
        "stem.weight": "3 input channels are not divisible by 4",
        "conv.weight": "",
        "up.weight": "a transposed convolution",
        "linear.weight": "",
        "wide.weight": "6 input channels are not divisible by 4",
        "odd.weight": "12 % of its groups of four have more than two values other than 0",
    }
    text = str(found)
    assert "2 of 6 products have 2:4 weights that qualify\n  qualify: conv.weight, linear.weight\n" in text
    assert "  not: up.weight: a transposed convolution" in text
    assert all("test_sparsity.py:" in product.source for product in found.products)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"precision": "bf16"}, ""),
        ({"precision": "native"}, "computes in float32"),
        ({"weights": "inputs"}, "the engine takes the weights as inputs"),
    ],
    ids=str,
)
def test_the_settings_count_too(options: dict[str, Any], reason: str) -> None:
    model = nn.Linear(8, 8)
    sparsify(model)
    (product,) = told(model, torch.randn(2, 8), **options).products
    assert product.reason == reason if not reason else reason in product.reason


def test_weights_that_move_before_the_product_are_followed() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    sparsify(model)
    x, y = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    products = told(model, x, y, y).products
    assert {product.weight for product in products} == {"in_proj_weight", "out_proj.weight"}
    assert [product.reason for product in products] == [""] * len(products)


def test_quantized_weights_are_int8_products() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    sparsify(model)
    quantized = trt_dynamo.quantize(model, [torch.randn(4, 16) for _ in range(2)], "int8", method="minmax")
    found = told(quantized, torch.randn(4, 16), precision="native")
    assert [product.reason for product in found.products] == ["", ""]


def test_explain_says_nothing_of_it_unasked() -> None:
    assert trt_dynamo.explain(nn.Linear(8, 8), torch.randn(2, 8), options={"min_segment_nodes": 1}).sparsity == ()


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparse", "refit", "expected"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_only_engines_with_fixed_weights_may_be_sparse(sparse: bool, refit: bool, expected: bool) -> None:
    config = trt.Builder(logger()).create_builder_config()
    configure(config, Settings(sparse_weights=sparse), refit=refit, tf32=False)
    assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS) is expected


def test_a_flavor_without_the_flag_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Flags:
        def __getattr__(self, name: str) -> Any:
            if name == "SPARSE_WEIGHTS":
                raise AttributeError(name)
            return getattr(load().BuilderFlag, name)

    config = trt.Builder(logger()).create_builder_config()
    monkeypatch.setattr(LazyModule, "BuilderFlag", Flags(), raising=False)
    warn_once.cache_clear()
    for _ in range(2):
        configure(config, Settings(sparse_weights=True), refit=False, tf32=False)
    assert [record.getMessage() for record in caplog.records if "sparse_weights is ignored" in record.getMessage()] == [
        f"{load().__name__} {load().__version__} has no flag for sparse weights: sparse_weights is ignored"
    ]


def test_the_setting_is_part_of_the_key() -> None:
    assert Settings(sparse_weights=True).engine_fields() != Settings().engine_fields()


def test_dense_weights_after_sparse_ones_are_followed() -> None:
    first = nn.Linear(8, 8)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 4)).eval()
    sparsify(model)
    run, x = compiled(model, sparse_weights=True), torch.randn(3, 8)
    with torch.no_grad():
        before = engine_calls()
        assert_same(run(x), model(x))
        first.weight.copy_(torch.randn(8, 8))
        for _ in range(3):
            assert_same(run(x), model(x))
        sparsify(model)
        assert_same(run(x), model(x))
    assert engine_calls() > before
