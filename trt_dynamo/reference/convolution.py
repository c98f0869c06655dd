"""Layers with windows over space: CONVOLUTION, DECONVOLUTION, POOLING, PADDING. Rank 4 or 5, channels second."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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
                total = max((math.ceil(length / stride) - 1) * stride + extent - length, 0)
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
    return Windows(extent, dims(native.stride_nd), dims(native.pre_padding), dims(native.post_padding), native.padding_mode.name)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with elements added (or, where negative, cut) before and after its last dims."""
    amounts = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return functional.pad(x, amounts, value=value) if any(amounts) else x




@evaluates("CONVOLUTION")
def convolution(layer: Layer) -> Run:
    native = layer.native
    size, stride, dilation = dims(native.kernel_size_nd), dims(native.stride_nd), dims(native.dilation_nd)
    groups, maps = native.num_groups, native.num_output_maps
    place, convolve = windows(layer, size, dilation), CONVOLVE[len(size)]
    kernel, bias = own_weights(layer)

    def run(x: Tensor, given: Tensor | None = None, given_bias: Tensor | None = None) -> Tensor:
        channels = x.shape[1] // groups
        weight = kernel.to(x.device).reshape(maps, channels, *size) if given is None else given
        shift = given_bias if given_bias is not None else bias.to(x.device) if bias.numel() else None
        x = padded(x, *place.padding(x.shape[2:]))
        return convolve(x, weight, shift, stride, 0, dilation, groups)

    return run


def own_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """The kernel and bias that are not given as tensors; empty where they are, or where there is no bias."""
    kernel = torch.empty(0) if layer.has_input(1) else layer.weights("kernel")
    bias = torch.empty(0) if layer.has_input(2) else layer.weights("bias")
    return kernel.float(), bias.float()


@evaluates("DECONVOLUTION")
def deconvolution(layer: Layer) -> Run:
    """The whole transposed convolution, then its edges cut off (or, where padding is negative, zeros added)."""
    native = layer.native
    size, stride, dilation = dims(native.kernel_size_nd), dims(native.stride_nd), dims(native.dilation_nd)
    groups, maps = native.num_groups, native.num_output_maps
    place, deconvolve = windows(layer, size, dilation), DECONVOLVE[len(size)]
    kernel, bias = own_weights(layer)

    def run(x: Tensor, given: Tensor | None = None, given_bias: Tensor | None = None) -> Tensor:
        weight = kernel.to(x.device).reshape(x.shape[1], maps // groups, *size) if given is None else given
        shift = given_bias if given_bias is not None else bias.to(x.device) if bias.numel() else None
        whole = deconvolve(x, weight, None, stride, 0, 0, groups, dilation)
        pre, post = cropping(place, x.shape[2:], whole.shape[2:])
        result = padded(whole, [-n for n in pre], [-n for n in post])
        return result if shift is None else result + shift.reshape(1, -1, *[1] * len(size))

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
    size, stride, kind = dims(native.window_size_nd), dims(native.stride_nd), native.type.name
    place = windows(layer, size, [1] * len(size))
    blend, excludes = native.blend_factor, native.average_count_excludes_padding

    def run(x: Tensor) -> Tensor:
        before, after = place.padding(x.shape[2:])
        most = maximum(x, before, after) if kind != "AVERAGE" else None
        mean = average(x, before, after) if kind != "MAX" else None
        if most is None or mean is None:
            return mean if most is None else most
        return (1 - blend) * most + blend * mean

    def maximum(x: Tensor, before: list[int], after: list[int]) -> Tensor:
        return MAX_POOL[len(size)](padded(x, before, after, -float("inf")), size, stride)

    def average(x: Tensor, before: list[int], after: list[int]) -> Tensor:
        total = AVERAGE_POOL[len(size)](padded(x, before, after), size, stride) * math.prod(size)
        return total / counts(x, before, after)

    def counts(x: Tensor, before: list[int], after: list[int]) -> Tensor:
        """How many elements of each window count: the input's, or the input's and the padding's."""
        inside = torch.ones((1, 1, *x.shape[2:]), device=x.device)
        extra = after
        if not excludes:
            post = after if place.mode.startswith("SAME") else place.post
            inside = padded(inside, before, post, 1.0)
            before, extra = [0] * len(size), [n - m for n, m in zip(after, post, strict=True)]
        found = AVERAGE_POOL[len(size)](padded(inside, before, extra), size, stride) * math.prod(size)
        return found.round().clamp(min=1)

    return run


@evaluates("PADDING", exact=True)
def padding(layer: Layer) -> Run:
    """Zeros around the last two dims; negative padding cuts."""
    before, after = dims(layer.native.pre_padding_nd), dims(layer.native.post_padding_nd)
    return lambda x: padded(x, before, after)
