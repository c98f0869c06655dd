"""Normalization: `INormalizationLayer` for layer, group and instance norms, elementwise layers where it does not fit.

Weights that an engine shall let replace stay as torch has them: a batch norm's scale and shift are computed in the
network, where TensorRT folds them. Of weights that stay what they are they are computed here, since each layer costs
build time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from trt_dynamo.aten_converters.folding import constant_of
from trt_dynamo.aten_converters.functions import rsqrt
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.reduction import count_of, degrees, moments
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import floordiv
from trt_dynamo.profiles import Dim
from trt_dynamo.trt import has, probed

aten = torch.ops.aten

Results = tuple[Tensor | None, ...]


def normalized(
    net: Network,
    x: Tensor,
    axes: Sequence[int],
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    groups: int = 1,
) -> Tensor:
    """`(x - mean) * rsqrt(var + eps) * scale + shift` with statistics over the axes; scale and shift have the rank of
    `x`.

    The layer wants a scale and a shift of one shape.
    """
    rank = x.ndim
    if scale is None:
        scale = net.scalar(1, x.dtype, rank) if shift is None else net.full(shift.shape, 1, x.dtype)
    if shift is None:
        shift = net.full(scale.shape, 0, x.dtype)
    mask = sum(1 << axis for axis in axes)
    raw = probed(net.raw)
    add = raw.add_normalization_v2 if has("add_normalization_v2") else raw.add_normalization
    layer = net.made(add(x.raw, scale.raw, shift.raw, mask))
    layer.epsilon = eps
    if groups != 1:
        layer.num_groups = groups
    return net.out(layer, shape=x.shape, dtype=x.dtype)


def working_dtype(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """The dtype to normalize in: float32 where the weights have another dtype than `x`."""
    return x.dtype if all(w is None or w.dtype is x.dtype for w in weights) else torch.float32


@converter(aten.native_layer_norm.default)
def layer_norm(
    net: Network, x: Tensor, shape: Sequence[Dim], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Results:
    dtype = working_dtype(x, weight, bias)
    whole = x.ndim == len(shape)  # the layer wants a dim that is not normalized
    inner = net.unsqueeze(net.cast(x, dtype), [0]) if whole else net.cast(x, dtype)
    axes = list(range(inner.ndim - len(shape), inner.ndim))
    scale, shift = (net.unsqueeze_to(net.cast(w, dtype), inner.ndim) if w is not None else None for w in (weight, bias))
    y = normalized(net, inner, axes, scale, shift, eps)
    y = net.cast(net.squeeze(y, [0]) if whole else y, x.dtype)
    return (y, *statistics(net, x, range(x.ndim - len(shape), x.ndim), eps))


def statistics(net: Network, x: Tensor, axes: Sequence[int], eps: float) -> Results:
    """The mean and the reciprocal of the standard deviation, where they are read."""
    if not any(net.used[1:]):
        return None, None
    middle, _, squares = moments(net, net.wide(x), list(axes))
    spread = rsqrt(net, net.elementwise("SUM", net.reduce("AVG", squares, axes, keepdim=True), eps))
    return tuple(
        net.cast(net.reshape(s, net.result_shape(i)), net.result_dtype(i)) for i, s in ((1, middle), (2, spread))
    )


@converter(aten.native_group_norm.default)
def group_norm(
    net: Network,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: Dim,
    channels: Dim,
    inner: Dim,
    groups: int,
    eps: float,
) -> Results:
    dtype = working_dtype(x, weight, bias)
    wide = net.cast(x, dtype)
    scale, shift = (by_channel(net, net.cast(w, dtype), x.ndim) if w is not None else None for w in (weight, bias))
    if isinstance(channels, int) and x.ndim > 2 and groups > 1 and has("add_normalization_v2"):
        ones = scale or by_channel(net, net.constant(torch.ones(channels, dtype=dtype)), x.ndim)
        y = normalized(net, wide, range(2, x.ndim), ones, shift, eps, groups)
    else:
        # Each group is a row. The layer takes one group for none, and its older version a scale for each group only.
        rows = net.reshape(wide, (batch, groups, floordiv(channels, groups) * inner))
        y = affine(net, net.reshape(normalized(net, rows, [2], None, None, eps), x.shape), scale, shift)
    if not any(net.used[1:]):
        return net.cast(y, x.dtype), None, None
    rows = net.reshape(x, (batch, groups, floordiv(channels, groups) * inner))
    return (net.cast(y, x.dtype), *statistics(net, rows, [2], eps))


def by_channel(net: Network, x: Tensor, rank: int) -> Tensor:
    """A vector of channels as `[1, C, 1, ...]`."""
    return net.unsqueeze(x, [0, *range(2, rank)])


def affine(net: Network, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if scale is None else net.elementwise("PROD", x, scale)
    return x if shift is None else net.elementwise("SUM", x, shift)


# -- batch norms -------------------------------------------------------------------------------------------------------


@converter(aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default)
def batch_norm(
    net: Network,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> Results:
    """One factor and one summand for each channel, which TensorRT folds into a convolution before it."""
    y = net.cast(scaled_and_shifted(net, x, weight, bias, net.wide(mean), net.wide(var), eps), x.dtype)
    return (
        y,
        *(
            net.constant(torch.empty(0, dtype=v.dtype)) if u else None
            for v, u in zip(net.expected[1:], net.used[1:], strict=True)
        ),
    )


def scaled_and_shifted(
    net: Network, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """`x * scale + shift` with the two computed in float32 from statistics by channel."""
    known = known_scale_and_shift(net, eps)
    if known is not None:
        shape = (1, -1, *(1 for _ in range(2, x.ndim)))
        return affine(net, x, *(net.constant(w.to(x.dtype).reshape(shape)) for w in known))
    scale = rsqrt(net, net.elementwise("SUM", var, eps))
    scale = scale if weight is None else net.elementwise("PROD", scale, net.wide(weight))
    taken = net.elementwise("PROD", mean, scale)
    shift = net.unary("NEG", taken) if bias is None else net.elementwise("SUB", net.wide(bias), taken)
    factor, summand = (by_channel(net, net.cast(w, x.dtype), x.ndim) for w in (scale, shift))
    return affine(net, x, factor, summand)


def known_scale_and_shift(net: Network, eps: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same two of the node under conversion, by torch; None where they are not known or may be replaced."""
    if net.refit or net.node is None:
        return None
    nodes = [node for node in net.node.args[1:5] if isinstance(node, Node)]
    if any(node.op == "call_function" for node in nodes):
        return None
    found = {node: constant_of(net, node) for node in nodes}
    if any(value is None for value in found.values()):
        return None
    weight, bias, mean, var = (found[n].float() if isinstance(n, Node) else None for n in net.node.args[1:5])
    if mean is None or var is None:
        return None
    scale = 1 / torch.sqrt(var + eps)
    scale = scale if weight is None else scale * weight
    taken = mean * scale
    return scale, -taken if bias is None else bias - taken


@converter(aten._native_batch_norm_legit.no_stats)
def batch_norm_of_input(
    net: Network, x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Results:
    """With a batch of one it is an instance norm: torch makes `[1, N * C, ...]` of its input for this op."""
    if x.shape[0] == 1 and x.ndim > 2 and working_dtype(x, weight, bias) is x.dtype and not any(net.used[1:]):
        scale, shift = (by_channel(net, w, x.ndim) if w is not None else None for w in (weight, bias))
        return normalized(net, x, range(2, x.ndim), scale, shift, eps), None, None
    return batch_norm_in_training(net, x, weight, bias, eps)[0]


def batch_norm_in_training(
    net: Network, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Results, Tensor, Tensor]:
    """The op's three results, then mean and variance by channel."""
    wide, axes = net.wide(x), [0, *range(2, x.ndim)]
    middle, deviation, squares = moments(net, wide, axes)
    var = net.reduce("AVG", squares, axes, keepdim=True)
    spread = rsqrt(net, net.elementwise("SUM", var, eps))
    scale, shift = (by_channel(net, net.wide(w), x.ndim) if w is not None else None for w in (weight, bias))
    y = affine(net, net.elementwise("PROD", deviation, spread), scale, shift)
    mean, var, spread = (net.squeeze(s, axes) for s in (middle, var, spread))
    saved = [net.cast(s, net.result_dtype(i)) if net.used[i] else None for i, s in ((1, mean), (2, spread))]
    return (net.cast(y, x.dtype), *saved), mean, var


@converter(aten._native_batch_norm_legit_functional.default)
def batch_norm_functional(
    net: Network,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Results:
    """The running statistics come out as results: `(1 - momentum) * old + momentum * new`, the variance unbiased."""
    if not training:
        y = net.cast(
            scaled_and_shifted(net, x, weight, bias, net.wide(running_mean), net.wide(running_var), eps), x.dtype
        )
        empty = [net.constant(torch.empty(0, dtype=net.result_dtype(i))) if net.used[i] else None for i in (1, 2)]
        return (y, *empty, running_mean, running_var)
    results, mean, var = batch_norm_in_training(net, x, weight, bias, eps)
    count = count_of(x, [0, *range(2, x.ndim)])
    total = net.elementwise("PROD", var, net.size_tensor(count, torch.float32))
    unbiased = net.elementwise("DIV", total, degrees(net, count, 1))
    return (*results, moved(net, running_mean, mean, momentum), moved(net, running_var, unbiased, momentum))


@converter(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update(
    net: Network,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Results:
    """As above, with one more result: what cuDNN keeps for its backward pass, here nothing."""
    *results, mean, var = batch_norm_functional(net, x, weight, bias, running_mean, running_var, True, momentum, eps)
    reserve = net.constant(torch.empty(0, dtype=net.result_dtype(3))) if net.used[3] else None
    return (*results, reserve, mean, var)


def moved(net: Network, old: Tensor, new: Tensor, momentum: float) -> Tensor:
    kept = net.elementwise("PROD", net.wide(old), 1 - momentum)
    return net.cast(net.elementwise("SUM", kept, net.elementwise("PROD", new, momentum)), old.dtype)


# -- root mean squares -------------------------------------------------------------------------------------------------


@converter(aten._fused_rms_norm.default)
def rms_norm(net: Network, x: Tensor, shape: Sequence[Dim], weight: Tensor | None, eps: float | None) -> Results:
    wide = net.wide(x)
    squares = net.elementwise("PROD", wide, wide)
    power = net.reduce("AVG", squares, range(x.ndim - len(shape), x.ndim), keepdim=True)
    spread = rsqrt(net, net.elementwise("SUM", power, torch.finfo(x.dtype).eps if eps is None else eps))
    y = net.elementwise("PROD", wide, spread)
    y = y if weight is None else net.elementwise("PROD", y, net.wide(weight))
    return net.cast(y, net.result_dtype()), net.cast(spread, net.result_dtype(1)) if net.used[1] else None
