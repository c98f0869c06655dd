"""Quantize, dequantize and fake quantize: ATen's, PT2E's and torchao's ops, each bound to a `Grid`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.code_grids import (
    dequantize_layer,
    dequantized,
    fake_quantized,
    grid_of,
    known,
    quantize_layer,
    quantized,
    spread,
    stored,
)
from trt_dynamo.aten_converters.folding import constant_of
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter, foreign
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten

FP8 = torch.float8_e4m3fn

# -- ATen's fake quantize ---------------------------------------------------------------------------------------------


def with_mask(net: Network, result: Tensor) -> tuple[Tensor, None]:
    if net.used[1]:
        raise Unsupported("the mask of what was in range, which only a backward pass reads")
    return result, None


@converter(aten.fake_quantize_per_tensor_affine_cachemask.default)
def fake_quantize(
    net: Network, x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> tuple[Tensor, None]:
    return with_mask(net, fake_quantized(net, x, grid_of(net, scale, zero_point, (quant_min, quant_max), (1, 2))))


@converter(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def fake_quantize_by_tensors(
    net: Network, x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, None]:
    """`enabled` is a switch; torch.fake_quantize_per_tensor_affine gives a constant 1."""
    switch = enabled.value if enabled.value is not None else known(net, 3)
    if switch is not None and int(switch.flatten()[0]) == 0:
        return with_mask(net, x)
    result = fake_quantized(net, x, grid_of(net, scale, zero_point, (quant_min, quant_max), (1, 2)))
    if switch is None:
        result = net.where(net.cast(net.reshape(enabled, ()), torch.bool), result, x)
    return with_mask(net, result)


@converter(aten.fake_quantize_per_channel_affine_cachemask.default)
def fake_quantize_per_channel(
    net: Network, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, None]:
    grid = grid_of(net, scale, zero_point, (quant_min, quant_max), (1, 2), axis % x.ndim)
    return with_mask(net, fake_quantized(net, x, grid))


# -- PT2E's quantize and dequantize -----------------------------------------------------------------------------------


@foreign("quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.quantize_per_tensor.tensor")
def quantize_per_tensor(
    net: Network,
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    return quantized(net, x, grid_of(net, scale, zero_point, (quant_min, quant_max), (1, 2)), dtype)


@foreign("quantized_decomposed.dequantize_per_tensor.default", "quantized_decomposed.dequantize_per_tensor.tensor")
def dequantize_per_tensor(
    net: Network,
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: object = None,
) -> Tensor:
    grid = grid_of(net, scale, zero_point, (quant_min, quant_max), (1, 2))
    return dequantized(net, codes, grid)


@foreign("quantized_decomposed.quantize_per_channel.default")
def quantize_per_channel(
    net: Network,
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    return quantized(net, x, grid_of(net, scales, zero_points, (quant_min, quant_max), (1, 2), axis % x.ndim), dtype)


@foreign("quantized_decomposed.dequantize_per_channel.default")
def dequantize_per_channel(
    net: Network,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: object = None,
) -> Tensor:
    grid = grid_of(net, scales, zero_points, (quant_min, quant_max), (1, 2), axis % codes.ndim)
    return dequantized(net, codes, grid)


# -- torchao's --------------------------------------------------------------------------------------------------------


def block_axis(shape: Sequence[object], block: Sequence[int]) -> int | None:
    """The axis along which there is one scale per index, or None where there is one for all."""
    divided = [i for i, (size, length) in enumerate(zip(shape, block, strict=True)) if size != length and length != -1]
    if not divided:
        return None
    if len(divided) > 1 or block[divided[0]] != 1:
        raise Unsupported("scales for blocks of a tensor")
    return divided[0]


def code_limits(dtype: torch.dtype, quant_min: float | None, quant_max: float | None) -> tuple[int, int]:
    if dtype.is_floating_point:
        raise Unsupported(f"codes in {str(dtype).removeprefix('torch.')}")
    limits = torch.iinfo(dtype)
    return (limits.min if quant_min is None else int(quant_min), limits.max if quant_max is None else int(quant_max))


@foreign("torchao.quantize_affine.default")
def quantize_affine(
    net: Network,
    x: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
) -> Tensor:
    limits = code_limits(output_dtype, quant_min, quant_max)
    return quantized(
        net, x, grid_of(net, scale, zero_point, limits, (2, 3), block_axis(x.shape, block_size)), output_dtype
    )


@foreign("torchao.dequantize_affine.default")
def dequantize_affine(
    net: Network,
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    output_dtype: object = None,
) -> Tensor:
    limits = code_limits(input_dtype, quant_min, quant_max)
    grid = grid_of(net, scale, zero_point, limits, (2, 3), block_axis(codes.shape, block_size))
    return dequantized(net, codes, grid)


@foreign("torchao.quantize_affine_float8_non_decomposed.default")
def quantize_float8(net: Network, x: Tensor, scale: Tensor, float8_dtype: object = None) -> Tensor:
    """Divided by the scale, saturated at 448, rounded to float8_e4m3fn."""
    assert net.node is not None
    if net.result_dtype() is not FP8:
        raise Unsupported(f"TensorRT has no {str(net.result_dtype()).removeprefix('torch.')}")
    value = constant_of(net, net.node)
    if isinstance(value, torch.Tensor):
        return Tensor(stored(net, value), FP8, x.shape)
    axis = scale_axis(x, scale)
    number = known(net, 1)
    if number is not None and axis is None and bool((number > 0).all()):
        return Tensor(quantize_layer(net, x, number, FP8), FP8, x.shape)
    divided = net.elementwise("DIV", net.cast(x, torch.float32), spread(net, scale, x, axis))
    return Tensor(quantize_layer(net, divided, torch.tensor(1.0), FP8), FP8, x.shape)


@foreign("torchao.dequantize_affine_float8_non_decomposed.default")
def dequantize_float8(net: Network, codes: Tensor, scale: Tensor, output_dtype: object = None) -> Tensor:
    axis, number = scale_axis(codes, scale), known(net, 1)
    like = dataclasses.replace(codes, dtype=net.result_dtype())
    if number is not None and bool((number > 0).all()):
        return dequantize_layer(net, codes.raw, number, axis, like)
    plain = dequantize_layer(net, codes.raw, torch.tensor(1.0), None, dataclasses.replace(like, dtype=torch.float32))
    return net.cast(net.elementwise("PROD", plain, spread(net, scale, codes, axis)), net.result_dtype())


def scale_axis(x: Tensor, scale: Tensor) -> int | None:
    """The one axis along which there are several scales, or None; the scale has the rank of `x`, or one element."""
    several = [axis for axis, size in enumerate(scale.shape) if size != 1]
    if not several:
        return None
    if scale.ndim != x.ndim or len(several) > 1 or scale.shape[several[0]] != x.shape[several[0]]:
        raise Unsupported("scales for blocks of a tensor")
    return several[0]
