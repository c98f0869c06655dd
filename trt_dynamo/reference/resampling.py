"""Layers that interpolate: RESIZE, GRID_SAMPLE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trt_dynamo.reference.layer import Layer, Run, dims, evaluates

ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "HALF_UP": lambda x: torch.floor(x + 0.5),
    "HALF_DOWN": lambda x: torch.ceil(x - 0.5),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}


@evaluates("RESIZE", host=(1,))
def resize(layer: Layer) -> Run:
    """Each axis on its own: where its new elements lie in the old ones, and how much of which they take."""
    native = layer.native
    scales = None if layer.has_input(1) or len(native.scales or ()) == 0 else list(native.scales)
    fixed = None if layer.has_input(1) or scales is not None else dims(native.shape)
    axis_of = Resampling(
        native.resize_mode.name,
        native.coordinate_transformation.name,
        native.selector_for_single_pixel.name,
        native.nearest_rounding.name,
        bool(native.exclude_outside),
        native.cubic_coeff,
    )

    def run(x: Tensor, size: Tensor | None = None) -> Tensor:
        wanted = size.tolist() if size is not None else fixed
        for axis in range(x.dim()):
            scale = None if scales is None else scales[axis]
            new = int(x.shape[axis] * scale) if scale is not None else wanted[axis]  # type: ignore[index]
            if new != x.shape[axis] or (scale is not None and scale != 1):
                x = axis_of(x, axis, new, scale)
        return x

    return run


class Resampling:
    """One way to resample an axis: the coordinates and the weights."""

    def __init__(
        self, mode: str, transform: str, selector: str, rounding: str, exclude_outside: bool, cubic: float
    ) -> None:
        self.mode = mode
        self.transform = transform
        self.selector = selector
        self.round = ROUND[rounding]
        self.exclude_outside = exclude_outside
        self.cubic = cubic

    def __call__(self, x: Tensor, axis: int, new: int, scale: float | None) -> Tensor:
        old = x.shape[axis]
        place = self.coordinates(old, new, scale, x.device)
        if self.mode == "NEAREST":
            return x.index_select(axis, self.round(place).clamp(0, old - 1).long())
        taps = (0, 1) if self.mode == "LINEAR" else (-1, 0, 1, 2)
        base = torch.floor(place)
        result, total = torch.zeros_like(x.narrow(axis, 0, 1)), torch.zeros_like(place)
        view = [1] * x.dim()
        view[axis] = -1
        for tap in taps:
            index, weight = base + tap, self.weight(place - base - tap)
            if self.exclude_outside:
                weight = weight * ((index >= 0) & (index < old))
            total = total + weight
            result = result + x.index_select(axis, index.clamp(0, old - 1).long()) * weight.reshape(view)
        return result / total.reshape(view) if self.exclude_outside else result

    def coordinates(self, old: int, new: int, scale: float | None, device: torch.device) -> Tensor:
        """Where the new elements lie among the old, in float32 as the kernels compute it."""
        index = torch.arange(new, dtype=torch.float32, device=device)
        if new == 1 and self.selector == "UPPER":
            return torch.zeros_like(index)
        if self.transform == "ALIGN_CORNERS":
            return index * ((old - 1) / (new - 1) if new > 1 else 0.0)
        step = torch.tensor(old / new if scale is None else 1 / scale, dtype=torch.float32, device=device)
        return (index + 0.5) * step - 0.5 if self.transform == "HALF_PIXEL" else index * step

    def weight(self, distance: Tensor) -> Tensor:
        """How much an element at this distance counts."""
        d, a = distance.abs(), self.cubic
        if self.mode == "LINEAR":
            return (1 - d).clamp(min=0)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((d - 5) * d + 8) * d * a - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


SAMPLE_MODES = {"FILL": "zeros", "CLAMP": "border", "REFLECT": "reflection"}
INTERPOLATION = {"LINEAR": "bilinear", "NEAREST": "nearest", "CUBIC": "bicubic"}


@evaluates("GRID_SAMPLE")
def grid_sample(layer: Layer) -> Run:
    native = layer.native
    outside, align = SAMPLE_MODES.get(native.sample_mode.name), native.align_corners
    mode = INTERPOLATION[native.interpolation_mode.name]
    if outside is None:
        raise layer.unsupported(f"sample mode {native.sample_mode.name}")
    return lambda x, grid: functional.grid_sample(x, grid, mode, outside, align)
