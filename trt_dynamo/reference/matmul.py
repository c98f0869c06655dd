"""Layers that multiply matrices: MATRIX_MULTIPLY, EINSUM."""

from __future__ import annotations

import torch
from torch import Tensor

from trt_dynamo.reference.layer import Layer, Run, evaluates


@evaluates("MATRIX_MULTIPLY")
def matrix_multiply(layer: Layer) -> Run:
    first, second = layer.native.op0.name, layer.native.op1.name

    def run(a: Tensor, b: Tensor) -> Tensor:
        a = a.unsqueeze(-2) if first == "VECTOR" else a.mT if first == "TRANSPOSE" else a
        b = b.unsqueeze(-1) if second == "VECTOR" else b.mT if second == "TRANSPOSE" else b
        result = torch.matmul(a, b)
        result = result.squeeze(-1) if second == "VECTOR" else result
        return result.squeeze(-1 if second == "VECTOR" else -2) if first == "VECTOR" else result

    return run


@evaluates("EINSUM")
def einsum(layer: Layer) -> Run:
    equation = layer.native.equation
    return lambda *tensors: torch.einsum(equation, *tensors)
