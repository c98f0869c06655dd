"""Layers that work element by element.

UNARY, ELEMENTWISE, ACTIVATION, PARAMETRIC_RELU, SELECT, CAST, IDENTITY, SCALE.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trt_dynamo.reference.layer import Layer, Run, evaluates
from trt_dynamo.reference.quantization import LIMITS, rounded

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": lambda x: torch.where(x != x, x, torch.sign(x)),
    "ROUND": torch.round,  # halves to even
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}


@evaluates("UNARY")
def unary(layer: Layer) -> Run:
    return UNARY[layer.native.op.name]


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers round towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, *nonzero_divisor(a, b), rounding_mode="trunc")


def floor_divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return torch.floor(a / b)
    return torch.div(a, *nonzero_divisor(a, b), rounding_mode="floor")


def nonzero_divisor(a: Tensor, b: Tensor) -> tuple[Tensor]:
    """Division by one instead of zero: undefined in TensorRT, and no error on a GPU as it would be in torch."""
    return (torch.where(b == 0, torch.ones_like(b), b),)


def power(a: Tensor, b: Tensor) -> Tensor:
    """A negative integer exponent gives 0, 1 or -1, as the quotient of integers does."""
    if a.is_floating_point():
        return torch.pow(a, b)
    result = torch.pow(a, b.clamp(min=0))
    unit = torch.where(a.abs() == 1, torch.pow(a, b.abs()), torch.zeros_like(a))
    return torch.where(b < 0, unit, result)


def greater_of(a: Tensor, b: Tensor) -> Tensor:
    """The second only where it is greater: a NaN stays if it is the first, as in TensorRT's own constant folding."""
    return torch.where(b > a, b, a)


def lesser_of(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < a, b, a)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": greater_of,
    "MIN": lesser_of,
    "SUB": torch.sub,
    "DIV": divide,
    "POW": power,
    "FLOOR_DIV": floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


@evaluates("ELEMENTWISE")
def elementwise(layer: Layer) -> Run:
    return ELEMENTWISE[layer.native.op.name]


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """max(low, min(high, x)). NaN becomes `high`, as in TensorRT's own constant folding."""
    below = torch.where(x < high, x, high)
    return torch.where(below > low, below, low)


ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: torch.relu(x),
    "SIGMOID": lambda x, a, b: torch.sigmoid(x),
    "TANH": lambda x, a, b: torch.tanh(x),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * torch.expm1(x)),
    "SELU": lambda x, a, b: b * torch.where(x > 0, x, a * torch.expm1(x)),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.log(torch.exp(b * x) + 1),  # it overflows, as TensorRT's folding does
    "CLIP": clip,
    "HARD_SIGMOID": lambda x, a, b: clip(a * x + b, 0.0, 1.0),
    "SCALED_TANH": lambda x, a, b: a * torch.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + torch.erf(math.sqrt(0.5) * x)),
    "GELU_TANH": lambda x, a, b: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (0.044715 * x**3 + x))),
}


@evaluates("ACTIVATION")
def activation(layer: Layer) -> Run:
    function = ACTIVATIONS[layer.native.type.name]
    alpha, beta = layer.native.alpha, layer.native.beta
    return lambda x: function(x, alpha, beta)


@evaluates("PARAMETRIC_RELU")
def parametric_relu(layer: Layer) -> Run:
    return lambda x, slope: torch.where(x >= 0, x, slope * x)


@evaluates("SELECT", exact=True)
def select(layer: Layer) -> Run:
    return torch.where


@evaluates("IDENTITY", exact=True)
@evaluates("CAST", exact=True)
def cast_layer(layer: Layer) -> Run:
    """To a low type (the parser makes such casts; no builder takes them) values saturate, and integers truncate."""
    dtype, kind = layer.dtype, layer.output_types[0]
    if kind in LIMITS and kind != "INT8" and kind != layer.input_types[0]:
        whole = kind == "INT4"
        return lambda x: rounded(torch.trunc(x.float()) if whole else x.float(), kind)
    return lambda x: cast(x, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float to integer truncates and saturates, NaN gives 0; integer to integer wraps; anything but zero is true."""
    if x.dtype == dtype:
        return x
    if dtype == torch.bool:
        return x != 0
    if x.is_floating_point() and not dtype.is_floating_point:
        return saturate(x, dtype)
    return x.to(dtype)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    exact = x.double().nan_to_num(nan=0.0)
    # 2**63 is a double and no int64: what reaches it takes the limit itself.
    inside = exact.clamp(float(limits.min), float(limits.max) if limits.bits < 64 else 2.0**62)
    result = inside.to(dtype)
    if limits.bits < 64:
        return result
    large = exact >= 2.0**62
    return torch.where(
        large, torch.where(exact >= 2.0**63, limits.max, exact.clamp(max=2.0**63 - 1024).to(dtype)), result
    )


@evaluates("SCALE", weights=("scale", "shift", "power"))
def scale_layer(layer: Layer) -> Run:
    """(x * scale + shift) ** power."""
    mode, axis, rank = layer.native.mode.name, layer.native.channel_axis, len(layer.input_shapes[0])

    def shaped(weights: Tensor, x: Tensor) -> Tensor:
        if mode == "ELEMENTWISE":
            return weights.reshape(x.shape)
        return weights.reshape([-1 if i == axis and mode == "CHANNEL" else 1 for i in range(rank)])

    def run(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, power: Tensor | None = None) -> Tensor:
        x = x if scale is None else x * shaped(scale, x)
        x = x if shift is None else x + shaped(shift, x)
        return x if power is None else x ** shaped(power, x)

    return run
