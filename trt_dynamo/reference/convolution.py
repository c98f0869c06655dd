"""Layers with windows over space: CONVOLUTION, DECONVOLUTION, POOLING, PADDING. Rank 4 or 5, channels second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trt_dynamo.errors import EngineError, Unsupported
from trt_dynamo.reference.layer import Layer, Run, dims, evaluates

CONVOLVE: dict[int, Callable[..., Tensor]] = {2: functional.conv2d, 3: functional.conv3d}
DECONVOLVE: dict[int, Callable[..., Tensor]] = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MAX_POOL: dict[int, Callable[..., Tensor]] = {2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {2: functional.avg_pool2d, 3: functional.avg_pool3d}


@dataclass(frozen=True)
class Windows:
    """Where the windows of a layer lie: per spatial dim the window's extent (dilation counted), stride and padding."""

    extent: tuple[int, ...]
    stride: tuple[int, ...]
    pre: tuple[int, ...]
    post: tuple[int, ...]
    mode: str

    def padding(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Elements to add before and after each dim of an input of this size, so that whole windows cover it.

        With rounding up, the last window may reach past the padding; what it reads there is added after it.
        """
        before, after = [], []
        for i, length in enumerate(size):
            extent, stride, pre, post = self.extent[i], self.stride[i], self.pre[i], self.post[i]
            if self.mode.startswith("SAME"):
                total = (math.ceil(length / stride) - 1) * stride + extent - length
                if total < -1:
                    raise Unsupported(f"SAME padding that would cut: stride {stride}, window {extent}, size {length}")
                total = max(total, 0)
                pre = total // 2 if self.mode == "SAME_UPPER" else total - total // 2
                post = total - pre
            elif self.mode == "EXPLICIT_ROUND_UP":
                post += -(length + pre + post - extent) % stride
            before.append(pre)
            after.append(post)
        return before, after


def windows(layer: Layer, size: Sequence[int], dilation: Sequence[int]) -> Windows:
    native = layer.native
    extent = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
    return Windows(
        extent, dims(native.stride_nd), dims(native.pre_padding), dims(native.post_padding), native.padding_mode.name
    )


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with elements added (or, where negative, cut) before and after its last dims."""
    amounts = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return functional.pad(x, amounts, value=value) if any(amounts) else x


@dataclass(frozen=True)
class Filter:
    """What a convolution's layer says beside its weights: `maps` is the number of channels that come out."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    maps: int
    place: Windows


def filter_of(layer: Layer) -> Filter:
    native = layer.native
    size, dilation = dims(native.kernel_size_nd), dims(native.dilation_nd)
    place = windows(layer, size, dilation)
    return Filter(size, dims(native.stride_nd), dilation, native.num_groups, native.num_output_maps, place)


@evaluates("CONVOLUTION", weights=("kernel", "bias"))
def convolution(layer: Layer) -> Run:
    each = filter_of(layer)
    convolve = CONVOLVE[len(each.size)]

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = padded(x, *each.place.padding(x.shape[2:]))
        return convolve(x, weight, bias, each.stride, 0, each.dilation, each.groups)

    return with_weights(lambda x: (each.maps, x.shape[1] // each.groups, *each.size), compute)


@evaluates("DECONVOLUTION", weights=("kernel", "bias"))
def deconvolution(layer: Layer) -> Run:
    """The whole transposed convolution, then its edges cut off (or, where padding is negative, zeros added)."""
    each = filter_of(layer)
    deconvolve = DECONVOLVE[len(each.size)]

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        whole = deconvolve(x, weight, None, each.stride, 0, 0, each.groups, each.dilation)
        pre, post = cropping(each.place, x.shape[2:], whole.shape[2:])
        result = padded(whole, [-n for n in pre], [-n for n in post])
        return result if bias is None else result + bias.reshape(1, -1, *[1] * len(each.size))

    return with_weights(lambda x: (x.shape[1], each.maps // each.groups, *each.size), compute)


def with_weights(
    shape_of: Callable[[Tensor], tuple[int, ...]], compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Run:
    """Gives `compute` the kernel, in the shape for an input, and the bias: the layer's second and third input, where
    these are there, else its own.
    """

    def run(
        x: Tensor,
        given: Tensor | None = None,
        given_bias: Tensor | None = None,
        kernel: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if given is None:
            if kernel is None:
                raise EngineError("a convolution without a kernel")
            given = kernel.reshape(shape_of(x))
        return compute(x, given, bias if given_bias is None else given_bias)

    return run


def cropping(place: Windows, size: Sequence[int], whole: Sequence[int]) -> tuple[list[int], list[int]]:
    """What to cut off before and after each dim; with SAME padding, so much that the output is input * stride."""
    if not place.mode.startswith("SAME"):
        return list(place.pre), list(place.post)
    pre, post = [], []
    for length, stride, full in zip(size, place.stride, whole, strict=True):
        total = full - length * stride
        half = total // 2 if place.mode == "SAME_UPPER" else total - total // 2
        pre.append(half)
        post.append(total - half)
    return pre, post


@evaluates("POOLING")
def pooling(layer: Layer) -> Run:
    native = layer.native
    size, stride = dims(native.window_size_nd), dims(native.stride_nd)
    pool = Pool(windows(layer, size, [1] * len(size)), size, stride, native.average_count_excludes_padding)
    kind, blend = native.type.name, native.blend_factor
    if kind == "MAX":
        return pool.maximum
    if kind == "AVERAGE":
        return pool.average
    return lambda x: (1 - blend) * pool.maximum(x) + blend * pool.average(x)


@dataclass(frozen=True)
class Pool:
    """Pooling over all windows, those too that start in the padding."""

    place: Windows
    size: tuple[int, ...]
    stride: tuple[int, ...]
    excludes_padding: bool

    def maximum(self, x: Tensor) -> Tensor:
        before, after = self.place.padding(x.shape[2:])
        return MAX_POOL[len(self.size)](padded(x, before, after, -float("inf")), self.size, self.stride)

    def average(self, x: Tensor) -> Tensor:
        before, after = self.place.padding(x.shape[2:])
        return self.sums(padded(x, before, after)) / self.counts(x, before, after)

    def sums(self, x: Tensor) -> Tensor:
        return AVERAGE_POOL[len(self.size)](x, self.size, self.stride) * math.prod(self.size)

    def counts(self, x: Tensor, before: list[int], after: list[int]) -> Tensor:
        """How many elements of each window count: the input's, or the input's and the padding's."""
        inside = torch.ones((1, 1, *x.shape[2:]), dtype=torch.float32, device=x.device)
        if self.excludes_padding:
            return self.sums(padded(inside, before, after)).round().clamp(min=1)
        post = after if self.place.mode.startswith("SAME") else self.place.post
        reach = [n - m for n, m in zip(after, post, strict=True)]
        inside = padded(padded(inside, before, post, 1.0), [0] * len(reach), reach)
        return self.sums(inside).round().clamp(min=1)


@evaluates("PADDING", exact=True)
def padding(layer: Layer) -> Run:
    """Zeros around the last two dims; negative padding cuts."""
    before, after = dims(layer.native.pre_padding_nd), dims(layer.native.post_padding_nd)
    return lambda x: padded(x, before, after)
