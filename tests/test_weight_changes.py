"""Every way in which a weight can change is seen before the next answer, without an option."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo import weights_changed
from trt_dynamo.reports import report


class Block(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + self.shift


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.linear.weight.mul_(1.5)


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.linear.weight.mul_(1.5)


def slice_in_place(model: Any) -> None:
    with torch.no_grad():
        model.linear.weight[2, 3:] = 7


def buffer_in_place(model: Any) -> None:
    model.shift.add_(1)


def load_state_dict(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def load_state_dict_assign(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def assign_data(model: Any) -> None:
    model.linear.bias.data = model.linear.bias.data + 1


def new_parameter(model: Any) -> None:
    model.linear.weight = nn.Parameter(torch.randn(6, 6))


def vector_to_parameters(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())


def swap_tensors(model: Any) -> None:
    torch.utils.swap_tensors(model.linear.weight, nn.Parameter(torch.randn(6, 6)))


def step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        chosen = optimizer(model.parameters(), **options)
        x = torch.randn(4, 6)

        def loss() -> Any:
            chosen.zero_grad()
            value = model(x).square().sum()
            value.backward()
            return value

        chosen.step(loss)

    change.__name__ = f"{optimizer.__name__} {options}"
    return change


def write_through_data(model: Any) -> None:
    model.linear.weight.data.mul_(3).add_(1)


def copy_into_data(model: Any) -> None:
    model.linear.bias.data.copy_(torch.randn(6))


def merge_a_delta(model: Any) -> None:
    model.linear.weight.data += torch.randn(6, 1) @ torch.randn(1, 6)


def write_a_slice_of_data(model: Any) -> None:
    model.linear.weight.data[1:3, 2] = 9


def write_through_numpy(model: Any) -> None:
    model.linear.weight.detach().numpy()[0, 0] = 50


def write_through_a_view_of_data(model: Any) -> None:
    model.linear.weight.data.view(-1)[5:9].zero_()


def detached_in_place(model: Any) -> None:
    model.linear.weight.detach().mul_(2)


def swap_data_with_another(model: Any) -> None:
    other = nn.Parameter(torch.randn(6, 6))
    model.linear.weight.data, other.data = other.data, model.linear.weight.data
    model.kept = [other]


def storage_in_place(model: Any) -> None:
    model.linear.weight.untyped_storage().copy_(torch.randn(6, 6).untyped_storage())


def foreach(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.5)


def foreach_on_data(model: Any) -> None:
    torch._foreach_add_([p.data for p in model.parameters()], 1.0)


def target_network(model: Any) -> None:
    online = type(model)()
    for target, source in zip(model.parameters(), online.parameters(), strict=True):
        target.data.copy_(0.5 * source.data + 0.5 * target.data)


def in_another_thread(model: Any) -> None:
    thread = threading.Thread(target=write_through_data, args=(model,))
    thread.start()
    thread.join()


def replace_a_buffer(model: Any) -> None:
    model.shift = torch.randn(6)


def buffer_through_data(model: Any) -> None:
    model.shift.data[2] += 3


def initialize_again(model: Any) -> None:
    nn.init.xavier_uniform_(model.linear.weight)


def reset_parameters(model: Any) -> None:
    model.linear.reset_parameters()


def apply_a_function(model: Any) -> None:
    model._apply(lambda tensor: tensor * 2)


def one_bit(model: Any) -> None:
    model.linear.bias.data.view(torch.int32)[3] ^= 1 << 30


CHANGES = [
    write_through_data, copy_into_data, merge_a_delta, write_a_slice_of_data, write_through_numpy,
    in_place, in_inference_mode, slice_in_place, buffer_in_place, load_state_dict, load_state_dict_assign, assign_data,
    new_parameter, vector_to_parameters, swap_tensors, write_through_a_view_of_data, detached_in_place,
    swap_data_with_another, storage_in_place, foreach, foreach_on_data, target_network, in_another_thread,
    replace_a_buffer, buffer_through_data, initialize_again, reset_parameters, apply_a_function, one_bit,
]  # fmt: skip

# What versions, addresses and the optimizers' hook do not tell.
UNOBSERVED = {
    write_through_data, copy_into_data, merge_a_delta, write_a_slice_of_data, write_through_numpy,
    write_through_a_view_of_data, storage_in_place, foreach_on_data, target_network, in_another_thread,
    buffer_through_data, one_bit,
}  # fmt: skip


def optimizers() -> list[Any]:
    """Every optimizer of torch, plain, with foreach and fused, where it takes dense weights of any shape."""
    found: list[Any] = []
    kinds: dict[str, Any] = vars(torch.optim)
    for name, kind in sorted(kinds.items()):
        if not isinstance(kind, type) or kind is torch.optim.Optimizer or name in ("SparseAdam", "Muon"):
            continue
        takes = inspect.signature(kind).parameters
        options = {"lr": 0.5} if "lr" in takes else {}
        ways: tuple[dict[str, Any], ...] = ({}, {"foreach": True}, {"fused": True})
        found += [step(kind, **options, **way) for way in ways if way.keys() <= takes.keys()]
    return found


def test_muon_which_takes_matrices_only() -> None:
    def change(model: Any) -> None:
        optimizer = torch.optim.Muon([model.linear.weight], lr=0.5)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()

    after(change)


def test_sparse_steps() -> None:
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Tanh())
    fast = compiled(model)
    i = torch.tensor([[1, 2], [3, 1]])
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.5)
    for _ in range(3):
        with torch.no_grad():
            assert_same(fast(i), model(i))
        optimizer.zero_grad()
        model(i).square().sum().backward()
        optimizer.step()


def after(change: Callable[[Any], None], *, declare: bool = False, **options: Any) -> None:
    """The answers after the change are eager's, from the first on."""
    model = Block()
    fast = compiled(model, **options)
    x = torch.randn(3, 6)
    calls = engine_calls()
    with torch.no_grad():
        before = fast(x)
    assert engine_calls() == calls + 1
    change(model)
    if declare:
        weights_changed()
    with torch.no_grad():
        wanted = model(x)
        assert not torch.allclose(before, wanted)
        for _ in range(3):
            assert_same(fast(x), wanted)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_before_the_next_answer(change: Callable[[Any], None]) -> None:
    after(change)


@pytest.mark.parametrize("change", optimizers(), ids=lambda change: change.__name__)
def test_a_step_is_seen_before_the_next_answer(change: Callable[[Any], None]) -> None:
    after(change)
    torch._dynamo.reset()
    after(change, weights_check="observed")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_shows_where_weights_are_inputs(change: Callable[[Any], None]) -> None:
    after(change, weights="inputs")
    assert report()["rebuilds"] == report()["refits"] == 0


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in UNOBSERVED], ids=lambda change: change.__name__)
def test_versions_and_addresses_tell(change: Callable[[Any], None]) -> None:
    after(change, weights_check="observed")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{"weights": "frozen"}, {"weights_check": "observed"}], ids=str)
def test_a_declared_change_is_seen(change: Callable[[Any], None], options: dict[str, Any]) -> None:
    after(change, declare=True, **options)


def test_frozen_weights_are_not_looked_at() -> None:
    model = Block()
    fast = compiled(model, weights="frozen")
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = fast(x)
        model.linear.weight.mul_(3)
        assert_same(fast(x), before)
        weights_changed()
        assert_same(fast(x), model(x))


def test_a_moving_average_of_torch() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    fast, fast_average = compiled(model), compiled(average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(8, 6)
    for _ in range(4):
        model.train()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
        model.eval(), average.eval()
        with torch.no_grad():
            assert_same(fast(x), model(x))
            assert_same(fast_average(x), average(x))
    update_bn([x], average)
    average.eval()
    with torch.no_grad():
        assert_same(fast_average(x), average(x))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_parametrized_weights() -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        parametrize.register_parametrization(model.linear, "weight", Doubled())
        assert_same(fast(x), model(x))
        model.linear.parametrizations.weight.original.mul_(0.1)  # type: ignore[union-attr, operator]
        assert_same(fast(x), model(x))
        model.linear.weight = torch.randn(6, 6)
        assert_same(fast(x), model(x))
        parametrize.remove_parametrizations(model.linear, "weight")
        assert_same(fast(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_type(dtype: torch.dtype) -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        model.to(dtype)
        torch.testing.assert_close(fast(x.to(dtype)), model(x.to(dtype)), rtol=2e-2, atol=2e-2)
        model.to(torch.float32)
        assert_same(fast(x), model(x))


def test_a_weight_of_two_segments() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.linear(x))
            torch._dynamo.graph_break()
            return torch.tanh(self.linear(y))

    model = Twice()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), model(x))
            model.linear.weight.data[0] += 1


def test_only_one_weight_differs_between_two_sets() -> None:
    """The first weight of both is the same tensor, so the guess by it is wrong at every call."""
    model, other = Block(), Block()
    other.linear.weight = model.linear.weight
    fast, fast_other = compiled(model), compiled(other)
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(4):
            assert_same(fast(x), model(x))
            assert_same(fast_other(x), other(x))
    assert report()["eager_calls"] == 0 and report()["rebuilds"] == 0


def test_a_thread_that_writes_while_others_call() -> None:
    """Each answer is one for some state of the weights, and the first after the last write is for the last."""
    model = Block()
    model.shift.zero_()
    fast = compiled(model, rebuild="background")
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
        stop, wrong = threading.Event(), []

        def call() -> None:
            with torch.no_grad():
                while not stop.is_set():
                    y = fast(x)
                    if not torch.isfinite(y).all():
                        wrong.append(y)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            model.linear.weight.data.mul_(-1.1)
            assert_same(fast(x), model(x))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert_same(fast(x), model(x))
