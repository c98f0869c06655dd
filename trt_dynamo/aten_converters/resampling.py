"""Interpolation: `IResizeLayer` where its coordinates are torch's, else a look-up (nearest) or a matrix for each dim.

torch computes coordinates with the factor that the user gave, TensorRT with the ratio of the sizes; the two differ
where size * factor is no whole number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import trt_dynamo.operators.resampling  # noqa: F401  it defines the ops
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pooling import product_along
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import trt

aten = torch.ops.aten
own = torch.ops.trt_dynamo

INTERPOLATION = {
    "nearest": "NEAREST",
    "nearest-exact": "NEAREST",
    "linear": "LINEAR",
    "bilinear": "LINEAR",
    "trilinear": "LINEAR",
    "bicubic": "CUBIC",
}


@converter(own.resample.default)
def resample(
    net: Network, x: Tensor, size: Sequence[Dim], scales: Sequence[float | None] | None, mode: str, align_corners: bool
) -> Tensor:
    shape = net.result_shape()
    if 0 in shape:
        return net.full(shape, 0, x.dtype)
    if not x.is_float and not mode.startswith("nearest"):
        raise Unsupported(f"interpolation of {str(x.dtype).removeprefix('torch.')}: TensorRT has floats only")
    factors: Sequence[float | None] = scales or [None] * len(size)
    inner = list(zip(x.shape[2:], shape[2:], factors, strict=True))
    if x.is_float and all(follows_sizes(*axis, align_corners) for axis in inner):
        return resize(net, x, shape, mode, align_corners)
    wide = x if mode.startswith("nearest") else net.cast(x, torch.float32)
    for axis, (old, new, scale) in enumerate(inner, 2):
        if mode.startswith("nearest"):
            wide = net.gather(wide, nearest(net, old, new, scale, exact=mode == "nearest-exact"), axis)
        else:
            wide = product_along(net, wide, axis, weights(net, old, new, scale, mode, align_corners))
    return net.cast(wide, x.dtype)


def follows_sizes(old: Dim, new: Dim, scale: float | None, align_corners: bool) -> bool:
    """Whether the factor is the ratio of the sizes, or does not count."""
    if scale is None or align_corners or scale == int(scale):
        return True
    return isinstance(old, int) and isinstance(new, int) and old * scale == new


def resize(net: Network, x: Tensor, shape: Sequence[Dim], mode: str, align_corners: bool) -> Tensor:
    layer = net.raw.add_resize(x.raw)
    if layer is None:
        raise Unsupported("TensorRT refused the resize")
    transform = "ALIGN_CORNERS" if align_corners else "ASYMMETRIC" if mode == "nearest" else "HALF_PIXEL"
    layer.resize_mode = getattr(trt.InterpolationMode, INTERPOLATION[mode])
    layer.coordinate_transformation = getattr(trt.ResizeCoordinateTransformation, transform)
    layer.nearest_rounding = trt.ResizeRoundMode.HALF_UP if mode == "nearest-exact" else trt.ResizeRoundMode.FLOOR
    # Where corners are aligned, an output of one pixel is the first one.
    layer.selector_for_single_pixel = trt.ResizeSelector.UPPER if align_corners else trt.ResizeSelector.FORMULA
    if all(isinstance(d, int) for d in shape):
        layer.shape = tuple(shape)
    else:
        layer.set_input(1, net.sizes.vector(shape))
    return net.out(layer, shape=tuple(shape), dtype=x.dtype)


def nearest(net: Network, old: Dim, new: Dim, scale: float | None, *, exact: bool) -> Tensor:
    """For each of the new elements, which of the old ones it takes; in float32, as torch's kernels compute it."""
    offset = 0.5 if exact else 0.0
    if isinstance(old, int) and isinstance(new, int):
        step = torch.tensor(1.0 / scale if scale else old / new, dtype=torch.float32)
        found = (torch.arange(new, dtype=torch.float32) + offset) * step
        return net.constant(found.long().clamp(max=old - 1))
    pace = net.scalar(1.0 / scale, torch.float32, 1) if scale else ratio(net, old, new)
    index = net.elementwise("SUM", net.cast(net.linspace((new,), 0, (1,)), torch.float32), offset)
    place = net.cast(net.unary("FLOOR", net.elementwise("PROD", index, pace)), torch.int64)
    return net.elementwise("MIN", place, net.elementwise("SUB", net.size_tensor(old), 1))


def ratio(net: Network, old: Dim, new: Dim) -> Tensor:
    return net.elementwise("DIV", net.size_tensor(old, torch.float32), net.size_tensor(new, torch.float32))


def weights(
    net: Network, old: Dim, new: Dim, scale: float | None, mode: str, align_corners: bool, antialias: bool = False
) -> Tensor:
    """[old, new]: how much each old element counts in each new one: torch's own interpolation of the unit vectors."""
    if isinstance(old, int) and isinstance(new, int):
        unit = torch.eye(old).reshape(1, 1, old, old)
        arguments = (unit, (old, new), align_corners, None, scale)
        if mode == "bicubic":
            kernel = aten._upsample_bicubic2d_aa if antialias else aten.upsample_bicubic2d
        else:
            kernel = aten._upsample_bilinear2d_aa if antialias else aten.upsample_bilinear2d
        return net.constant(kernel(*arguments).reshape(old, new))
    if mode == "bicubic" or antialias or scale is None:
        raise Unsupported(f"{mode} interpolation by {scale} of a symbolic dim")
    # A new element at `place` takes what lies less than one step away, the nearer the more.
    index = net.cast(net.linspace((1, new), 0, (0, 1)), torch.float32)
    place = net.elementwise("SUB", net.elementwise("PROD", net.elementwise("SUM", index, 0.5), 1.0 / scale), 0.5)
    last = net.elementwise("SUB", net.size_tensor(old, torch.float32), 1.0)
    place = net.elementwise("MIN", net.elementwise("MAX", place, 0.0), last)
    distance = net.unary(
        "ABS", net.elementwise("SUB", place, net.cast(net.linspace((old, 1), 0, (1, 0)), torch.float32))
    )
    return net.elementwise("MAX", net.elementwise("SUB", 1.0, distance), 0.0)


@converter(aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)
def antialiased(
    net: Network,
    x: Tensor,
    size: Sequence[Dim],
    align_corners: bool,
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    if not x.is_float:
        raise Unsupported(f"interpolation of {str(x.dtype).removeprefix('torch.')}: TensorRT has floats only")
    assert net.node is not None
    mode = "bicubic" if net.node.target is aten._upsample_bicubic2d_aa.default else "bilinear"
    wide = net.cast(x, torch.float32)
    # As torch does, the last dim first.
    for axis, scale in ((3, scale_w), (2, scale_h)):
        matrix = weights(net, x.shape[axis], size[axis - 2], scale, mode, align_corners, antialias=True)
        wide = product_along(net, wide, axis, matrix)
    return net.cast(wide, x.dtype)


GRID_MODES = ("LINEAR", "NEAREST", "CUBIC")
OUTSIDE = ("FILL", "CLAMP", "REFLECT")


@converter(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sample(net: Network, x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    layer = net.raw.add_grid_sample(x.raw, grid.raw)
    if layer is None:
        raise Unsupported(net.refusal("TensorRT refused the grid"))
    layer.interpolation_mode = getattr(trt.InterpolationMode, GRID_MODES[mode])
    layer.sample_mode = getattr(trt.SampleMode, OUTSIDE[padding])
    layer.align_corners = align_corners
    return net.out(layer, shape=net.result_shape(), dtype=x.dtype)


# torch's own overloads, for graphs that hold them: mode, and whether they take `align_corners`.
KERNELS = {
    aten.upsample_nearest1d: "nearest",
    aten.upsample_nearest2d: "nearest",
    aten.upsample_nearest3d: "nearest",
    aten._upsample_nearest_exact1d: "nearest-exact",
    aten._upsample_nearest_exact2d: "nearest-exact",
    aten._upsample_nearest_exact3d: "nearest-exact",
    aten.upsample_linear1d: "linear",
    aten.upsample_bilinear2d: "bilinear",
    aten.upsample_trilinear3d: "trilinear",
    aten.upsample_bicubic2d: "bicubic",
}


def register_kernel(packet: Any, mode: str) -> None:
    """The overload `vec` has one list of factors, the other one factor for each dim, both at the end."""

    def given(net: Network, first: Any, *more: float | None) -> list[float | None] | None:
        return list(first) if isinstance(first, list) else [first, *more][: len(net.result_shape()) - 2]

    def nearest(net: Network, x: Tensor, size: Any, a: Any = None, b: Any = None, c: Any = None) -> Tensor:
        return resample(net, x, net.result_shape()[2:], given(net, a, b, c), mode, False)

    def smooth(net: Network, x: Tensor, size: Any, align: bool, a: Any = None, b: Any = None, c: Any = None) -> Tensor:
        return resample(net, x, net.result_shape()[2:], given(net, a, b, c), mode, align)

    converter(packet.default, packet.vec)(nearest if mode.startswith("nearest") else smooth)


for packet, mode in KERNELS.items():
    register_kernel(packet, mode)
