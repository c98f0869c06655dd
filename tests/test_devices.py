"""Which nodes of a graph with several devices go to its engines; fake tensors stand for a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from trt_dynamo.partition.support import made_elsewhere, main_device

META = torch.device("meta")


def away(function: Callable[..., Any], *args: torch.Tensor) -> dict[str, str]:
    """The nodes whose results are not on the device `meta`, which is the GPU here."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = make_fx(function)(*(mode.from_tensor(a) for a in args))
    return {str(node.target): str(device) for node, device in made_elsewhere(module, META).items()}


x = torch.ones(3, 4, device=META)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.sin() + 1, {}),
        (lambda x: torch.where(x > 0, x, torch.scalar_tensor(2.0)), {}),
        (lambda x: x * (torch.scalar_tensor(2.0) + 1), {}),
        (lambda x: (x, torch.scalar_tensor(2.0) + 1), {"aten.scalar_tensor.default": "cpu", "aten.add.Tensor": "cpu"}),
        (lambda x: (x, torch.ones(2) * 2), {"aten.ones.default": "cpu", "aten.mul.Tensor": "cpu"}),
        (
            lambda x: torch.zeros_like(x, device="cpu").sin(),
            {"aten.zeros_like.default": "cpu", "aten.sin.default": "cpu"},
        ),
    ],
    ids=["all there", "a number", "numbers", "a number is a result", "on the CPU", "goes to the CPU"],
)
def test_what_is_made_elsewhere(function: Callable[..., Any], expected: dict[str, str]) -> None:
    assert away(function, x) == expected


def test_the_device_of_a_graph() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = make_fx(lambda x: x + 1)(mode.from_tensor(torch.ones(2)))
    assert main_device(module) == torch.device("cpu")
