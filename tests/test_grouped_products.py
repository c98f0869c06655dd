"""Matrix products by groups against eager: each form of the operands, both ways to compute them, groups of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.aten_converters import grouped_products
from trt_dynamo.reports import report, reset_report
from trt_dynamo.testing import check, evaluate, refused
from trt_dynamo.trt import trt

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
# What a copied matrix costs decides the way.
each_way = pytest.mark.parametrize("cost", [0, 10**9], ids=["blocks", "choice"])
ENDS = [(2, 5, 9), (0, 0, 9), (9, 9, 9), (0, 4, 4), (3, 9, 9), (0, 0, 0), (1, 1, 7)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ends(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def grouped(rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    import transformers.integrations.moe  # noqa: F401  it has the op

    result: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(rows, matrices, offs)
    return result


def turned(rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return grouped(rows, matrices.transpose(1, 2), offs)


@both
@each_way
@pytest.mark.parametrize("function", [grouped, turned])
def test_rows(function: Callable[..., Any], cost: int, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "ROWS_PER_COPY", cost)
    rows, matrices = random(9, 4), random(3, 4, 5) if function is grouped else random(3, 5, 4)
    calls = [(rows, matrices, ends(*given)) for given in ENDS]
    if dynamic:
        calls += [(random(n, 4), matrices, ends(n // 3, n // 3, n)) for n in (2, 3, 4, 5, 11, 40)]
    check(function, *calls[0], dynamic=dynamic, also=calls[1:])


@each_way
def test_a_nan_stays_in_its_row(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "ROWS_PER_COPY", cost)
    rows, matrices = random(9, 4), random(3, 4, 5)
    rows[3, 1], matrices[2] = torch.nan, torch.inf
    check(grouped, rows, matrices, ends(2, 5, 8, dtype=torch.int64))


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4, 5)), ((9, 0), (3, 0, 5)), ((9, 4), (0, 4, 5))], ids=str)
def test_nothing_to_multiply(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rows, matrices = (torch.randn(shape) for shape in shapes)
    check(grouped, rows, matrices, ends(*[shapes[0][0]] * shapes[1][0]))


FORMS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "rows": (torch._grouped_mm, (24, 16), (3, 16, 8), (8, 8, 24)),
    "rows, matrices transposed": (lambda a, b, o: torch._grouped_mm(a, b.mT, o), (24, 16), (3, 8, 16), (1, 7, 24)),
    "rows, both transposed": (lambda a, b, o: torch._grouped_mm(a.mT, b.mT, o), (16, 24), (3, 8, 16), (1, 7, 24)),
    "columns": (torch._grouped_mm, (3, 16, 8), (8, 24), (8, 8, 24)),
    "columns, transposed": (lambda a, b, o: torch._grouped_mm(a.mT, b.mT, o), (3, 8, 16), (24, 8), (0, 8, 24)),
    "shared dim": (torch._grouped_mm, (16, 24), (24, 8), (8, 8, 16)),
    "shared dim, transposed": (lambda a, b, o: torch._grouped_mm(a.mT, b, o), (24, 16), (24, 8), (0, 24, 24)),
    "batches": (lambda a, b, o: torch._grouped_mm(a, b), (3, 16, 8), (3, 8, 24), (0,)),
    "given type": (
        lambda a, b, o: torch._grouped_mm(a, b, o, out_dtype=torch.bfloat16), (24, 16), (3, 16, 8), (8, 9, 24),
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, dynamic: bool) -> None:
    """torch takes bfloat16 only where it traces."""
    function, a, b, offs = FORMS[name]
    check(function, random(*a, dtype=torch.bfloat16), random(*b, dtype=torch.bfloat16), ends(*offs), dynamic=dynamic)


def test_a_result_whose_rows_torch_pads() -> None:
    """Its kernels want rows that begin at multiples of 16 bytes."""
    rows, matrices = random(9, 16, dtype=torch.bfloat16), random(3, 5, 16, dtype=torch.bfloat16)

    def f(rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = torch._grouped_mm(rows, matrices.mT, offs)
        return result, result + 1

    fast = compiled(f)
    with torch.no_grad():
        for given in ENDS[:5]:
            offs = ends(*given)
            rows_within = max(given)
            found, expected = fast(rows, matrices, offs), f(rows, matrices, offs)
            assert_same([x[:rows_within] for x in found], [x[:rows_within] for x in expected])


def layers_of(rows: int, groups: int) -> list[trt.LayerType]:
    (network,) = evaluate(
        turned, torch.zeros(rows, 2), torch.zeros(groups, 3, 2), ends(*[rows] * groups), build_engines=False
    ).networks
    raw = network.network.raw
    return [raw.get_layer(i).type for i in range(raw.num_layers)]


@pytest.mark.parametrize(
    ("rows", "groups", "blocks"), [(2, 8, True), (8, 8, False), (8, 128, True), (600, 8, False), (20000, 8, True)]
)
def test_the_way(rows: int, groups: int, blocks: bool) -> None:
    """Blocks need a running sum of how many of them each group has."""
    assert (trt.LayerType.CUMULATIVE in layers_of(rows, groups)) is blocks


def test_what_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random(90, 4), random(9, 4, 5), ends(2, 5, 9, 9, 9, 40, 41, 70, 90)
    monkeypatch.setattr(grouped_products, "MOST_ELEMENTS", 9 * 90 * 5 - 1)
    check(grouped, *arguments)
    monkeypatch.setattr(grouped_products, "MOST_ELEMENTS", 18 * 10 * (4 + 5) - 1)
    with refused("up to 90 rows in 9 groups, whose sizes only the device knows"):
        check(grouped, *arguments)
    with refused("up to 72 rows in 3 groups"):
        check(torch._grouped_mm, *(random(*s, dtype=torch.bfloat16) for s in ((16, 72), (72, 8))), ends(8, 8, 72))


# -- models ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "use_cache": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 16},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.eval()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n != "Mixtral" else n for n in MODELS])
def test_models_are_one_engine(name: str) -> None:
    model = made(name)
    fast = compiled(model, dynamic=True)
    reset_report()
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 12)):
            ids = torch.arange(batch * length).reshape(batch, length) % 97
            assert_same(fast(ids).logits, model(ids).logits)
    counts = report()
    assert (counts["graphs"], counts["engines_built"], counts["eager_calls"]) == (1, 1, 0)
    assert engine_calls() == 2
