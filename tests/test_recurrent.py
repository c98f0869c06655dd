"""LSTM, GRU and RNN: kept whole, made loops of, equal to eager for whatever sizes, and said where Dynamo skips them."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import trt_dynamo
from tests.compiled import assert_same, compiled, engine_calls
from trt_dynamo.aten_converters import convert
from trt_dynamo.build import build, profile_of
from trt_dynamo.errors import Unsupported
from trt_dynamo.graph_breaks import PACKED, SKIPPED
from trt_dynamo.operators import recurrent
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings, warn_once
from trt_dynamo.testing import EvaluatedSegment, check, refused

aten = torch.ops.aten

KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
VARIANTS = [(kind, name) for kind in KINDS for name in OPTIONS]
PROJECTED = {"proj_size": 2, "num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def allow_rnn() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True), torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        yield


class WithStates(nn.Module):
    """The layer, its first states as arguments of their own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        return self.layer(x, states if len(states) > 1 else states[0])


def sized(layer: Any, time: int, batch: int) -> tuple[Tensor, ...]:
    """Inputs and first states for a layer."""
    x = torch.randn((batch, time, 4) if layer.batch_first else (time, batch, 4))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = torch.randn(count, batch, layer.proj_size or layer.hidden_size)
    return (x, hidden, torch.randn(count, batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else (x, hidden)


# -- the converters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_static(kind: str, options: str) -> None:
    layer = KINDS[kind](4, 5, **OPTIONS[options]).eval()
    check(layer, sized(layer, 6, 3)[0])
    check(WithStates(layer), *sized(layer, 6, 3))


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_dynamic(kind: str, options: str) -> None:
    layer = KINDS[kind](4, 5, **OPTIONS[options]).eval()
    further = [sized(layer, time, batch) for time, batch in ((2, 7), (19, 2), (6, 6))]
    check(layer, sized(layer, 6, 8)[0], dynamic=True, also=[given[:1] for given in further])
    check(WithStates(layer), *sized(layer, 6, 8), dynamic=True, also=further)


@pytest.mark.parametrize("dynamic", [False, True])
def test_projection(dynamic: bool) -> None:
    layer = nn.LSTM(4, 5, **PROJECTED).eval()
    check(layer, sized(layer, 6, 3)[0], dynamic=dynamic)
    check(WithStates(layer), *sized(layer, 6, 3), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str, dynamic: bool) -> None:
    for batch_first in (False, True):
        check(KINDS[kind](4, 8, batch_first=batch_first).eval(), torch.randn(6, 4), dynamic=dynamic)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 1, 4), (6, 1, 4), (6, 0, 4), (1, 0, 4)])
def test_small_sizes(kind: str, shape: tuple[int, ...]) -> None:
    layer = KINDS[kind](4, 8, bidirectional=True).eval()
    check(layer, torch.randn(shape))
    check(layer, torch.randn(shape), dynamic=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_the_builder_takes_minutes_over(kind: str) -> None:
    layer = KINDS[kind](4, 5).eval()
    with refused("a state of 5 numbers"):
        check(layer, torch.randn(6, 1, 4))
    check(layer, torch.randn(6, 2, 4))
    check(layer, torch.randn(1, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_as_good_as_eager(kind: str, dtype: torch.dtype) -> None:
    layer = KINDS[kind](16, 24, bidirectional=True).eval().to(dtype)
    x = torch.randn(30, 3, 16, dtype=dtype)
    found = check(layer, x, rtol=0.1, atol=0.1).results[0]
    eager = layer(x)[0]
    exact = layer.double()(x.double())[0]
    assert found.dtype is dtype
    assert (found - exact).abs().mean() <= 1.5 * (eager - exact).abs().mean()


def test_results_that_nobody_reads() -> None:
    layer = nn.LSTM(4, 5, 2, bidirectional=True).eval()
    for pick in (lambda r: r[0], lambda r: r[1][0], lambda r: r[1][1], lambda r: r[0][-1]):
        check(lambda x, pick=pick: pick(layer(x)), torch.randn(6, 3, 4))


def test_inputs_in_any_order_of_memory() -> None:
    layer = nn.GRU(4, 5, batch_first=True).eval()
    for x in (
        torch.randn(2, 4, 6).transpose(1, 2),
        torch.randn(6, 2, 4).transpose(0, 1),
        torch.randn(2, 12, 4)[:, ::2],
    ):
        check(layer, x)
        check(layer, x, dynamic=True)


def test_layers_do_not_grow_with_the_length() -> None:
    layer = nn.LSTM(4, 5).eval()
    counts = {check(layer, torch.randn(time, 3, 4)).layers for time in (2, 50, 200)}
    assert len(counts) == 1 and max(counts) < 60
    assert check(layer, torch.randn(50, 3, 4), dynamic=True).layers < 60
    assert check(nn.GRU(4, 5).eval(), torch.randn(50, 3, 4)).layers < 60
    assert check(nn.RNN(4, 5).eval(), torch.randn(50, 3, 4)).layers < 40


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell: Any, dynamic: bool) -> None:
    for bias in (False, True):
        made = cell(4, 5, bias=bias).eval()
        check(made, torch.randn(7, 4), dynamic=dynamic)
        check(made, torch.randn(4), dynamic=dynamic)
    two = (torch.randn(7, 5), torch.randn(7, 5))
    check(WithStates(made), torch.randn(7, 4), *two[: 2 if cell is nn.LSTMCell else 1], dynamic=dynamic)


# -- the ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_ops_state_what_torch_makes(batch_first: bool) -> None:
    lstm = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=batch_first)
    x, hidden, cells = sized(lstm, 6, 3)
    weights = [p.detach() for p in lstm.parameters()]
    tests = ("test_schema", "test_faketensor")
    options = (True, 2, True, batch_first)
    torch.library.opcheck(recurrent.lstm, (x, [hidden, cells], weights, *options), test_utils=tests)
    gru = nn.GRU(4, 5, 2, bidirectional=True, batch_first=batch_first)
    weights = [p.detach() for p in gru.parameters()]
    torch.library.opcheck(recurrent.rnn, ("gru", x, hidden, weights, *options), test_utils=tests)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h, w: torch.gru(x, h.half(), w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x[:0], h, w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x[..., :2], h, w, True, 1, 0.0, False, False, False),
    ],
)
def test_errors_are_torchs_own(call: Callable[..., Any]) -> None:
    layer = nn.GRU(4, 5).eval()
    args = (torch.randn(6, 3, 4), torch.randn(1, 3, 5), [p.detach() for p in layer.parameters()])
    with pytest.raises(RuntimeError):
        call(*args)
    with pytest.raises(RuntimeError), torch.no_grad():
        compiled(call)(*args)


# -- kernels of a device -----------------------------------------------------------------------------------------------


def run_node(op: Any, args: Any, results: tuple[Tensor, ...], read: int) -> tuple[Tensor, ...]:
    """The first `read` results of a graph that calls one op, as its network gives them; the plan is built too."""
    graph, feeds = Graph(), list[Tensor]()

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return [place(v) for v in value] if isinstance(value, list) else value
        node = graph.placeholder(f"x{len(feeds)}")
        node.meta["val"] = value
        feeds.append(value)
        return node

    call = graph.call_function(op, tuple(place(arg) for arg in args))
    call.meta["val"] = results
    picked = []
    for index in range(read):
        picked.append(graph.call_function(operator.getitem, (call, index)))
        picked[-1].meta["val"] = results[index]
    graph.output(tuple(picked))
    network = convert(GraphModule({}, graph), {})
    build(network, profile_of(network, {}), Settings())
    found: tuple[torch.Tensor, ...] = EvaluatedSegment(network)(*feeds)
    return found


def cudnn_arguments(layer: Any, mode: int, x: Tensor, states: tuple[Tensor, ...], **changes: Any) -> list[Any]:
    weights = [p.detach() for p in layer.parameters()]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    given: dict[str, Any] = {
        "input": x, "weight": weights, "stride": len(weights) // count, "buffer": None, "hx": states[0],
        "cx": states[1] if len(states) > 1 else None, "mode": mode, "hidden": layer.hidden_size,
        "proj": layer.proj_size, "layers": layer.num_layers, "batch_first": layer.batch_first, "dropout": 0.0,
        "train": False, "bidirectional": layer.bidirectional, "batch_sizes": [], "state": None,
    }  # fmt: skip
    return list((given | changes).values())


@pytest.mark.parametrize(("kind", "options"), [*VARIANTS, ("lstm", "projected")])
def test_cudnn(kind: str, options: str) -> None:
    layer: Any = KINDS[kind](4, 5, **(OPTIONS | {"projected": PROJECTED})[options]).eval()
    x, *states = sized(layer, 6, 3)
    mode = ["relu", "tanh", "lstm", "gru"].index(kind)
    with torch.no_grad():
        out, last = layer(x, tuple(states) if kind == "lstm" else states[0])
    wanted = (out, *last) if kind == "lstm" else (out, last)
    results = (out, wanted[1], wanted[2] if kind == "lstm" else torch.empty(0), torch.empty(0), torch.empty(0))
    args = cudnn_arguments(layer, mode, x, tuple(states))
    for read in (2, 3) if kind == "lstm" else (2,):
        assert_same(run_node(aten._cudnn_rnn.default, args, results, read), tuple(wanted[:read]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"batch_sizes": [3, 2]}, "packed"), ({"dropout": 0.5, "train": True, "layers": 2}, "dropout")],
)
def test_cudnn_says_no(changes: dict[str, Any], reason: str) -> None:
    layer = nn.GRU(4, 5)
    x, hidden = sized(layer, 6, 3)
    results = (torch.empty(6, 3, 5), hidden, torch.empty(0), torch.empty(0), torch.empty(0))
    with pytest.raises(Unsupported, match=reason):
        run_node(aten._cudnn_rnn.default, cudnn_arguments(layer, 3, x, (hidden,), **changes), results, 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_onednn(reverse: bool) -> None:
    layer = nn.LSTM(4, 5)
    weights = [p.detach() for p in layer.parameters()]
    args = (*sized(layer, 6, 3)[:1], *weights, *sized(layer, 6, 3)[1:], reverse, [], 2, 5, 1, True, False, False, False)
    with torch.no_grad():
        wanted = aten.mkldnn_rnn_layer.default(*args)
    assert_same(run_node(aten.mkldnn_rnn_layer.default, args, wanted, 3), tuple(wanted[:3]))


@pytest.mark.parametrize("bias", [False, True])
def test_fused_cells(bias: bool) -> None:
    x, hidden, cells = torch.randn(7, 4), torch.randn(7, 5), torch.randn(7, 5)
    ops = {nn.LSTMCell: aten._thnn_fused_lstm_cell.default, nn.GRUCell: aten._thnn_fused_gru_cell.default}
    for cell, op in ops.items():
        made = cell(4, 5, bias=bias)
        with torch.no_grad():
            wanted = made(x, (hidden, cells)) if cell is nn.LSTMCell else (made(x, hidden),)
            gates = (x @ made.weight_ih.T, hidden @ made.weight_hh.T)
        biases = (made.bias_ih.detach(), made.bias_hh.detach()) if bias else (None, None)
        args = (*gates, cells if cell is nn.LSTMCell else hidden, *biases)
        assert_same(run_node(op, args, (*wanted, gates[0]), len(wanted)), tuple(wanted))
        with pytest.raises(Unsupported, match="workspace"):
            run_node(op, args, (*wanted, gates[0]), len(wanted) + 1)


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
