"""Layers that look elements up by index: GATHER, SCATTER, ONE_HOT, NON_ZERO, NMS."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trt_dynamo.errors import EngineError
from trt_dynamo.reference.layer import STORAGE, Layer, Run, evaluates


def from_start(index: Tensor, size: int) -> Tensor:
    """Indices as int64, negative ones counted from the end."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


def bounded(index: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Indices brought inside, and which were outside; None where none can be (known without a copy on the CPU only)."""
    index = from_start(index, size)
    outside = (index < 0) | (index >= size)
    if index.device.type == "cpu" and not bool(outside.any()):
        return index, None
    return index.clamp(0, max(size - 1, 0)), outside


@evaluates("GATHER", exact=True)
def gather(layer: Layer) -> Run:
    native = layer.native
    mode, axis, batch = native.mode.name, native.axis, native.num_elementwise_dims
    if mode == "ELEMENT":
        return lambda x, index: gather_elements(x, index, axis)
    if mode == "ND":
        return lambda x, index: gather_nd(x, index, batch)
    return lambda x, index: gather_slices(x, index, axis, batch)


def gather_elements(x: Tensor, index: Tensor, axis: int) -> Tensor:
    index, outside = bounded(index, x.shape[axis])
    if x.shape[axis] == 0:
        return x.new_zeros(index.shape)
    result = torch.gather(x, axis, index)
    return result if outside is None else result.masked_fill(outside, 0)


def gather_slices(x: Tensor, index: Tensor, axis: int, batch: int) -> Tensor:
    """x[..., index, ...] along the axis, the first `batch` dims shared; an index outside reads zeros."""
    axis = axis % x.dim()
    index, outside = bounded(index, x.shape[axis])
    shape = (*x.shape[:axis], *index.shape[batch:], *x.shape[axis + 1 :])
    if x.shape[axis] == 0:
        return x.new_zeros(shape)
    if batch == 0:
        result = x.index_select(axis, index.reshape(-1)).reshape(shape)
    else:
        flat = index.flatten(batch)
        view = [*flat.shape[:batch], *[1] * (axis - batch), flat.shape[-1], *[1] * (x.dim() - axis - 1)]
        wanted = [*x.shape[:axis], flat.shape[-1], *x.shape[axis + 1 :]]
        result = torch.gather(x, axis, flat.reshape(view).expand(wanted)).reshape(shape)
    if outside is None:
        return result
    view = [*outside.shape[:batch], *[1] * (axis - batch), *outside.shape[batch:], *[1] * (x.dim() - axis - 1)]
    return result.masked_fill(outside.reshape(view), 0)


def gather_nd(x: Tensor, index: Tensor, batch: int) -> Tensor:
    """The slices of x that the rows of `index` point at, the first `batch` dims shared."""
    depth = index.shape[-1]
    count = math.prod(x.shape[:batch])
    items = x.reshape(count, *x.shape[batch:])
    rows = index.reshape(count, math.prod(index.shape[batch:-1]), depth)
    places = [from_start(rows[..., i], x.shape[batch + i]) for i in range(depth)]
    check_bounds(places, x.shape[batch : batch + depth])
    item = torch.arange(count, device=x.device).unsqueeze(1).expand(rows.shape[:2])
    where: tuple[Tensor, ...] = (item, *places)
    found = items[where]
    return found.reshape((*index.shape[:-1], *x.shape[batch + depth :]))


def check_bounds(places: list[Tensor], size: torch.Size) -> None:
    for place, length in zip(places, size, strict=True):
        if place.device.type != "cpu" or place.numel() == 0:
            continue  # to look would make the GPU wait
        low, high = int(place.min()), int(place.max())
        if low < 0 or high >= length:
            raise EngineError(f"an index is out of range: {low} to {high} in {length}")


@evaluates("SCATTER", exact=True)
def scatter(layer: Layer) -> Run:
    """The data with updates written at the indices; which of two writes to one place wins is undefined."""
    if layer.native.mode.name == "ND":
        return scatter_nd
    axis = layer.native.axis

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        return torch.scatter(x, axis, from_start(index, x.shape[axis]), updates)

    return run


def scatter_nd(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    depth = index.shape[-1]
    places = [from_start(index[..., i], x.shape[i]) for i in range(depth)]
    check_bounds(places, x.shape[:depth])
    if depth == 0:
        return updates.reshape(x.shape).clone()
    result = x.clone()
    result[tuple(places)] = updates
    return result


@evaluates("ONE_HOT", exact=True, host=(2,))
def one_hot(layer: Layer) -> Run:
    axis = layer.native.axis

    def run(index: Tensor, values: Tensor, depth: Tensor) -> Tensor:
        size, along = int(depth), axis % (index.dim() + 1)
        view = [1] * (index.dim() + 1)
        view[along] = -1
        hot = from_start(index, size).unsqueeze(along) == torch.arange(size, device=index.device).reshape(view)
        return torch.where(hot, values[1], values[0])

    return run


@evaluates("NON_ZERO", exact=True, data_dependent=True)
def non_zero(layer: Layer) -> Run:
    dtype = layer.dtype
    return lambda x: torch.nonzero(x).t().contiguous().to(dtype)


@evaluates("NMS", host=(2, 3, 4), data_dependent=True)
def nms(layer: Layer) -> Run:
    """Per batch item: the best candidates of all classes, up to the limit; of these, per class, those that overlap none
    that is better. Rows (item, class, box) by item and falling score, and how many they are.
    """
    native = layer.native
    centered, limit = native.bounding_box_format.name == "CENTER_SIZES", native.topk_box_limit
    dtype, count_type = STORAGE[layer.output_types[0]], STORAGE[layer.output_types[1]]

    def run(
        boxes: Tensor, scores: Tensor, most: Tensor, overlap: Tensor | None = None, least: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        most_overlap = 0.0 if overlap is None else float(overlap)
        least_score = 0.0 if least is None else float(least)
        corners = to_corners(boxes.float().cpu(), centered)
        rows: list[tuple[int, int, int]] = []
        for item, per_item in enumerate(scores.float().cpu()):
            own = corners[item] if corners.dim() == 4 else corners[item].unsqueeze(1)
            candidates = best_candidates(per_item, least_score, limit)
            rows += [(item, kind, box) for kind, box in suppress(own, candidates, int(most), most_overlap)]
        found = torch.tensor(rows, dtype=dtype, device=scores.device).reshape(-1, 3)
        return found, torch.tensor(len(rows), dtype=count_type, device=scores.device)

    return run


def best_candidates(scores: Tensor, least: float, limit: int) -> list[tuple[int, int]]:
    """(class, box) by falling score, those above `least`, `limit` at most. Of equal scores, the lower class first."""
    values, order = torch.sort(scores.t().reshape(-1), dim=0, descending=True, stable=True)
    count = min(int((values > least).sum()), limit)
    return [divmod(int(place), scores.shape[0]) for place in order[:count]]


def suppress(boxes: Tensor, candidates: list[tuple[int, int]], most: int, overlap: float) -> list[tuple[int, int]]:
    """The candidates kept, best first: at most `most` of a class, none over a better one by more than `overlap`."""
    kept: dict[int, list[Tensor]] = {}
    found = []
    for kind, box in candidates:
        corners = boxes[box, kind if boxes.shape[1] > 1 else 0]
        others = kept.setdefault(kind, [])
        if len(others) < most and all(intersection_over_union(corners, other) <= overlap for other in others):
            others.append(corners)
            found.append((kind, box))
    return found


def to_corners(boxes: Tensor, centered: bool) -> Tensor:
    """Boxes as (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centered:
        return torch.cat([first - second / 2, first + second / 2], -1)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def intersection_over_union(a: Tensor, b: Tensor) -> float:
    size = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    shared = float(size.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared
    return shared / union if union > 0 else 0.0
