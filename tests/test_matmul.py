"""Matrix products against eager: all ranks, broadcast batches, transposes, empty dims, integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trt_dynamo.testing import check, refused
from trt_dynamo.trt import trt

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


SHAPES = [
    ((4,), (4,)),
    ((3, 4), (4,)),
    ((4,), (4, 5)),
    ((3, 4), (4, 5)),
    ((1, 4), (4, 1)),
    ((2, 3, 4), (4,)),
    ((4,), (2, 4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)),
    ((6, 1, 2, 3, 4), (1, 5, 2, 4, 3)),
    ((0, 4), (4, 5)),
    ((3, 0), (0, 5)),
    ((2, 3, 0), (2, 0, 5)),
]


@both
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    check(torch.matmul, random(*shapes[0]), random(*shapes[1], seed=1), dynamic=dynamic)


@pytest.mark.parametrize("shapes", SHAPES[:11], ids=str)
def test_products_of_integers(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    for dtype in (torch.int64, torch.int32, torch.int8):
        check(torch.matmul, (random(*shapes[0]) * 10).to(dtype), (random(*shapes[1], seed=1) * 10).to(dtype))


def test_factors_are_cut_to_integers() -> None:
    c, a, b = torch.arange(3), torch.arange(12).reshape(3, 4), torch.arange(4)
    check(lambda c, a, b: torch.addmv(c, a, b, beta=2.7, alpha=1.9), c, a, b)


def test_large_products_of_integers_are_refused() -> None:
    with refused("a large matrix product in int64"):
        check(torch.mm, torch.zeros(1000, 1000, dtype=torch.int64), torch.zeros(1000, 1000, dtype=torch.int64))


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "transposed": (lambda a, b: a @ b.t(), ((3, 4), (5, 4))),
    "both transposed": (lambda a, b: a.mT @ b.mT, ((2, 4, 3), (2, 5, 4))),
    "linear": (F.linear, ((2, 3, 4), (5, 4), (5,))),
    "linear of a vector": (F.linear, ((4,), (5, 4), (5,))),
    "linear without bias": (F.linear, ((2, 4), (5, 4))),
    "addmm": (torch.addmm, ((5,), (3, 4), (4, 5))),
    "addmm scaled": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), ((3, 5), (3, 4), (4, 5))),
    "addmv": (lambda c, a, b: torch.addmv(c, a, b, beta=0.5, alpha=2), ((3,), (3, 4), (4,))),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "baddbmm broadcast": (torch.baddbmm, ((5,), (2, 3, 4), (2, 4, 5))),
    "addbmm": (lambda c, a, b: torch.addbmm(c, a, b, beta=2, alpha=3), ((3, 5), (2, 3, 4), (2, 4, 5))),
    "addr": (lambda c, a, b: torch.addr(c, a, b, beta=2, alpha=3), ((3, 4), (3,), (4,))),
    "dot": (torch.dot, ((4,), (4,))),
    "vdot": (torch.vdot, ((4,), (4,))),
    "outer": (torch.outer, ((3,), (4,))),
    "inner": (torch.inner, ((2, 3, 4), (5, 4))),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), ((2, 3, 4), (2, 5, 4))),
    "einsum of heads": (lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b), ((2, 3, 4, 5), (2, 6, 4, 5))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), ((2, 3, 4), (3, 4, 5))),
    "bilinear": (F.bilinear, ((2, 3), (2, 4), (5, 3, 4), (5,))),
    "cdist": (torch.cdist, ((2, 3, 4), (2, 5, 4))),
    "cdist of many": (torch.cdist, ((30, 4), (28, 4))),
    "cdist, p of 1": (lambda a, b: torch.cdist(a, b, p=1.0), ((3, 4), (5, 4))),
    "cdist, p of infinity": (lambda a, b: torch.cdist(a, b, p=math.inf), ((3, 4), (5, 4))),
    "chained": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), ((2, 3), (3, 4), (4, 5))),
}


@both
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dynamic: bool) -> None:
    function, shapes = PRODUCTS[name]
    check(function, *(random(*shape, seed=i) for i, shape in enumerate(shapes)), dynamic=dynamic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    a, b, c = random(3, 4).to(dtype), random(4, 5).to(dtype), random(5).to(dtype)
    check(
        lambda a, b, c: (a @ b, torch.addmm(c, a, b), torch.addmm(c, a, b, beta=2, alpha=0.5)),
        a,
        b,
        c,
        rtol=2e-2,
        atol=2e-2,
    )


def test_a_beta_of_zero_leaves_nan_out() -> None:
    nan = torch.full((3, 5), math.nan)
    check(lambda c, a, b: torch.addmm(c, a, b, beta=0), nan, random(3, 4), random(4, 5))


def test_pdist() -> None:
    check(torch.pdist, random(5, 3))
    check(lambda x: torch.pdist(x, p=1.0), random(1, 3))
    with refused("symbolic number of rows"):
        check(torch.pdist, random(5, 3), dynamic=True)


def test_a_transpose_is_read_by_the_product() -> None:
    """So that the weight stands in the network as torch has it, and can be refitted."""
    (made,) = check(F.linear, random(3, 4), random(5, 4), random(5)).networks
    layers = [made.network.raw.get_layer(i) for i in range(made.network.raw.num_layers)]
    (product,) = (layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY)
    assert product.get_input(1).is_network_input
    product.__class__ = trt.IMatrixMultiplyLayer
    assert product.op1 == trt.MatrixOperation.TRANSPOSE
