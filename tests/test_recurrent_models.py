"""LSTM, GRU and RNN through `torch.compile`: equal to eager for whatever sizes, and said where Dynamo skips them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls
from tests.recurrent_cases import (
    KINDS,
    allow_rnn,  # noqa: F401  a fixture
)
from trt_dynamo.graph_breaks import PACKED, SKIPPED
from trt_dynamo.reports import report
from trt_dynamo.settings import warn_once

# -- through torch.compile ---------------------------------------------------------------------------------------------

LENGTHS = [(6, 3), (9, 3), (12, 3), (20, 4), (33, 5), (6, 3)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_make_no_new_graphs(kind: str, mode: Any) -> None:
    layer = KINDS[kind](4, 5).eval()
    fast = compiled(layer, strict=True)
    with mode():
        for time, batch in LENGTHS:
            x = torch.randn(time, batch, 4)
            assert_same(fast(x), layer(x))
    assert report()["graphs"] <= 3 and report()["eager_calls"] == 0 and engine_calls() == len(LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_marked_dims_and_dynamic(kind: str) -> None:
    layer = KINDS[kind](4, 5, 2, bidirectional=True).eval()
    for dynamic in (None, True):
        torch._dynamo.reset()
        trt_dynamo.reset_report()
        fast = compiled(layer, strict=True, dynamic=dynamic)
        for time, batch in LENGTHS:
            x = torch.randn(time, batch, 4)
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
                torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
            with torch.no_grad():
                assert_same(fast(x), layer(x))
        assert report()["graphs"] == 1 and engine_calls() == len(LENGTHS)


def test_other_backends_get_torchs_own() -> None:
    seen: list[GraphModule] = []

    def backend(module: GraphModule, inputs: Any) -> Any:
        seen.append(module)
        return module.forward

    layer = nn.GRU(4, 5).eval()
    compiled(layer)(torch.randn(6, 3, 4))
    torch._dynamo.reset()
    other = torch.compile(layer, backend=backend)
    with torch.no_grad():
        for time in (6, 9, 12):
            x = torch.randn(time, 3, 4)
            assert_same(other(x), layer(x))
    assert len(seen) == 3  # one for each length, as without this package
    assert not any("trt_dynamo" in str(node.target) for module in seen for node in module.graph.nodes)


def test_default_settings_take_a_layer_alone() -> None:
    told = trt_dynamo.explain(nn.GRU(4, 5).eval(), torch.randn(6, 3, 4))
    assert len(told.segments) == 1 and not told.eager and not told.breaks


def test_weights_that_change() -> None:
    layer = nn.LSTM(4, 5, 2).eval()
    fast, x = compiled(layer, strict=True), torch.randn(6, 3, 4)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), layer(x))
            layer.get_parameter("weight_hh_l1").mul_(1.5)
            layer.get_parameter("bias_ih_l0").add_(0.5)
            assert_same(fast(x), layer(x))
    assert engine_calls() >= 1  # a change is answered by eager, until the weights rest


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_torchs(kind: str) -> None:
    layer = KINDS[kind](4, 5, 2, bidirectional=True)
    fast = compiled(layer)
    grads = []
    for function in (fast, layer):
        x = torch.linspace(-1, 1, 72).reshape(6, 3, 4).requires_grad_()
        layer.zero_grad()
        function(x)[0].square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(list(layer.parameters())) + 1
    assert_same(*grads)
    assert engine_calls() == 0


def test_train_mode_without_gradients() -> None:
    x = torch.randn(6, 3, 4)
    with torch.no_grad():
        layer = nn.GRU(4, 5, 2).train()
        assert_same(compiled(layer, strict=True)(x), layer(x))
        assert engine_calls() == 1
        for kind in (nn.GRU, nn.LSTM):
            dropping = kind(4, 5, 2, dropout=0.5).train()
            fast = compiled(dropping)
            for _ in range(2):
                torch.manual_seed(3)
                found = fast(x)
                torch.manual_seed(3)
                assert_same(found, dropping(x))
            assert not torch.equal(fast(x)[0], fast(x)[0])


class Speech(nn.Module):
    """Frames to letters, as recognizers do it: convolution, both ways twice, attention, LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, stride=2, padding=1)
        self.rnn = nn.GRU(16, 12, 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.lstm = nn.LSTM(24, 10, batch_first=True)
        self.out = nn.Linear(10, 5)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.rnn(self.conv(frames).relu().transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, (hidden, _) = self.lstm(x)
        return self.out(x).log_softmax(-1), hidden


def test_a_speech_model() -> None:
    model = Speech().eval()
    fast = compiled(model, strict=True)
    with torch.no_grad():
        for batch, frames in ((2, 30), (2, 41), (3, 64), (3, 90), (5, 33)):
            x = torch.randn(batch, 8, frames)
            assert_same(fast(x), model(x))
    assert report()["graphs"] <= 3 and report()["eager_calls"] == 0
    assert not trt_dynamo.explain(model, torch.randn(2, 8, 30), dynamic=True).eager


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs(kind: str) -> None:
    layer = KINDS[kind](4, 5, 2, bidirectional=True).eval()
    x = torch.randn(6, 3, 4)
    program = torch.export.export(layer, (x,))
    fast = compiled(program.module(), strict=True)
    with torch.no_grad():
        assert_same(fast(x), layer(x))
    assert report()["graphs"] == 1 and engine_calls() == 1


def test_an_exported_lstm_taken_apart() -> None:
    layer = nn.LSTM(4, 5, 2, bidirectional=True).eval().requires_grad_(False)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(6, 3, 4),)).run_decompositions()
    told = trt_dynamo.explain(program.module(), torch.randn(6, 3, 4))
    assert not told.eager
    fast, x = compiled(program.module(), strict=True), torch.randn(6, 3, 4)
    with torch.no_grad():
        # torch 2.11 takes the layer apart into states of another shape than the layer's own.
        assert_same(fast(x), program.module()(x))
        assert_same(fast(x)[0], layer(x)[0])
    assert engine_calls() == 2


# -- what Dynamo does not trace ----------------------------------------------------------------------------------------


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 5, bidirectional=True)
        self.after = nn.Linear(10, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(self.before(x).relu(), lengths, enforce_sorted=False)
        out, (hidden, _) = self.lstm(packed)
        return self.after(pad_packed_sequence(out)[0]), hidden


def test_packed_sequences_are_right_and_explained() -> None:
    model = Packing().eval()
    fast = compiled(model)
    with torch.no_grad():
        for time, lengths in ((7, [7, 3, 2]), (7, [2, 7, 7]), (9, [9, 1, 4])):
            x = torch.randn(time, 3, 4)
            assert_same(fast(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))
    assert PACKED in trt_dynamo.explain(model, torch.randn(7, 3, 4), torch.tensor([7, 3, 2])).breaks


def test_a_packed_sequence_as_an_argument() -> None:
    layer = nn.GRU(4, 5).eval()
    given = pack_padded_sequence(torch.randn(7, 3, 4), torch.tensor([7, 3, 2]))
    with torch.no_grad():
        out, hidden = compiled(layer)(given)
        wanted = layer(given)
    assert isinstance(out, PackedSequence)
    assert_same((out.data, hidden), (wanted[0].data, wanted[1]))
    assert PACKED in trt_dynamo.explain(layer, given).breaks


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu() + 1
        result: torch.Tensor = self.lstm(x)[0]
        return result


def test_the_user_is_told_of_allow_rnn(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Tagger().eval(), torch.randn(6, 3, 4)
    warn_once.cache_clear()
    with torch._dynamo.config.patch(allow_rnn=False), caplog.at_level(logging.WARNING), torch.no_grad():
        for layer in (model, nn.LSTM(4, 5).eval()):
            told = trt_dynamo.explain(layer, x)
            assert SKIPPED in told.breaks and "allow_rnn = True" in str(told)
            assert SKIPPED in told.as_dict()["breaks"]
        torch._dynamo.reset()
        assert_same(compiled(model)(x), model(x))
    assert [r.getMessage() for r in caplog.records].count(SKIPPED) == 1


def test_no_word_of_allow_rnn_where_it_is_set(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Tagger().eval(), torch.randn(6, 3, 4)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert not trt_dynamo.explain(model, x).breaks
        assert_same(compiled(model, strict=True)(x), model(x))
    assert not any(SKIPPED in r.getMessage() for r in caplog.records)
