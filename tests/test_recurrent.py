"""LSTM, GRU and RNN: kept whole by the lowering, and made loops of by their converters."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from tests.compiled import assert_same, compiled
from tests.recurrent_cases import (
    KINDS,
    OPTIONS,
    PROJECTED,
    VARIANTS,
    WithStates,
    allow_rnn,  # noqa: F401  a fixture
    sized,
)
from trt_dynamo.aten_converters import convert
from trt_dynamo.build import build, profile_of
from trt_dynamo.errors import Unsupported
from trt_dynamo.operators import recurrent
from trt_dynamo.settings import Settings
from trt_dynamo.testing import EvaluatedSegment, check, refused

aten = torch.ops.aten


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
