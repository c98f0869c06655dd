"""Rules for complex numbers that add up many: matrix products, sums, products, norms."""

from __future__ import annotations

from typing import Any

import torch

from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.complex_arithmetic import absolute, add, conj, mul, truth
from trt_dynamo.lowering.pairs import Number, Operand, Pair, axes, axis, real_dtype, rule
from trt_dynamo.lowering.recording import REAL_OF
from trt_dynamo.profiles import dim_of

aten = torch.ops.aten

LONGEST_PRODUCT = 64


@rule(aten.mm.default, aten.bmm.default)
def matmul(a: Pair, b: Pair) -> Pair:
    """One real product: the parts of a row lie side by side, and each element of `b` is a matrix of 2 by 2."""
    turned = torch.stack([-b.im, b.re], -1)
    square = torch.stack([b.value, turned], -3).flatten(-4, -3).flatten(-2)
    product = torch.matmul(a.value.flatten(-2), square)
    return Pair(product.unflatten(-1, (b.value.shape[-2], 2)))


@rule(aten.matmul.default)
def any_matmul(a: Pair, b: Pair) -> Pair:
    if a.ndim < 2 or b.ndim < 2:
        raise Unsupported("a product of complex vectors")
    return matmul(a, b)


@rule(aten.mv.default)
def mv(a: Pair, b: Pair) -> Pair:
    return Pair(matmul(a, Pair(b.value.unsqueeze(1))).value.squeeze(1))


@rule(aten.dot.default)
def dot(a: Pair, b: Pair) -> Pair:
    return Pair(mul(a, b).value.sum(0))


@rule(aten.vdot.default)
def vdot(a: Pair, b: Pair) -> Pair:
    return dot(conj(a), b)


def scaled_sum(base: Pair, added: Pair, beta: Number, alpha: Number) -> Pair:
    """`beta * base + alpha * added`; a beta of 0 leaves the base out, NaN and all."""
    added = added if alpha == 1 else mul(added, alpha)
    if beta == 0:
        return added
    return add(added, base if beta == 1 else mul(base, beta))


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(base: Pair, a: Pair, b: Pair, *, beta: Number = 1, alpha: Number = 1) -> Pair:
    return scaled_sum(base, matmul(a, b), beta, alpha)


@rule(aten.addmv.default)
def addmv(base: Pair, a: Pair, b: Pair, *, beta: Number = 1, alpha: Number = 1) -> Pair:
    return scaled_sum(base, mv(a, b), beta, alpha)


@rule(aten.addbmm.default)
def addbmm(base: Pair, a: Pair, b: Pair, *, beta: Number = 1, alpha: Number = 1) -> Pair:
    return scaled_sum(base, Pair(matmul(a, b).value.sum(0)), beta, alpha)


@rule(aten.addr.default)
def addr(base: Pair, a: Pair, b: Pair, *, beta: Number = 1, alpha: Number = 1) -> Pair:
    outer = mul(Pair(a.value.unsqueeze(1)), Pair(b.value.unsqueeze(0)))
    return scaled_sum(base, outer, beta, alpha)


@rule(aten.linear.default)
def linear(x: Pair, weight: Pair, bias: Pair | None = None) -> Pair:
    if weight.ndim != 2 or x.ndim < 2:
        raise Unsupported("a linear layer of complex vectors")
    result = matmul(x, Pair(weight.value.transpose(0, 1)))
    return result if bias is None else add(result, bias)


@rule(aten.sum.default, aten.sum.dim_IntList)
def total(x: Operand, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return reduced(torch.sum, x, dims, keepdim, dtype)


@rule(aten.mean.default, aten.mean.dim)
def mean(x: Operand, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return reduced(torch.mean, x, dims, keepdim, dtype)


def reduced(function: Any, x: Operand, dims: Any, keepdim: bool, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, Pair) or (dtype is not None and dtype not in REAL_OF):
        raise Unsupported("a sum of complex numbers into reals, or the reverse")
    chosen = axes(x, dims)
    if not chosen:
        return Pair(x.value.to(real_dtype(dtype), copy=True) if dtype else x.value.clone())
    return Pair(function(x.value, chosen, keepdim=keepdim, dtype=real_dtype(dtype)))


@rule(aten.prod.default, aten.prod.dim_int)
def prod(x: Pair, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Pair:
    """Halves are multiplied until one element is left."""
    if dim is None:
        x, dim = Pair(x.value.flatten(0, -2) if x.ndim else x.value.unsqueeze(0)), 0
    elif not x.ndim:
        raise Unsupported("a product along the dim of a number")
    dim = axis(x, dim)
    length = dim_of(x.shape[dim])
    if not isinstance(length, int) or not 0 < length <= LONGEST_PRODUCT or dtype not in (None, *REAL_OF):
        raise Unsupported(f"a product of complex numbers that is not of 1 to {LONGEST_PRODUCT} elements")
    while length > 1:
        half = length // 2
        left, right, odd = x.value.split([half, half, length - 2 * half], dim)
        product = mul(Pair(left), Pair(right)).value
        x = Pair(torch.cat([product, odd], dim) if length % 2 else product)
        length -= half
    value = x.value.to(real_dtype(dtype)) if dtype else x.value
    return Pair(value.clone() if keepdim else value.squeeze(dim).clone())


@rule(aten.cumsum.default)
def cumsum(x: Operand, dim: int, *, dtype: Any = None) -> Pair:
    if not isinstance(x, Pair) or not x.ndim or dtype not in (None, *REAL_OF):
        raise Unsupported("a running sum of complex numbers into reals, or the reverse")
    return Pair(torch.cumsum(x.value, axis(x, dim), dtype=real_dtype(dtype)))


@rule(aten.var.correction)
def var(x: Pair, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> torch.Tensor:
    """The variances of the parts add up."""
    return torch.var(x.value, axes(x, dims), correction=correction, keepdim=keepdim).sum(-1)


@rule(aten.std.correction)
def std(x: Pair, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> torch.Tensor:
    return var(x, dims, correction=correction, keepdim=keepdim).sqrt()


@rule(aten.var_mean.correction)
def var_mean(x: Pair, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Any, Any]:
    return var(x, dims, correction=correction, keepdim=keepdim), mean(x, dims, keepdim)


@rule(aten.linalg_vector_norm.default)
def vector_norm(x: Pair, ord: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(absolute(x), ord, dims, keepdim, dtype=real_dtype(dtype))
    return norm


@rule(aten.any.default, aten.any.dim, aten.any.dims)
def any_of(x: Pair, *dims: Any, **keywords: Any) -> torch.Tensor:
    return torch.any(truth(x), *dims, **keywords)


@rule(aten.all.default, aten.all.dim, aten.all.dims)
def all_of(x: Pair, *dims: Any, **keywords: Any) -> torch.Tensor:
    return torch.all(truth(x), *dims, **keywords)
