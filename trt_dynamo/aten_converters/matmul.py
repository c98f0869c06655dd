"""Matrix products: `IMatrixMultiplyLayer` for floats; integers, which it does not take, are multiplied out and
summed.
"""

from __future__ import annotations

import torch

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.registry import converter
from trt_dynamo.aten_converters.shapes import product
from trt_dynamo.errors import Unsupported

aten = torch.ops.aten


def multiplied(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`; over an inner dim without elements, zeros."""
    if not a.is_float:
        return multiplied_out(net, a, b)
    if a.shape[-1] == 0:
        shape = [*net.broadcast(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ())]
        return net.full(shape, 0, a.dtype)
    return net.matmul(a, b)


# More products than this are too much memory to put side by side.
MOST_PRODUCTS = 2**26


def multiplied_out(net: Network, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` as the sum of all products along the inner dim, exact for integers."""
    left = net.unsqueeze(a, [a.ndim]) if b.ndim > 1 else a
    right = net.unsqueeze(b, [b.ndim - 2]) if b.ndim > 1 and a.ndim > 1 else b
    products = net.elementwise("PROD", left, right)
    if net.most(product(products.shape)) > MOST_PRODUCTS:
        raise Unsupported(f"a large matrix product in {str(a.dtype).removeprefix('torch.')}: TensorRT has floats only")
    inner = products.ndim - 2 if b.ndim > 1 else products.ndim - 1
    return net.reduce("SUM", products, [inner])


@converter(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default, aten.vdot.default)
def matmul(net: Network, a: Tensor, b: Tensor) -> Tensor:
    return multiplied(net, a, b)


@converter(aten.addmm.default, aten.addmv.default, aten.baddbmm.default)
def addmm(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`beta * base + alpha * (a @ b)`."""
    return scaled_sum(net, base, multiplied(net, a, b), beta, alpha)


@converter(aten.addbmm.default)
def addbmm(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The products of the batch are added up: one product over the batch and the inner dim together."""
    batch, rows, inner = a.shape
    left = net.reshape(net.permute(a, [1, 0, 2]), (rows, batch * inner))
    right = net.reshape(b, (batch * inner, b.shape[2]))
    return scaled_sum(net, base, multiplied(net, left, right), beta, alpha)


@converter(aten.addr.default)
def addr(net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    outer = net.elementwise("PROD", net.unsqueeze(a, [1]), net.unsqueeze(b, [0]))
    return net.expand(net.cast(scaled_sum(net, base, outer, beta, alpha), net.result_dtype()), net.result_shape())


def scaled_sum(net: Network, base: Tensor, added: Tensor, beta: float, alpha: float) -> Tensor:
    """A beta of 0 leaves the base out, NaN and all, as torch does. Of integers the factors are cut to integers."""
    if not added.is_float:
        beta, alpha = int(beta), int(alpha)
    if alpha != 1:
        added = net.elementwise("PROD", added, alpha)
    if beta == 0:
        return added
    return net.elementwise("SUM", added, base if beta == 1 else net.elementwise("PROD", base, beta))


@converter(aten.linear.default)
def linear(net: Network, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    order = [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]
    result = multiplied(net, x, net.permute(weight, order) if weight.ndim > 1 else weight)
    return result if bias is None else net.elementwise("SUM", result, bias)


@converter(aten._addmm_activation.default)
def addmm_activation(
    net: Network, base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
) -> Tensor:
    total = scaled_sum(net, base, multiplied(net, a, b), beta, alpha)
    return net.activation("GELU_TANH" if use_gelu else "RELU", total)


@converter(aten.mm.dtype, aten.bmm.dtype)
def matmul_to(net: Network, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Half operands, float32 result: the products of halves are exact in float32."""
    return multiplied(net, net.cast(a, out_dtype), net.cast(b, out_dtype))


@converter(aten.addmm.dtype, aten.baddbmm.dtype)
def addmm_to(
    net: Network, base: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return scaled_sum(net, net.cast(base, out_dtype), matmul_to(net, a, b, out_dtype), beta, alpha)
