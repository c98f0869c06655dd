"""What the tests of the evaluator's layers share: short ways to make networks, and to run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from trt_dynamo.log import logger
from trt_dynamo.reference import evaluate as evaluate_on_inputs_device
from trt_dynamo.trt import to_trt, trt

F32 = trt.DataType.FLOAT


def close(have: Tensor, want: Any, tolerance: float = 1e-5) -> None:
    want = want if isinstance(want, Tensor) else torch.tensor(want)
    torch.testing.assert_close(have, want.to(have.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def evaluate(
    network: Any,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
    intermediates: bool = False,
) -> dict[str, Tensor]:
    """The network's outputs, from the CPU; where there is a GPU, it must find the same."""
    found = evaluate_on_inputs_device(network, inputs, constants, intermediates)
    if torch.cuda.is_available() and inputs:
        there = {name: value.cuda() for name, value in inputs.items()}
        with torch.backends.cudnn.flags(allow_tf32=False):
            again = evaluate_on_inputs_device(network, there, constants, intermediates)
        for name, value in found.items():
            assert again[name].is_cuda
            if (network.name or "") != RANDOM:
                close(again[name].cpu().double(), value.double(), 1e-4)
    return found


RANDOM = "random"  # the name of a network whose results differ from run to run


class Net:
    """A network with short ways to make inputs and constants; the first output is `y`."""

    def __init__(self) -> None:
        self.builder = trt.Builder(logger())
        self.raw = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.kept: list[Any] = []

    def input(self, name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Any:
        return self.raw.add_input(name, to_trt(like.dtype), tuple(like.shape) if shape is None else shape)

    def weights(self, value: Tensor) -> Any:
        if value.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            found = trt.Weights(to_trt(value.dtype), value.data_ptr(), value.numel())
            self.kept.append(value)
        else:
            found = numpy.array(value.numpy())
        self.kept.append(found)
        return found

    def constant(self, value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return self.raw.add_constant(tuple(tensor.shape), self.weights(tensor)).get_output(0)

    def mark(self, *tensors: Any) -> None:
        for index, tensor in enumerate(tensors):
            tensor.name = "y" if index == 0 else f"y{index}"
            self.raw.mark_output(tensor)

    def run(self, constants: Mapping[str, Tensor] | None = None, **inputs: Tensor) -> Tensor:
        return evaluate(self.raw, inputs, constants)["y"]


def single(x: Tensor, add: Any) -> Net:
    """A network of one layer, `add(net, x)`, over the input `x`."""
    net = Net()
    layer = add(net, net.input("x", x))
    net.mark(*[layer.get_output(i) for i in range(layer.num_outputs)])
    return net
