"""Distances between rows, and what else sums a product or a difference over some dims."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.pointwise import clamped
from trt_dynamo.aten_converters.reduction import norm_of
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten

# From more rows than this on torch takes distances from a matrix product.
FEW_ROWS = 25
USE_PRODUCT, NEVER_PRODUCT = 1, 2


@converter(aten.dist.default)
def dist(net: Network, a: Tensor, b: Tensor, p: float = 2) -> Tensor:
    dtype = net.result_dtype()
    gap = net.elementwise("SUB", net.wide(net.cast(a, dtype)), net.wide(net.cast(b, dtype)))
    return net.cast(norm_of(net, gap, p, range(gap.ndim)), dtype)


@converter(aten._cdist_forward.default)
def cdist(net: Network, a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """Between each row of `a` and each of `b`; many of them from `|a|^2 + |b|^2 - 2 a b^T`, as torch does it."""
    many = net.guessed(a.shape[-2]) > FEW_ROWS or net.guessed(b.shape[-2]) > FEW_ROWS
    if p == 2 and compute_mode != NEVER_PRODUCT and (compute_mode == USE_PRODUCT or many):
        return euclidean(net, a, b)
    gap = net.elementwise("SUB", net.unsqueeze(a, [a.ndim - 1]), net.unsqueeze(b, [b.ndim - 2]))
    return norm_of(net, gap, p, [gap.ndim - 1])


def euclidean(net: Network, a: Tensor, b: Tensor) -> Tensor:
    squares = [net.reduce("SUM", net.elementwise("PROD", x, x), [x.ndim - 1], keepdim=True) for x in (a, b)]
    swap = [*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]
    product = net.matmul(a, net.permute(b, swap))
    total = net.elementwise("SUM", squares[0], net.permute(squares[1], swap))
    total = net.elementwise("SUB", total, net.elementwise("PROD", product, 2.0))
    return net.unary("SQRT", clamped(net, total, 0.0, None))


@converter(aten._pdist_forward.default)
def pdist(net: Network, x: Tensor, p: float = 2) -> Tensor:
    """Between each two rows."""
    rows = net.static_shape(x, "number of rows")[0]
    first, second = torch.triu_indices(rows, rows, 1)
    if rows < 2:
        return net.full(net.result_shape(), 0, x.dtype)
    gap = net.elementwise("SUB", net.gather(x, net.constant(first), 0), net.gather(x, net.constant(second), 0))
    return norm_of(net, gap, p, [1])


@converter(aten._trilinear.default)
def trilinear(
    net: Network,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    sum_dims: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The sum of `a * b * c` over some dims, each with dims of 1 put in."""
    a, b, c = (net.unsqueeze(x, sorted(axes)) for x, axes in ((a, expand_a), (b, expand_b), (c, expand_c)))
    product = net.elementwise("PROD", net.elementwise("PROD", a, b), c)
    return net.cast(net.reduce("SUM", net.wide(product), sum_dims), a.dtype)
