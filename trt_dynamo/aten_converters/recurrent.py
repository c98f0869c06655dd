"""LSTM, GRU and plain recurrent layers: a TensorRT loop over time for each layer, both directions in the same loop.

What does not depend on the state before, the product of the inputs with the weights, is made for all steps at once. The
steps themselves are those of torch's fused cells: matrix products in the model's dtype, gates in float32, states in the
model's dtype again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import trt_dynamo.operators.recurrent  # noqa: F401  registers the ops
from trt_dynamo.aten_converters.matmul import multiplied
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import trt

aten = torch.ops.aten
ours = torch.ops.trt_dynamo

# Whether each way through the sequence is in reverse, by `bidirectional`.
WAYS = ((False,), (False, True))

# A loop over gates as small as those of 5 numbers, of a batch of 1, becomes a plan of 80 MB in TensorRT for RTX 1.7.
LEAST_STATE = 7

State = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """The weights of a layer in one direction, [gates * hidden, features] as torch has them.

    `hidden_bias` is the one that cannot be added to the inputs' beforehand, a GRU's; `projection` is an LSTM's.
    """

    kind: str
    input_weight: Tensor
    hidden_weight: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


def cell_of(kind: str, weights: Sequence[Tensor], biases: bool) -> Cell:
    """The cell with weights in torch's order: input, hidden, their biases, projection."""
    input_bias, hidden_bias = weights[2:4] if biases else (None, None)
    rest = weights[4 if biases else 2 :]
    return Cell(kind, weights[0], weights[1], input_bias, hidden_bias, rest[0] if rest else None)


def product(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's `linear`."""
    result = multiplied(net, x, net.permute(weight, [1, 0]))
    return result if bias is None else net.elementwise("SUM", result, bias)


# -- one step ----------------------------------------------------------------------------------------------------------


def chunks(net: Network, gates: Tensor, count: int) -> list[Tensor]:
    axis = gates.ndim - 1
    size = int(gates.shape[axis]) // count
    return [net.narrow(gates, axis, index * size, size) for index in range(count)]


def sigmoid(net: Network, x: Tensor) -> Tensor:
    return net.activation("SIGMOID", x)


def tanh(net: Network, x: Tensor) -> Tensor:
    return net.activation("TANH", x)


def lstm_gates(net: Network, gates: Tensor, before: Tensor) -> State:
    """Hidden and cell state, from the sum of the inputs' and the state's products and the cell state before."""
    enter, forget, candidate, leave = chunks(net, net.wide(gates), 4)
    kept = net.elementwise("PROD", sigmoid(net, forget), net.wide(before))
    cells = net.elementwise("SUM", kept, net.elementwise("PROD", sigmoid(net, enter), tanh(net, candidate)))
    return net.elementwise("PROD", sigmoid(net, leave), tanh(net, cells)), cells


def gru_gates(net: Network, inputs: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    """The hidden state, from the inputs' product, the state's product and the state itself."""
    (reset_in, update_in, new_in), (reset, update, new) = (chunks(net, net.wide(g), 3) for g in (inputs, hidden))
    opened = net.elementwise("PROD", sigmoid(net, net.elementwise("SUM", reset_in, reset)), new)
    candidate = tanh(net, net.elementwise("SUM", new_in, opened))
    change = net.elementwise("SUB", net.wide(before), candidate)
    kept = net.elementwise("PROD", sigmoid(net, net.elementwise("SUM", update_in, update)), change)
    return net.elementwise("SUM", candidate, kept)


def step(net: Network, cell: Cell, inputs: Tensor, state: State) -> State:
    """The state after a step: `inputs` are the step's, multiplied already, [batch, gates * hidden]."""
    dtype = inputs.dtype
    hidden = product(net, state[0], cell.hidden_weight, cell.hidden_bias)
    if cell.kind == "gru":
        return (net.cast(gru_gates(net, inputs, hidden, state[0]), dtype),)
    total = net.elementwise("SUM", net.wide(inputs), net.wide(hidden))
    if cell.kind != "lstm":
        return (net.cast(net.activation("RELU" if cell.kind == "rnn_relu" else "TANH", total), dtype),)
    after, cells = (net.cast(s, dtype) for s in lstm_gates(net, total, state[1]))
    return (after if cell.projection is None else product(net, after, cell.projection)), cells


# -- a layer -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A way through the sequence: `inputs` [time, batch, gates * hidden] are multiplied already."""

    cell: Cell
    reverse: bool
    inputs: Tensor
    start: State


def direction(net: Network, x: Tensor, cell: Cell, reverse: bool, start: State) -> Direction:
    """Both biases are added to the inputs' product, but a GRU's second."""
    biases = [b for b in (cell.input_bias, cell.hidden_bias) if b is not None]
    if cell.kind == "gru":
        biases = biases[:1]
    else:
        cell = dataclasses.replace(cell, hidden_bias=None)
    inputs = net.wide(product(net, x, cell.input_weight))
    for bias in biases:
        inputs = net.elementwise("SUM", inputs, net.wide(bias))
    return Direction(cell, reverse, net.cast(inputs, x.dtype), start)


def run(net: Network, ways: Sequence[Direction]) -> list[tuple[Tensor, State]]:
    """For each way the hidden states of all steps, [time, batch, hidden], and the last state."""
    steps = ways[0].inputs.shape[0]
    return [single(net, way) for way in ways] if steps == 1 else looped(net, ways, steps)


def single(net: Network, way: Direction) -> tuple[Tensor, State]:
    """A sequence of one step needs no loop."""
    state = step(net, way.cell, net.squeeze(way.inputs, [0]), way.start)
    return net.unsqueeze(state[0], [0]), state


def looped(net: Network, ways: Sequence[Direction], steps: Dim) -> list[tuple[Tensor, State]]:
    batch, hidden = ways[0].start[-1].shape
    if batch == 1 and hidden < LEAST_STATE and ways[0].cell.kind in ("lstm", "gru"):
        raise Unsupported(
            f"a state of {hidden} numbers: TensorRT's builder takes minutes over fewer than {LEAST_STATE}"
        )
    loop = net.made(net.raw.add_loop())
    count = net.size_tensor(steps)
    net.name(net.made(loop.add_trip_limit(count.raw, trt.TripLimit.COUNT)))
    return [looped_way(net, loop, way, steps, count) for way in ways]


def looped_way(net: Network, loop: Any, way: Direction, steps: Dim, count: Tensor) -> tuple[Tensor, State]:
    inputs = net.out(loop.add_iterator(way.inputs.raw, 0, way.reverse), shape=way.inputs.shape[1:])
    kept = [net.made(loop.add_recurrence(start.raw)) for start in way.start]
    state = tuple(net.out(layer, shape=start.shape) for layer, start in zip(kept, way.start, strict=True))
    after = step(net, way.cell, inputs, state)
    for layer, value in zip(kept, after, strict=True):
        layer.set_input(1, value.raw)
    kind = trt.LoopOutput.REVERSE if way.reverse else trt.LoopOutput.CONCATENATE
    every = net.made(loop.add_loop_output(after[0].raw, kind, 0))
    every.set_input(1, count.raw)
    last = tuple(
        net.out(loop.add_loop_output(value.raw, trt.LoopOutput.LAST_VALUE, 0), shape=value.shape) for value in state
    )
    return net.out(every, shape=(steps, *after[0].shape)), last


# -- all layers --------------------------------------------------------------------------------------------------------


def recurrent(
    net: Network,
    x: Tensor,
    states: Sequence[Tensor],
    cells: Sequence[Cell],
    ways: Sequence[bool],
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """`x` [time, batch, features], `states` [layers * ways, batch, hidden] each, `cells` as many; `ways` says for each
    direction whether it goes from the end to the start.
    """
    x = net.permute(x, [1, 0, 2]) if batch_first else x
    ends: list[State] = []
    for first in range(0, len(cells), len(ways)):
        layer = [
            direction(net, x, cells[k], way, tuple(net.squeeze(net.narrow(s, 0, k, 1), [0]) for s in states))
            for k, way in enumerate(ways, first)
        ]
        results = run(net, layer)
        x = net.cat([out for out, _ in results], 2)
        ends += [end for _, end in results]
    out = net.permute(x, [1, 0, 2]) if batch_first else x
    return out, *(net.cat([net.unsqueeze(end[i], [0]) for end in ends], 0) for i in range(len(states)))


def cells_of(kind: str, weights: Sequence[Tensor], biases: bool, count: int) -> list[Cell]:
    """torch's flat list of weights, cut into `count` cells."""
    size = len(weights) // count
    return [cell_of(kind, weights[size * k : size * (k + 1)], biases) for k in range(count)]


@converter(ours.lstm.default)
def lstm(
    net: Network,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    ways = WAYS[bidirectional]
    return recurrent(net, x, hx, cells_of("lstm", weights, biases, layers * len(ways)), ways, batch_first)


@converter(ours.rnn.default)
def rnn(
    net: Network,
    kind: str,
    x: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    ways = WAYS[bidirectional]
    return recurrent(net, x, [hx], cells_of(kind, weights, biases, layers * len(ways)), ways, batch_first)
