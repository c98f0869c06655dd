"""What eager does must happen: mutations, aliases, gradients, randomness, odd inputs and outputs, and graph breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trt_dynamo.build
from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import runtime
from trt_dynamo.errors import BuildError
from trt_dynamo.reports import report


def test_mutation_of_an_input_reaches_the_caller() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2).add_(1)
        return x.sin() * 3

    x, y = torch.randn(4, 5), torch.empty(4, 5)
    y.copy_(x)
    with torch.no_grad():
        assert_same(compiled(f)(x), f(y))
    assert_same(x, y)
    assert engine_calls() > 0


def test_mutation_through_a_view_reaches_the_base() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        row = x[1]
        row.add_(10)
        x.t()[2].mul_(3)
        return x + 1

    x = torch.randn(4, 5)
    y = x.clone()
    with torch.no_grad():
        assert_same(compiled(f)(x), f(y))
    assert_same(x, y)


def test_mutation_of_a_view_given_as_an_input() -> None:
    def f(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        part.add_(1)
        return whole * 2

    x = torch.randn(4, 5)
    y = x.clone()
    with torch.no_grad():
        assert_same(compiled(f)(x[1:3], x), f(y[1:3], y))
    assert_same(x, y)


def test_mutation_of_a_buffer() -> None:
    class Counter(nn.Module):
        calls: torch.Tensor
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.total.add_(x.sum(0))
            return x * self.calls + self.total

    eager = Counter()
    model = copy.deepcopy(eager)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 3)
            assert_same(fast(x), eager(x))
    assert model.calls == 4
    assert_same(model.total, eager.total)


def test_a_view_output_aliases_its_input() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.view(-1), x.exp()

    x = torch.randn(2, 3)
    with torch.no_grad():
        view, _ = compiled(f)(x)
        view.zero_()
    assert_same(x, torch.zeros(2, 3))


def test_outputs_that_share_memory_still_do() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x.exp() + 1
        return y, y[0], y.view(-1)

    x = torch.randn(2, 3)
    with torch.no_grad():
        whole, first, flat = compiled(f)(x)
        whole.fill_(7)
    assert_same(first, torch.full((3,), 7.0))
    assert_same(flat, torch.full((6,), 7.0))
    assert engine_calls() == 1


def test_an_output_that_is_an_input() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, y + 1, y, x

    x, y = torch.randn(2), torch.randn(2)
    with torch.no_grad():
        a, b, c, d = compiled(f)(x, y)
    assert a is x and c is y and d is x
    assert_same(b, y + 1)


def test_a_clone_that_is_written_leaves_its_source_alone() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.add_(1)
        return x + y

    def g(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 0] = 0
        return x * 2 + y

    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same(compiled(f)(x), 2 * x + 1)
        assert_same(compiled(g)(x), g(x))


def test_batch_norm_statistics_move_in_train_mode() -> None:
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    model = copy.deepcopy(eager)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 3, 8, 8) * 2 + 1
            assert_same(fast(x), eager(x))
    assert model[1].num_batches_tracked == 3
    assert_same(model[1].running_mean, eager[1].running_mean)
    assert_same(model[1].running_var, eager[1].running_var)


def test_a_backward_pass_gives_gradients_as_eager_does() -> None:
    eager = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 2))
    model = copy.deepcopy(eager)
    fast = compiled(model)
    x = torch.randn(4, 5, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    fast(x).square().sum().backward()
    eager(twin).square().sum().backward()
    assert_same(x.grad, twin.grad)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert_same(ours.grad, theirs.grad)
    assert report()["eager_graphs"] == {"a backward pass may follow": 1}


def test_training_steps_and_evaluations_alternate() -> None:
    eager = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    model = copy.deepcopy(eager)
    fast = compiled(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
    for _ in range(4):
        x = torch.randn(6, 5)
        runs: tuple[Callable[..., Any], ...] = (fast, eager)
        for run, optimizer in zip(runs, optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            assert_same(fast(x), eager(x))


def test_gradients_inside_no_grad() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = (x * w).exp().sum() * 2
        return y

    w = torch.randn(3, requires_grad=True)
    x = torch.randn(3)
    with torch.no_grad():
        y = compiled(f)(x, w)
    y.backward()
    assert_same(w.grad, 2 * x * (x * w.detach()).exp())


def test_a_padding_mask_stays_a_padding_mask() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) * 1.5

    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    for mask in (
        torch.arange(6)[None, None, None] < torch.tensor([3, 6])[:, None, None, None],
        torch.randn(2, 3, 6, 6),
        torch.randn(6, 6),
        torch.rand(2, 1, 6, 6) > 0.3,
    ):
        with torch.no_grad():
            assert_same(compiled(f)(q, k, v, mask), f(q, k, v, mask))
    assert report()["eager_calls"] == 0


def test_random_numbers_differ_from_call_to_call_and_follow_the_seed() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.exp() + torch.rand(5)) * 2 - torch.randn(5).sin() + torch.rand_like(x)

    fast = compiled(f)
    x = torch.randn(5)
    with torch.no_grad():
        first, second = fast(x), fast(x)
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        ours = fast(x)
        torch.manual_seed(3)
        assert_same(ours, f(x))


def test_dropout_in_train_mode_differs_from_call_to_call() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.ReLU()).train()
    fast = compiled(model)
    x = torch.randn(4, 20)
    with torch.no_grad():
        assert not torch.equal(fast(x), fast(x))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16]
)
def test_inputs_of_every_type(dtype: torch.dtype) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.float() * 2, (x == 1) | (x > 0), x.to(torch.int64) + 1

    x = torch.tensor([[0, 1, 2], [3, 1, 0]]).to(dtype)
    with torch.no_grad():
        assert_same(compiled(f)(x), f(x))
    assert engine_calls() == 1 and report()["eager_calls"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int16])
def test_types_that_tensorrt_lacks_stay_in_eager(dtype: torch.dtype) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * x + x, y.exp() * 2

    x, y = torch.ones(3).to(dtype), torch.randn(3)
    with torch.no_grad():
        assert_same(compiled(f)(x, y), f(x, y))
    assert engine_calls() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6).t(),
        lambda: torch.randn(6, 8)[:, ::2],
        lambda: torch.randn(6, 4)[2:].t(),
        lambda: torch.randn(1, 4).expand(6, 4),
        lambda: torch.randn(25)[1:].view(6, 4),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
)
def test_inputs_of_every_stride(make: Any) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.exp() + 1, x.transpose(0, 1) * 2, x.sum(-1)

    x = make()
    with torch.no_grad():
        ours, eager = compiled(f)(x), f(x)
    assert_same(ours, eager)
    assert [t.stride() for t in ours] == [t.stride() for t in eager]


def test_a_python_int_argument() -> None:
    def f(x: torch.Tensor, n: int, scale: float) -> torch.Tensor:
        return x[:, :n] * scale + n

    fast = compiled(f)
    x = torch.randn(3, 10)
    with torch.no_grad():
        for n, scale in ((2, 1.0), (3, 1.5), (7, -2.0), (9, 0.25)):
            assert_same(fast(x, n, scale), f(x, n, scale))


def test_tuple_and_dict_outputs() -> None:
    def f(x: torch.Tensor) -> dict[str, Any]:
        return {"a": x.exp(), "b": (x + 1, None, 3), "c": [x.shape[0], x.sum()]}

    x = torch.randn(3, 4)
    with torch.no_grad():
        ours, eager = compiled(f)(x), f(x)
    assert ours.keys() == eager.keys() and ours["b"][1] is None and ours["b"][2] == 3 and ours["c"][0] == 3
    assert_same((ours["a"], ours["b"][0], ours["c"][1]), (eager["a"], eager["b"][0], eager["c"][1]))


def test_a_segment_whose_build_fails_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = trt_dynamo.build.build

    def failing(*args: Any, label: str = "", **keywords: Any) -> bytes:
        if label == "segment_0":
            raise BuildError("injected")
        return original(*args, label=label, **keywords)

    monkeypatch.setattr("trt_dynamo.engine_making.build", failing)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x.tanh() * 0.5).exp() + 1

    x = torch.randn(4)
    fast = compiled(f, strict=False, eager_ops="aten.erfinv")
    with torch.no_grad():
        assert_same(fast(x), f(x))
        assert_same(fast(x), f(x))
    counts = report()
    assert counts["engine_calls"] == 2 and counts["eager_reasons"] == {"BuildError: injected": 2}
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert sum("injected" in record.message for record in warnings) == 1


def test_an_engine_that_fails_at_run_time_is_replaced_by_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_dynamo.errors import EngineError

    def f(x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 1

    def fail(*_: Any) -> Any:
        raise EngineError("injected")

    fast = compiled(f, strict=False)
    x = torch.randn(4)
    with torch.no_grad():
        assert_same(fast(x), f(x))
        monkeypatch.setattr(runtime.Engine, "__call__", fail)
        assert_same(fast(x), f(x))
        assert_same(fast(x), f(x))
    assert report()["eager_calls"] == 2


def test_autocast_regions() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()

    def inner(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = model(x)
        return y.float() + 1

    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inner)(x), inner(x), rtol=2e-2, atol=2e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, eager = compiled(model)(x), model(x)
    assert ours.dtype is eager.dtype is torch.bfloat16
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
    assert engine_calls() == 2


def test_graph_breaks() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.exp() + 1
        torch._dynamo.graph_break()
        z = y.sin() * 2
        if z.sum() > 1e9:
            z = z - 1
        return z + x

    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same(compiled(f)(x), f(x))
    assert engine_calls() >= 2


def test_inference_mode_and_inference_tensors() -> None:
    model = nn.Linear(4, 3)
    fast = compiled(model)
    with torch.inference_mode():
        inside = torch.randn(2, 4)
        assert_same(fast(inside), model(inside))
    outside = torch.randn(2, 4)
    with torch.inference_mode():
        assert_same(fast(outside), model(outside))
    with torch.inference_mode():
        frozen = nn.Linear(4, 3)
        f = compiled(frozen)
        assert_same(f(inside), frozen(inside))
        frozen.weight.mul_(2)
        assert_same(f(inside), frozen(inside))


def test_a_mixed_device_scalar_and_a_default_dtype() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(3) + torch.arange(x.shape[0])

    x = torch.randn(5)
    with torch.no_grad():
        assert_same(compiled(f)(x), f(x))


def test_empty_and_zero_dim_tensors() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.exp() + 1, x.sum()

    with torch.no_grad():
        for x in (torch.randn(0, 3), torch.randn(()), torch.randn(1, 1), torch.randn(2, 0, 4)):
            torch._dynamo.reset()
            assert_same(compiled(f)(x), f(x))


def test_rank_nine_stays_in_eager() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).reshape(1, 1, 1, 1, 1, 1, 1, 2, 3).exp().sum(0) * 2

    x = torch.randn(2, 3)
    with torch.no_grad():
        assert_same(compiled(f)(x), f(x))


def test_a_data_dependent_op_splits_the_graph() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.exp() + 1
        return y[y > 1.5].sin() * 2

    x = torch.randn(20)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_same(compiled(f)(x), f(x))
        x = torch.randn(20)
        assert_same(compiled(f)(x), f(x))


def test_equal_segments_share_a_plan() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.erfinv(torch.tanh(x * 2) * 0.5), torch.erfinv(torch.tanh(y * 2) * 0.5)

    def g(y: torch.Tensor, unused: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * 2) * 0.5

    x, y = torch.randn(3), torch.randn(4)
    with torch.no_grad():
        assert_same(compiled(f, eager_ops="aten.erfinv")(x, y), f(x, y))
        assert_same(compiled(g)(y, y, x), g(y, y, x))
        assert_same(compiled(g)(x, x, y), g(x, x, y))
    assert report()["eager_calls"] == 0
