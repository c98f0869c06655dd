"""`trt_dynamo::fake_quantize`, which ModelOpt's quantizers become: Q/DQ layers with a scale that follows from `amax`.

Weights come here only where no codes of theirs fit: `stored_weights` holds all others.
"""

from __future__ import annotations

import logging

import torch

from trt_dynamo.aten_converters.code_grids import (
    Grid,
    dequantize_layer,
    known,
    needs_arithmetic,
    quantize_layer,
    within,
)
from trt_dynamo.aten_converters.folding import constant_of
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported
from trt_dynamo.operators.fake_quantize import FP8_LIMIT, NOTHING, code_range, is_fp8

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn


@converter(torch.ops.trt_dynamo.fake_quantize.default)
def fake_quantize(
    net: Network, x: Tensor, amax: Tensor, bits: int, exponent_bits: int, unsigned: bool, narrow: bool
) -> Tensor:
    """One `amax` for a tensor that comes at each call is a Q/DQ pair; several, or one that is computed, are float
    layers, but for the rounding to FP8.
    """
    if exponent_bits and not is_fp8(bits, exponent_bits):
        raise Unsupported(f"floats of {bits} bits with an exponent of {exponent_bits}")
    assert net.node is not None
    value, limit = constant_of(net, net.node), known(net, 1)
    if value is not None:
        return net.constant(value)
    one = limit if limit is not None and limit.numel() == 1 else None
    if exponent_bits:
        return in_fp8(net, x, amax, one)
    if one is not None and float(one) <= NOTHING:
        return net.elementwise("PROD", x, 0.0)
    low, high = code_range(bits, unsigned, narrow)
    scale = None if one is None else one.float().reshape(()) / high
    grid = Grid(1.0, 0, low, high, None, scale, torch.tensor(0))
    if needs_arithmetic(net, grid):
        return in_floats(net, x, amax, low, high)
    assert scale is not None
    return dequantize_layer(net, quantize_layer(net, within(net, x, grid), scale, torch.int8), scale, None, x)


def in_fp8(net: Network, x: Tensor, amax: Tensor, one: torch.Tensor | None) -> Tensor:
    if one is not None:
        scale = torch.where(one <= NOTHING, 1.0, one.float()).reshape(()) / FP8_LIMIT
        return dequantize_layer(net, quantize_layer(net, x, scale, FP8), scale, None, x)
    limit = net.cast(amax, torch.float32)
    limit = net.where(net.elementwise("GREATER", limit, NOTHING), limit, 1.0)
    divided = net.elementwise("PROD", net.cast(x, torch.float32), net.elementwise("DIV", FP8_LIMIT, limit))
    unit = torch.tensor(1.0)
    rounded = dequantize_layer(net, quantize_layer(net, divided, unit, FP8), unit, None, divided)
    return net.cast(net.elementwise("PROD", rounded, net.elementwise("DIV", limit, FP8_LIMIT)), x.dtype)


def in_floats(net: Network, x: Tensor, amax: Tensor, low: int, high: int) -> Tensor:
    """The codes as whole float32 numbers, and what they stand for."""
    limit = net.cast(amax, torch.float32)
    reaches = net.elementwise("GREATER", limit, NOTHING)
    factor = net.where(reaches, net.elementwise("DIV", float(high), limit), 0.0)
    codes = net.unary("ROUND", net.elementwise("PROD", net.cast(x, torch.float32), factor))
    codes = net.elementwise("MIN", net.elementwise("MAX", codes, float(low)), float(high))
    return net.cast(net.elementwise("PROD", codes, net.elementwise("DIV", limit, float(high))), x.dtype)
