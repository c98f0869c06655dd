"""Activations against eager, NaN and infinities among their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trt_dynamo.testing import check

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])

EDGES = torch.tensor(
    [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 25.0, -25.0, 1e-6, -1e-6]
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "elu, alpha": lambda x: F.elu(x, 0.3),
    "selu": F.selu,
    "celu": F.celu,
    "celu, alpha": lambda x: F.celu(x, 0.7),
    "leaky_relu": F.leaky_relu,
    "leaky_relu, steep": lambda x: F.leaky_relu(x, 1.5),
    "leaky_relu, negative": lambda x: F.leaky_relu(x, -0.2),
    "hardtanh": F.hardtanh,
    "hardtanh, bounds": lambda x: F.hardtanh(x, -0.2, 2),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "softplus, beta": lambda x: F.softplus(x, 2, 5),
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.5, -7),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.3),
}


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_edges(name: str, dynamic: bool) -> None:
    # torch's own kernel for gelu makes NaN of infinity, or not, by the tensor's length.
    edges = EDGES[~EDGES.isinf()] if name == "gelu" else EDGES
    check(ACTIVATIONS[name], edges, dynamic=dynamic)
    check(ACTIVATIONS[name], torch.linspace(-8, 8, 60).reshape(3, 4, 5), dynamic=dynamic, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_half_types(name: str, dtype: torch.dtype) -> None:
    check(ACTIVATIONS[name], torch.linspace(-6, 6, 24).to(dtype), rtol=2e-2, atol=2e-3)


def test_of_integers() -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        x = torch.tensor([[0, 1, 7], [3, 2, 100]], dtype=dtype)
        check(lambda x: (F.relu(x), torch.sigmoid(x), torch.tanh(x)), x if dtype is torch.uint8 else -x)


@pytest.mark.parametrize("count", [1, 4])
def test_prelu(count: int) -> None:
    x, weight = torch.randn(2, 4, 3, 3), torch.rand(count)
    check(F.prelu, x, weight)
    check(F.prelu, x, weight, dynamic=True)
    check(F.prelu, EDGES, torch.tensor([0.25]))


def test_glu() -> None:
    check(lambda x: (F.glu(x, 1), F.glu(x, -1)), torch.randn(2, 4, 6))


# -- softmax -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 4)])
def test_softmax_over_each_dim(shape: tuple[int, ...], dynamic: bool) -> None:
    x = torch.randn(shape)
    for dim in range(-len(shape), max(len(shape), 1)):
        check(lambda x, d=dim: (F.softmax(x, d), F.log_softmax(x, d)), x, dynamic=dynamic, build_engines=dim >= 0)


def test_softmax_of_extremes() -> None:
    x = torch.tensor(
        [
            [1e4, -1e4, 0.0],
            [-math.inf, 0.0, 1.0],
            [math.nan, 0.0, 1.0],
            [-math.inf, -math.inf, -math.inf],
            [math.inf, 0.0, 1.0],
        ]
    )
    check(lambda x: (F.softmax(x, 1), F.log_softmax(x, 1), F.softmin(x, 1)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_of_half_types(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 50) * 5).to(dtype)
    check(lambda x: (F.softmax(x, 1), F.log_softmax(x, 1)), x, rtol=2e-2, atol=1e-2)
    check(lambda x: (F.softmax(x, 1, dtype=torch.float32), F.log_softmax(x, 1, dtype=torch.float32)), x)


def test_softmax_of_integers_as_floats() -> None:
    check(lambda x: F.softmax(x, 0, dtype=torch.float32), torch.tensor([1, 2, 3]))
