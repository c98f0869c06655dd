"""`trt_dynamo::fake_quantize`: rounds to codes and back, with a scale that follows from the largest magnitude `amax`.

It is NVIDIA ModelOpt's `tensorrt::quantize_op`, and what its quantizers compute without it, in an op that runs on
every device and needs no package.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of float8_e4m3fn.
FP8_LIMIT = 448.0

# What reached no further than this while a model was calibrated has no scale.
NOTHING = 2.0**-24


def code_range(bits: int, unsigned: bool, narrow: bool) -> tuple[int, int]:
    """The least and the largest code of an integer type: `amax` is the largest."""
    high = int(2 ** (bits - 1 + unsigned) - 1)
    return (0, high) if unsigned else (-high - (not narrow), high)


def is_fp8(bits: int, exponent_bits: int) -> bool:
    return (bits, exponent_bits) == (8, 4)


def codes_and_scale(
    x: Tensor, amax: Tensor, bits: int, exponent_bits: int, unsigned: bool, narrow: bool
) -> tuple[Tensor, Tensor]:
    """The codes, whole numbers or float8 values in float32, and the scale that broadcasts over them.

    Where `amax` is nothing, all integer codes are 0, and FP8's scale is that of an `amax` of 1.
    """
    wide, limit = x.float(), amax.float()
    if is_fp8(bits, exponent_bits):
        limit = torch.where(limit <= NOTHING, 1.0, limit)
        near = (wide * (FP8_LIMIT / limit)).clamp(-FP8_LIMIT, FP8_LIMIT)
        return near.to(torch.float8_e4m3fn).float(), limit / FP8_LIMIT
    low, high = code_range(bits, unsigned, narrow)
    factor = torch.where(limit <= NOTHING, 0.0, high / limit)
    return (wide * factor).round().clamp(low, high), torch.where(limit <= NOTHING, 1.0, limit / high)


@torch.library.custom_op("trt_dynamo::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, amax: Tensor, bits: int, exponent_bits: int, unsigned: bool, narrow: bool) -> Tensor:
    """`x` as the nearest codes say it, in its own dtype. `amax` broadcasts over it; `exponent_bits` is 0 for integers,
    and 4 of 8 bits for float8_e4m3fn.
    """
    if exponent_bits and not is_fp8(bits, exponent_bits):
        raise NotImplementedError(f"floats of {bits} bits with an exponent of {exponent_bits}")
    codes, scale = codes_and_scale(x, amax, bits, exponent_bits, unsigned, narrow)
    return (codes * scale).to(x.dtype)


@fake_quantize.register_fake
def fake_fake_quantize(x: Tensor, amax: Tensor, bits: int, exponent_bits: int, unsigned: bool, narrow: bool) -> Tensor:
    return torch.empty_like(x)
