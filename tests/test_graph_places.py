"""Where a CUDA graph reads its arguments, as far as that needs no GPU; the rest is in test_cuda_graphs.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled
from trt_dynamo import report
from trt_dynamo.errors import EngineError
from trt_dynamo.runtime.cuda_graphs import Graph, Seen, memory_like
from trt_dynamo.runtime.whole_graph import described

LAYOUTS = {
    "dense": torch.randn(2, 3, 4, 5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).t(),
    "with gaps": torch.randn(4, 8)[:, ::2],
    "a slice": torch.randn(9, 4)[2:5],
    "empty": torch.randn(0, 4),
    "a scalar": torch.tensor(2.5),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_is_laid_out_as_the_argument(tensor: Tensor) -> None:
    place = memory_like(tensor).copy_(tensor)
    assert place.stride() == tensor.stride() and torch.equal(place, tensor)
    assert tensor.numel() == 0 or place.data_ptr() != tensor.data_ptr()


def test_elements_that_share_memory_have_no_such_place() -> None:
    with pytest.raises(EngineError, match="share memory"):
        memory_like(torch.randn(1, 4).expand(3, 4))
    assert memory_like(torch.randn(1, 4).expand(1, 4)).shape == (1, 4)


def test_an_argument_lies_elsewhere_at_another_address() -> None:
    square, nothing = torch.randn(3, 3), cast("Any", None)
    graph = Graph(nothing, [1], [square.data_ptr()], [], [], [], [], 0, 0, [], after=nothing)
    assert not graph.moved([None, square]) and not graph.moved([None, square.view(3, 3)])
    assert graph.moved([None, square.clone()]) == {1}


def test_other_strides_are_another_graph() -> None:
    square = torch.randn(3, 3)
    assert described(square) == described(square.clone()) != described(square.t())


def test_what_moved_once_counts_as_moving() -> None:
    seen = Seen([10, 20, None])
    for addresses in ([10, 21, None], [10, 20, None], [10, 20, None]):
        seen.note(addresses)
    assert seen.moved == {1} and seen.count == 4


@pytest.mark.parametrize("model", [nn.Linear(16, 8), nn.LSTM(16, 32)], ids=["linear", "a loop"])
def test_engines_for_cuda_graphs_are_built_otherwise_and_stored_apart(model: nn.Module) -> None:
    x = torch.randn(7, 2, 16)
    for mode, misses in [("off", 1), ("auto", 2), ("whole", 2)]:
        torch._dynamo.reset()
        with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
            assert_same(compiled(model, cuda_graphs=mode)(x), model(x))
        assert report()["cache_misses"] == misses and report()["eager_calls"] == 0
