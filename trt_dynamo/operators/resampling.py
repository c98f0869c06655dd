"""Ops for what `torch.nn.functional.interpolate` and circular padding mean.

`trt_dynamo::resample` is any of ATen's `upsample_*` kernels, the output's size always given;
`trt_dynamo::pad_circular` is circular padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten

# By mode and number of spatial dims: ATen's kernel, with and without `align_corners`.
KERNELS: dict[tuple[str, int], Callable[..., torch.Tensor]] = {
    ("nearest", 1): aten.upsample_nearest1d,
    ("nearest", 2): aten.upsample_nearest2d,
    ("nearest", 3): aten.upsample_nearest3d,
    ("nearest-exact", 1): aten._upsample_nearest_exact1d,
    ("nearest-exact", 2): aten._upsample_nearest_exact2d,
    ("nearest-exact", 3): aten._upsample_nearest_exact3d,
    ("linear", 1): aten.upsample_linear1d,
    ("bilinear", 2): aten.upsample_bilinear2d,
    ("trilinear", 3): aten.upsample_trilinear3d,
    ("bicubic", 2): aten.upsample_bicubic2d,
}


def run_kernel(
    x: torch.Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool
) -> torch.Tensor:
    corners = () if mode.startswith("nearest") else (align_corners,)
    return KERNELS[mode, len(size)](x, size, *corners, *(scales or (None,) * len(size)))


@torch.library.custom_op("trt_dynamo::resample", mutates_args=())
def resample(
    x: torch.Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool
) -> torch.Tensor:
    """[N, C, *dims] to [N, C, *size]. `scales`: the factors to compute coordinates with, where the user gave them."""
    return run_kernel(x, size, scales, mode, align_corners)


@resample.register_fake
def fake_resample(
    x: torch.Tensor, size: Sequence[int], scales: Sequence[float] | None, mode: str, align_corners: bool
) -> torch.Tensor:
    if x.shape[0] == 0:  # which torch's kernels take, but not its fake ones
        one = run_kernel(x.new_empty((1, *x.shape[1:])), size, scales, mode, align_corners)
        return one.new_empty((x.shape[0], *one.shape[1:]))
    return run_kernel(x, size, scales, mode, align_corners)


def interpolate(
    x: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Stands for torch's `interpolate`; averages, antialiasing and wrong arguments are left to torch itself."""
    dims = x.ndim - 2
    if antialias or (mode, dims) not in KERNELS or (size is None) == (scale_factor is None):
        return NotImplemented
    if size is not None:
        return resample(x, listed(size, dims), None, mode, bool(align_corners))
    scales = listed(scale_factor, dims)
    if not all(type(scale) in (int, float) for scale in scales):
        return NotImplemented
    size = [n * int(f) if f == int(f) else whole(n * f) for n, f in zip(x.shape[2:], scales, strict=True)]
    factors = None if recompute_scale_factor else [float(scale) for scale in scales]
    return resample(x, size, factors, mode, bool(align_corners))


whole: Callable[[Any], int] = torch.sym_int


def listed(value: Any, count: int) -> list[Any]:
    """One value for each of the dims."""
    return list(value) if isinstance(value, list | tuple) else [value] * count


@torch.library.custom_op("trt_dynamo::pad_circular", mutates_args=())
def pad_circular(x: torch.Tensor, amounts: Sequence[int]) -> torch.Tensor:
    """`F.pad(x, amounts, "circular")`: two amounts for each of the last dims, the last dim first."""
    return F.pad(x, list(amounts), "circular")


@pad_circular.register_fake
def fake_pad_circular(x: torch.Tensor, amounts: Sequence[int]) -> torch.Tensor:
    shape = list(x.shape)
    for i in range(len(amounts) // 2):
        shape[-1 - i] += amounts[2 * i] + amounts[2 * i + 1]
    return x.new_empty(shape)


def pad(x: torch.Tensor, amounts: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Stands for torch's `pad`, where the mode is circular."""
    return pad_circular(x, list(amounts)) if mode == "circular" else NotImplemented
