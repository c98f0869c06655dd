"""Recurrent layers under the names that torch has for the kernels of a device, as exported programs may hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.recurrent import Cell, cells_of, gru_gates, lstm_gates, recurrent
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten

# What cuDNN and oneDNN call the kinds.
MODES = ("rnn_relu", "rnn_tanh", "lstm", "gru")
LSTM = MODES.index("lstm")

PACKED = "a packed sequence: its layout depends on the lengths' values"


def refuse_workspace(net: Network, position: int) -> None:
    if net.used[position]:
        raise Unsupported("its workspace is read, which belongs to a backward pass")


@converter(aten.mkldnn_rnn_layer.default)
def mkldnn_rnn_layer(
    net: Network,
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor,
    hidden_bias: Tensor,
    hidden: Tensor,
    cells: Tensor,
    reverse: bool,
    batch_sizes: Sequence[int],
    mode: int,
    hidden_size: int,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    train: bool,
) -> tuple[Tensor, ...]:
    """One layer in one direction. Without biases, the bias arguments hold anything."""
    if batch_sizes:
        raise Unsupported(PACKED)
    if mode != LSTM or num_layers != 1 or bidirectional:
        raise Unsupported("oneDNN's recurrent layers other than one LSTM in one direction")
    refuse_workspace(net, 3)
    biases = (input_bias, hidden_bias) if has_biases else (None, None)
    cell = Cell("lstm", input_weight, hidden_weight, *biases)
    out, hidden, cells = recurrent(net, x, [hidden, cells], [cell], (reverse,), batch_first)
    return out, hidden, cells, cells


@converter(aten._cudnn_rnn.default)
def cudnn_rnn(
    net: Network,
    x: Tensor,
    weight: Sequence[Tensor],
    weight_stride0: int,
    weight_buf: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
    dropout_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """`weight` is torch's flat list, `weight_stride0` for each cell; `weight_buf` holds the same once more."""
    if batch_sizes:
        raise Unsupported(PACKED)
    if train and dropout and num_layers > 1:
        raise Unsupported("dropout between the layers")
    refuse_workspace(net, 3)
    if net.used[4]:
        raise Unsupported("its buffer of weights is read")
    ways = (False, True) if bidirectional else (False,)
    cells = cells_of(MODES[mode], weight, weight_stride0 >= 4, num_layers * len(ways))
    out, *last = recurrent(net, x, [hx] if cx is None else [hx, cx], cells, ways, batch_first)
    cell_states = last[1] if cx is not None else net.constant(torch.empty(0, dtype=net.result_dtype(2)))
    return out, last[0], cell_states, out, out


@converter(aten._thnn_fused_lstm_cell.default)
def fused_lstm_cell(
    net: Network,
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    refuse_workspace(net, 2)
    gates = net.elementwise("SUM", biased(net, input_gates, input_bias), biased(net, hidden_gates, hidden_bias))
    hidden, cells = lstm_gates(net, gates, cx)
    return net.cast(hidden, cx.dtype), net.cast(cells, cx.dtype), input_gates


@converter(aten._thnn_fused_gru_cell.default)
def fused_gru_cell(
    net: Network,
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    refuse_workspace(net, 1)
    inputs, hidden = biased(net, input_gates, input_bias), biased(net, hidden_gates, hidden_bias)
    return net.cast(gru_gates(net, inputs, hidden, hx), hx.dtype), input_gates


def biased(net: Network, gates: Tensor, bias: Tensor | None) -> Tensor:
    return net.wide(gates) if bias is None else net.elementwise("SUM", net.wide(gates), net.wide(bias))
