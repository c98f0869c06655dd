"""`Grid`, the codes of a quantized tensor, and the layers that make and read them.

TensorRT's grid is symmetric: codes of -128 to 127 around 0, scales that are known when the engine is built. A zero
point is taken off the codes first, so uint8 around 128 is int8 around 0. What does not fit then (other zero points,
scales that are computed) means the same in float layers, without INT8 kernels. What is quantized of weights alone is
computed by torch, and the network holds its codes: INT8 and FP8 constants in front of a DequantizeLayer.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch.fx import Node

from trt_dynamo.aten_converters.folding import constant_of
from trt_dynamo.aten_converters.network import HALVES, Network, Tensor
from trt_dynamo.errors import Unsupported
from trt_dynamo.trt import to_trt, trt

log = logging.getLogger(__name__)

# The ops that read codes, each with the place of its zero point among its arguments (None: it has none).
READERS = {
    "quantized_decomposed.dequantize_per_tensor.default": 2,
    "quantized_decomposed.dequantize_per_tensor.tensor": 2,
    "quantized_decomposed.dequantize_per_channel.default": 2,
    "torchao.dequantize_affine.default": 3,
    "torchao.dequantize_affine_float8_non_decomposed.default": None,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The codes of one op: `scale` and `zero` (one of each, or one per index of `axis`), and the range of codes.

    `known_scale` and `known_zero` are their values where these are known, which is never so in a dry run.
    """

    scale: Tensor | float
    zero: Tensor | int | None
    low: int
    high: int
    axis: int | None
    known_scale: torch.Tensor | None
    known_zero: torch.Tensor | None

    def why_not(self) -> str | None:
        """Why TensorRT's layers cannot have this grid, or None."""
        scale, zero = self.known_scale, self.known_zero
        if scale is None or zero is None:
            return "its scale or zero point is computed"
        if not bool(((scale > 0) & scale.isfinite()).all()):
            return "a scale is not a positive number"
        if bool((zero != zero.flatten()[0]).any()) if zero.numel() else False:
            return "its zero points differ"
        if self.low - self.offset < -128 or self.high - self.offset > 127:
            return f"codes from {self.low} to {self.high} around {self.offset}: TensorRT has -128 to 127 around 0"
        return None

    @property
    def offset(self) -> int:
        """The one zero point."""
        zero = self.known_zero
        return 0 if zero is None or zero.numel() == 0 else int(zero.flatten()[0])


def grid_of(
    net: Network,
    scale: Tensor | float,
    zero: Tensor | int | None,
    limits: tuple[int, int],
    places: tuple[int, int],
    axis: int | None = None,
) -> Grid:
    """The grid of the node under conversion; `places` are those of scale and zero point among its arguments."""
    known_scale = known(net, places[0]) if isinstance(scale, Tensor) else torch.tensor(scale)
    known_zero = known(net, places[1]) if isinstance(zero, Tensor) else torch.tensor(0 if zero is None else zero)
    return Grid(scale, zero, *limits, axis, None if known_scale is None else known_scale.float(), known_zero)


def known(net: Network, place: int) -> torch.Tensor | None:
    """The value of an argument of the node, where it follows from weights and constants."""
    assert net.node is not None
    argument = net.node.args[place] if place < len(net.node.args) else None
    return constant_of(net, argument) if isinstance(argument, Node) else None


# -- TensorRT's layers ------------------------------------------------------------------------------------------------


def dequantize_layer(net: Network, codes: trt.ITensor, scale: torch.Tensor, axis: int | None, like: Tensor) -> Tensor:
    """`codes * scale` in the dtype and shape of `like`: one scale, one per index of the axis, or (no axis, and the rank
    of the codes) one per block. A scale in a half type stays in it.
    """
    one = scale.reshape(-1) if axis is not None else scale.reshape(()) if scale.numel() == 1 else scale
    one = one if one.dtype in HALVES else one.float()
    layer = net.made(net.raw.add_dequantize(codes, net.constant(one).raw, to_trt(like.dtype)))
    if axis is not None:
        layer.axis = axis
    return net.out(layer, shape=like.shape, dtype=like.dtype)


def quantize_layer(net: Network, x: Tensor, scale: torch.Tensor, kind: torch.dtype) -> trt.ITensor:
    """The codes of a tensor with one scale, INT8 or FP8: rounded to the nearest, halves to even, and saturated."""
    layer = net.made(net.raw.add_quantize(x.raw, net.constant(scale.float().reshape(())).raw, to_trt(kind)))
    return net.raw_out(layer)


def within(net: Network, x: Tensor, grid: Grid) -> Tensor:
    """`x` without what lies outside of a range of codes that is smaller than TensorRT's."""
    assert grid.known_scale is not None
    low, high, scale = grid.low - grid.offset, grid.high - grid.offset, float(grid.known_scale)
    if low > -128:
        x = net.elementwise("MAX", x, low * scale)
    return net.elementwise("MIN", x, high * scale) if high < 127 else x


def stored(net: Network, codes: torch.Tensor) -> trt.ITensor:
    """Codes that are known, as a constant of their own type, which only a dequantize layer may read."""
    held = codes.detach().cpu().contiguous()
    net.owners.append(held)
    layer = net.made(
        net.raw.add_constant(tuple(held.shape), trt.Weights(to_trt(held.dtype), held.data_ptr(), held.numel()))
    )
    raw = net.raw_out(layer)
    net.constants[layer.name] = held
    return raw


def stored_in_four_bits(net: Network, codes: torch.Tensor) -> trt.ITensor:
    """Codes of -8 to 7, an even number of them, as an INT4 constant: two in a byte, the first in the lower half."""
    flat = codes.detach().cpu().flatten().to(torch.uint8) & 15
    packed = flat[0::2] | (flat[1::2] << 4)
    net.owners.append(packed)
    held = trt.Weights(trt.DataType.INT4, packed.data_ptr(), codes.numel())
    layer = net.made(net.raw.add_constant(tuple(codes.shape), held))
    raw = net.raw_out(layer)
    net.constants[layer.name] = codes.detach().cpu()
    return raw


def centered(codes: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """Integer codes around 0 as int8, where they fit: also those of a wide grid that were never used."""
    if grid.known_zero is None or grid.known_scale is None or codes.numel() == 0:
        return None
    zero = grid.known_zero.to(torch.int64)
    around = codes.to(torch.int64) - (zero.reshape(along(codes.ndim, grid.axis)) if zero.numel() > 1 else zero)
    fits = int(around.min()) >= -128 and int(around.max()) <= 127
    usable = bool(((grid.known_scale > 0) & grid.known_scale.isfinite()).all())
    return around.to(torch.int8) if fits and usable else None


def along(rank: int, axis: int | None) -> list[int]:
    """The shape of numbers along an axis that broadcasts over a tensor of the rank."""
    return [-1 if i == axis else 1 for i in range(rank)] if axis is not None else [1] * rank


# -- the same in arithmetic -------------------------------------------------------------------------------------------


def spread(net: Network, number: Tensor | float | int | None, x: Tensor, axis: int | None) -> Tensor | float | int:
    """A scale or zero point, float32, in a shape that broadcasts over `x`."""
    if not isinstance(number, Tensor):
        return 0 if number is None else number
    wide = net.cast(number, torch.float32)
    if axis is None:
        return net.reshape(wide, ())
    return net.reshape(wide, [x.shape[axis] if i == axis else 1 for i in range(x.ndim)])


def rounded(net: Network, x: Tensor, grid: Grid) -> Tensor:
    """The codes of `x` as whole float32 numbers, computed as torch does."""
    scale = spread(net, grid.scale, x, grid.axis)
    inverse = net.unary("RECIP", scale) if isinstance(scale, Tensor) else 1.0 / scale
    whole = net.unary("ROUND", net.elementwise("PROD", net.cast(x, torch.float32), inverse))
    moved = net.elementwise("SUM", whole, spread(net, grid.zero, x, grid.axis))
    return net.elementwise("MIN", net.elementwise("MAX", moved, float(grid.low)), float(grid.high))


def unrounded(net: Network, codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`(codes - zero) * scale`."""
    moved = net.elementwise("SUB", net.cast(codes, torch.float32), spread(net, grid.zero, codes, grid.axis))
    return net.cast(net.elementwise("PROD", moved, spread(net, grid.scale, codes, grid.axis)), dtype)


def needs_arithmetic(net: Network, grid: Grid) -> bool:
    """Whether a tensor that is no weight is quantized by arithmetic."""
    reason = grid.why_not() or ("TensorRT quantizes only weights per channel" if grid.axis is not None else None)
    if reason is not None and grid.known_scale is not None:
        log.info("%s is computed in floats: %s", net.scope, reason)
    return reason is not None


# -- what the converters share ----------------------------------------------------------------------------------------


def quantized(net: Network, x: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The codes of a tensor in a torch dtype; TensorRT's own where nothing but dequantizing reads them."""
    assert net.node is not None
    if dtype not in (torch.int8, torch.uint8, torch.int32):
        raise Unsupported(f"codes in {str(dtype).removeprefix('torch.')}")
    if only_dequantized(net.node):
        value = constant_of(net, net.node)
        codes = None if value is None else centered(value, grid)
        if codes is not None:
            return Tensor(stored(net, codes), dtype, x.shape)
        if not needs_arithmetic(net, grid):
            assert grid.known_scale is not None
            return Tensor(quantize_layer(net, within(net, x, grid), grid.known_scale, torch.int8), dtype, x.shape)
    whole = net.cast(rounded(net, x, grid), torch.int32)
    return Tensor(whole.raw, dtype, x.shape)


def only_dequantized(node: Node) -> bool:
    """Whether all readers dequantize, with the zero point that the codes were made with."""
    if not node.users:
        return False
    place = READERS.get(str(node.target).replace(".quantize", ".dequantize"))
    zero = node.args[place] if place is not None and place < len(node.args) else None
    for user in node.users:
        at = READERS.get(str(user.target), -1)
        if at == -1 or user.args[0] is not node:
            return False
        if at is not None and (user.args[at] if at < len(user.args) else None) != zero:
            return False
    return True


def dequantized(net: Network, codes: Tensor, grid: Grid) -> Tensor:
    """The numbers that the codes stand for, in the dtype that FX states."""
    dtype = net.result_dtype()
    like = dataclasses.replace(codes, dtype=dtype)
    raw = codes.raw if codes.raw.dtype == trt.DataType.INT8 else None
    if raw is None and (value := known(net, 0)) is not None:
        small = centered(value, grid)
        raw = None if small is None else stored(net, small)
    if raw is None:
        return unrounded(net, codes, grid, dtype)
    if grid.known_scale is None:
        raise Unsupported("its scale is computed, but not that of the codes")
    return dequantize_layer(net, raw, grid.known_scale, grid.axis, like)


def fake_quantized(net: Network, x: Tensor, grid: Grid) -> Tensor:
    """Quantized and dequantized at once."""
    assert net.node is not None
    value = known(net, 0)
    if value is not None and grid.known_scale is not None:
        result = constant_of(net, net.node)
        assert isinstance(result, tuple)
        return fake_weight(net, result[0], grid, x)
    if needs_arithmetic(net, grid):
        whole = rounded(net, x, grid)
        return unrounded(net, whole, grid, x.dtype)
    assert grid.known_scale is not None
    codes = quantize_layer(net, within(net, x, grid), grid.known_scale, torch.int8)
    return dequantize_layer(net, codes, grid.known_scale, None, x)


def fake_weight(net: Network, value: torch.Tensor, grid: Grid, like: Tensor) -> Tensor:
    """What torch made of a weight: as codes where these give the same numbers, else as it is."""
    assert grid.known_scale is not None
    scale = grid.known_scale.reshape(along(value.ndim, grid.axis))
    codes = torch.round(value.float() / scale)
    small = codes.clamp(-128, 127).to(torch.int8)
    if value.numel() == 0 or not torch.equal((small.float() * scale).to(value.dtype), value):
        return net.constant(value)
    return dequantize_layer(net, stored(net, small), grid.known_scale, grid.axis, like)
