"""Ops for `torch.lstm`, `torch.gru`, `torch.rnn_tanh`, `torch.rnn_relu`: AOTAutograd would unroll them step by step.

`trt_dynamo::lstm` and `trt_dynamo::rnn` are torch's functions over padded sequences, without dropout: what `nn.LSTM`,
`nn.GRU` and `nn.RNN` call, on whatever device. Packed sequences are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("trt_dynamo::lstm", mutates_args=())
def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm`: the outputs, the last hidden states, the last cell states."""
    out, hidden, cells = torch.lstm(x, list(hx), list(weights), biases, layers, 0.0, False, bidirectional, batch_first)
    return time_before_batch(out, batch_first), hidden.contiguous(), cells.contiguous()


@lstm.register_fake
def fake_lstm(x: Tensor, hx: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return tuple(empty_results(x, hx, *options))


@torch.library.custom_op("trt_dynamo::rnn", mutates_args=())
def rnn(
    kind: str,
    x: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu` by `kind`: the outputs, the last hidden states."""
    function = getattr(torch, kind)
    out, hidden = function(x, hx, list(weights), biases, layers, 0.0, False, bidirectional, batch_first)
    return time_before_batch(out, batch_first), hidden.contiguous()


@rnn.register_fake
def fake_rnn(kind: str, x: Tensor, hx: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(empty_results(x, [hx], *options))


@torch.library.custom_op("trt_dynamo::rnn_with_dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def rnn_with_dropout(
    kind: str,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Any of them in train mode, for eager: torch's decomposition of them leaves the dropout out."""
    states = list(hx) if kind == "lstm" else hx[0]
    function = getattr(torch, kind)
    out, *last = function(x, states, list(weights), biases, layers, dropout, True, bidirectional, batch_first)
    return [time_before_batch(out, batch_first), *(state.contiguous() for state in last)]


@rnn_with_dropout.register_fake
def fake_rnn_with_dropout(kind: str, x: Tensor, hx: Sequence[Tensor], *options: Any) -> list[Tensor]:
    return empty_results(x, hx, *options)


def empty_results(x: Tensor, hx: Sequence[Tensor], *options: Any) -> list[Tensor]:
    """The outputs, then last states like the first ones, all as torch's kernels lay them out. The ops' options end with
    `bidirectional, batch_first`.
    """
    bidirectional, batch_first = options[-2:]
    batch, time = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    out = x.new_empty((time, batch, hx[0].shape[2] * (2 if bidirectional else 1)))
    states = [x.new_empty((state.shape[0], batch, state.shape[2])) for state in hx]
    return [out.transpose(0, 1) if batch_first else out, *states]


def time_before_batch(out: Tensor, batch_first: bool) -> Tensor:
    """The outputs as they lie in memory, whatever their dims: time, batch, features."""
    return out.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else out.contiguous()


ARGUMENTS = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first",
)  # fmt: skip


def stand_in(kind: str) -> Callable[..., Any]:
    """What stands for torch's function `kind`, where the sequences are padded and nothing is dropped."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        if len(args) > len(ARGUMENTS) or given.keys() != set(ARGUMENTS):
            return NotImplemented
        x, hx, weights, biases, layers, dropout, train, bidirectional, batch_first = (given[a] for a in ARGUMENTS)
        packed = isinstance(hx if kind == "lstm" else weights, Tensor)  # then it is `batch_sizes` or the states
        if packed or not sound(x, hx, weights, batch_first):
            return NotImplemented
        if train and layers > 1 and dropout:
            states = hx if kind == "lstm" else [hx]
            ways = (bidirectional, batch_first)
            return tuple(rnn_with_dropout(kind, x, states, weights, biases, layers, float(dropout), *ways))
        options = (biases, layers, bidirectional, batch_first)
        return lstm(x, hx, weights, *options) if kind == "lstm" else rnn(kind, x, hx, weights, *options)

    return call


def sound(x: Tensor, hx: Tensor | Sequence[Tensor], weights: Sequence[Tensor], batch_first: bool) -> bool:
    """Whether sizes and types fit; what does not is left to torch, whose error it is.

    Raises:
        RuntimeError: there are no steps. torch's kernels say the same, its decompositions return what they find.
    """
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    tensors = [*states, *weights]
    if x.ndim != 3 or any(s.ndim != 3 for s in states) or any(t.dtype is not x.dtype for t in tensors):
        return False
    batch, time = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if time == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return all(s.shape[1] == batch for s in states) and bool(weights[0].shape[1] == x.shape[2])


aten = torch.ops.aten

# Dynamo's graphs call torch's functions, exported programs the overloads of ATen.
WHOLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: stand_in("lstm"),
    torch.gru: stand_in("gru"),
    torch.rnn_tanh: stand_in("rnn_tanh"),
    torch.rnn_relu: stand_in("rnn_relu"),
    aten.lstm.input: stand_in("lstm"),
    aten.gru.input: stand_in("gru"),
    aten.rnn_tanh.input: stand_in("rnn_tanh"),
    aten.rnn_relu.input: stand_in("rnn_relu"),
}
