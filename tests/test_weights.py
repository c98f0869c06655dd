"""Weights follow the model: every set gets its own answer, and no change of a weight is served stale."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.reports import report
from trt_dynamo.runtime import Engine
from trt_dynamo.weights import STEPS, WeightSet


class Block(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + self.shift


def test_two_instances_of_a_class_get_their_own_answers() -> None:
    models = [Block(), Block(), Block()]
    fast = [compiled(model) for model in models]
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(3):
            for run, model in zip(fast, models, strict=True):
                assert_same(run(x), model(x))
    assert report()["graphs"] == 1 and report()["eager_calls"] == 0


def test_an_ema_copy_and_its_model_alternate() -> None:
    model = Block()
    average = copy.deepcopy(model)
    fast, fast_average = compiled(model), compiled(average)
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), model(x))
            assert_same(fast_average(x), average(x))
            for p, a in zip(model.parameters(), average.parameters(), strict=True):
                p.add_(torch.randn_like(p))
                a.mul_(0.9).add_(p, alpha=0.1)


def test_six_equal_blocks_compiled_one_by_one() -> None:
    blocks = nn.ModuleList(Block() for _ in range(6))
    fast = [compiled(block, max_weight_sets=4) for block in blocks]
    x = torch.randn(3, 6)
    with torch.no_grad():
        for _ in range(2):
            ours = eager = x
            for run, block in zip(fast, blocks, strict=True):
                ours, eager = run(ours), block(eager)
            assert_same(ours, eager)
    counts = report()
    assert counts["graphs"] == 1 and counts["engines_built"] == 5 and counts["eager_calls"] == 0


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
        model(torch.randn(4, 6)).square().sum().backward()
        chosen.step()

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


CHANGES = [
    write_through_data, copy_into_data, merge_a_delta, write_a_slice_of_data, write_through_numpy,
    in_place, in_inference_mode, slice_in_place, buffer_in_place, load_state_dict, load_state_dict_assign, assign_data,
    new_parameter, vector_to_parameters, swap_tensors,
    step(torch.optim.SGD, lr=0.5), step(torch.optim.SGD, lr=0.5, fused=True),
    step(torch.optim.SGD, lr=0.5, foreach=True), step(torch.optim.Adam, lr=0.1),
    step(torch.optim.AdamW, lr=0.1, fused=True), step(torch.optim.Adam, lr=0.1, fused=True),
    step(torch.optim.Adagrad, lr=0.1, fused=True), step(torch.optim.RMSprop, lr=0.1),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_before_the_next_answer(change: Callable[[Any], None]) -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = fast(x)
    assert engine_calls() == 1
    change(model)
    with torch.no_grad():
        after = model(x)
        assert not torch.allclose(before, after)
        for _ in range(3):
            assert_same(fast(x), after)


def test_an_engine_comes_back_when_changed_weights_rest() -> None:
    model = Block()
    fast = compiled(model, rebuild_after=3)
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
        model.linear.weight.mul_(2)
        for _ in range(6):
            assert_same(fast(x), model(x))
    counts = report()
    assert counts["rebuilds"] == 1 and counts["rebuild_reasons"] == {"the weights changed": 1}
    assert counts["eager_reasons"] == {"the weights changed": 3} and counts["engine_calls"] == 4


def test_weights_written_back_need_no_rebuild() -> None:
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
        kept = model.linear.weight.clone()
        model.linear.weight.copy_(kept)
        assert_same(fast(x), model(x))
    assert report()["engine_calls"] == 2 and report()["eager_calls"] == 0


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(torch.tanh(self.embed(i)))
            return out

    model = Tied()
    fast = compiled(model, rebuild_after=1)
    i = torch.randint(0, 10, (2, 3))
    with torch.no_grad():
        for _ in range(4):
            assert_same(fast(i), model(i))
            model.embed.weight.add_(0.5)


def test_a_dead_model_takes_its_engines_along() -> None:
    others = weakref.WeakSet(o for o in gc.get_objects() if type(o) is Engine)
    model = Block()
    fast = compiled(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast(x)
    engines = [o for o in gc.get_objects() if type(o) is Engine and o not in others]
    assert len(engines) == 1
    gone = weakref.ref(engines.pop())
    twin = Block()
    del model, fast
    gc.collect()
    assert gone() is None
    fast = compiled(twin)
    with torch.no_grad():
        assert_same(fast(x), twin(x))


def test_a_new_tensor_at_an_old_address_is_not_taken_for_the_old_one() -> None:
    def f(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        return block(x)  # type: ignore[no-any-return]

    fast = compiled(f)
    x = torch.randn(3, 6)
    for _ in range(12):
        block = Block()
        with torch.no_grad():
            assert_same(fast(x, block), block(x))
        del block
        gc.collect()


def test_optimizer_steps_of_others_are_a_doubt_only() -> None:
    tensors = [torch.randn(3), torch.randn(2)]
    weights = WeightSet(tensors, "observed")

    def holds() -> bool:
        return weights.holds(weights.begin(tensors), tensors)

    assert holds()
    STEPS.stepped()
    assert not holds()
    assert not weights.changed(tensors) and holds()
