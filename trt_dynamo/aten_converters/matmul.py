"""Matrix products: `IMatrixMultiplyLayer`, of floats only."""

from __future__ import annotations

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter

aten = torch.ops.aten


def multiplied(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; over an inner dim without elements, zeros."""
    if a.shape[-1] == 0:
        shape = [*net.broadcast(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ())]
        return net.full(shape, 0, a.dtype)
    return net.matmul(a, b)


@converter(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default, aten.vdot.default)
def matmul(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return multiplied(net, a, b)


@converter(aten.addmm.default, aten.addmv.default, aten.baddbmm.default)
def addmm(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * base + alpha * (a @ b)`."""
    return scaled_sum(net, base, multiplied(net, a, b), beta, alpha)


@converter(aten.addbmm.default)
def addbmm(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The products of the batch are added up."""
    product = net.cast(net.reduce("SUM", net.wide(multiplied(net, a, b)), [0]), a.dtype)
    return scaled_sum(net, base, product, beta, alpha)


@converter(aten.addr.default)
def addr(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    outer = net.elementwise("PROD", net.unsqueeze(a, [1]), net.unsqueeze(b, [0]))
    return net.expand(net.cast(scaled_sum(net, base, outer, beta, alpha), net.result_dtype()), net.result_shape())


def scaled_sum(net: Network, base: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """A beta of 0 leaves the base out, NaN and all, as torch does."""
    if alpha != 1:
        product = net.elementwise("PROD", product, alpha)
    if beta == 0:
        return product
    return net.elementwise("SUM", product, base if beta == 1 else net.elementwise("PROD", base, beta))


@converter(aten.linear.default)
def linear(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    order = [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]
    product = multiplied(net, x, net.permute(weight, order) if weight.ndim > 1 else weight)
    return product if bias is None else net.elementwise("SUM", product, bias)
