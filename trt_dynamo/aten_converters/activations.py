"""Activations: `IActivationLayer` where its formula is torch's and NaN goes through it, else elementwise layers.

CLIP and HARD_SIGMOID make a number of NaN (TensorRT's own constant folding shows it), so bounds are compared and
chosen.
"""

from __future__ import annotations

import torch

from trt_dynamo.aten_converters.functions import expm1, formula, log1p
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import clamp, clamped
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten


@converter(aten.relu.default)
def relu(net: Network, x: Tensor) -> Tensor:
    return net.activation("RELU", x) if x.is_float else net.elementwise("MAX", x, 0)


@converter(aten.sigmoid.default)
def sigmoid(net: Network, x: Tensor) -> Tensor:
    return net.activation("SIGMOID", net.cast(x, net.result_dtype()))


@converter(aten.tanh.default)
def tanh(net: Network, x: Tensor) -> Tensor:
    return net.activation("TANH", net.cast(x, net.result_dtype()))


@converter(aten.gelu.default)
def gelu(net: Network, x: Tensor, *, approximate: str = "none") -> Tensor:
    return net.activation("GELU_TANH" if approximate == "tanh" else "GELU_ERF", x)


@converter(aten.silu.default)
def silu(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("PROD", x, net.activation("SIGMOID", x))


@converter(aten.leaky_relu.default)
def leaky_relu(net: Network, x: Tensor, slope: float = 0.01) -> Tensor:
    return net.activation("LEAKY_RELU", x, alpha=float(slope))


@converter(aten.rrelu_with_noise_functional.default)
def rrelu(
    net: Network, x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Outside of training the slope is the middle one, and the noise stays."""
    if training:
        raise Unsupported("random slopes: each call's are others")
    return leaky_relu(net, x, (lower + upper) / 2), noise


@converter(aten._prelu_kernel.default)
def prelu(net: Network, x: Tensor, weight: Tensor) -> Tensor:
    return net.where(net.elementwise("GREATER", x, 0), x, net.elementwise("PROD", x, weight))


@converter(aten.elu.default)
def elu(net: Network, x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """`scale * x` above zero, else `scale * alpha * (exp(input_scale * x) - 1)`; selu and celu come as this."""
    if input_scale == 1:
        y = net.activation("ELU", x, alpha=float(alpha))
        return y if scale == 1 else net.elementwise("PROD", y, scale)
    wide = net.wide(x)
    below = net.elementwise("PROD", expm1(net, net.elementwise("PROD", wide, input_scale)), alpha)
    y = net.where(net.elementwise("GREATER", wide, 0), wide, below)
    return net.cast(net.elementwise("PROD", y, scale) if scale != 1 else y, x.dtype)


@converter(aten.hardtanh.default)
def hardtanh(net: Network, x: Tensor, low: float = -1, high: float = 1) -> Tensor:
    return clamp(net, x, low, high)


@formula(aten.hardsigmoid.default)
def hardsigmoid(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("DIV", clamped(net, net.elementwise("SUM", x, 3.0), 0.0, 6.0), 6.0)


@formula(aten.hardswish.default)
def hardswish(net: Network, x: Tensor) -> Tensor:
    return net.elementwise(
        "DIV", net.elementwise("PROD", x, clamped(net, net.elementwise("SUM", x, 3.0), 0.0, 6.0)), 6.0
    )


@formula(aten.softplus.default)
def softplus(net: Network, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = net.elementwise("PROD", x, beta) if beta != 1 else x
    soft = log1p(net, net.unary("EXP", scaled))
    soft = net.elementwise("DIV", soft, beta) if beta != 1 else soft
    return net.where(net.elementwise("GREATER", scaled, threshold), x, soft)


@formula(aten.mish.default)
def mish(net: Network, x: Tensor) -> Tensor:
    return net.elementwise("PROD", x, net.activation("TANH", log1p(net, net.unary("EXP", x))))


@converter(aten.log_sigmoid_forward.default)
def log_sigmoid(net: Network, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The second result is what a backward pass would read."""
    wide = net.wide(x)
    tail = net.unary("EXP", net.unary("NEG", net.unary("ABS", wide)))
    y = net.cast(net.elementwise("SUB", clamped(net, wide, None, 0.0), log1p(net, tail)), x.dtype)
    return y, net.cast(tail, x.dtype) if net.used[1] else None


@converter(aten.threshold.default)
def threshold(net: Network, x: Tensor, limit: float, value: float) -> Tensor:
    below = net.elementwise("OR", net.elementwise("LESS", x, limit), net.elementwise("EQUAL", x, limit))
    return net.where(below, net.scalar(value, x.dtype, x.ndim), x)


@converter(aten._softmax.default)
def softmax(net: Network, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return net.softmax(net.cast(x, net.result_dtype()), dim)


@converter(aten._log_softmax.default)
def log_softmax(net: Network, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """`x - max - log(sum(exp(x - max)))`: the logarithm of a softmax would lose what lies far below the largest."""
    wide = net.wide(x)
    dims = [dim] if x.ndim else []
    shifted = net.elementwise("SUB", wide, net.reduce("MAX", wide, dims, keepdim=True))
    total = net.reduce("SUM", net.unary("EXP", shifted), dims, keepdim=True)
    return net.cast(net.elementwise("SUB", shifted, net.unary("LOG", total)), net.result_dtype())
