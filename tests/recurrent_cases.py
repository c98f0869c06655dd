"""What the tests of recurrent layers share: the layers, their options, their inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
