"""Reductions and scans against eager: every dim, NaN, ties, empty dims, all dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trt_dynamo.testing import check

both = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])

NAN = torch.tensor(
    [
        [1.0, math.nan, 2.0, 3.0],
        [3.0, -math.inf, 3.0, math.inf],
        [-0.0, 0.0, -1.0, -1.0],
        [math.nan, math.inf, math.nan, 1.0],
    ]
)
TIES = torch.tensor([[1, 3, 3, 0], [2, 2, 2, 2], [0, -5, -5, 0], [7, 1, 7, 1]])


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 10, shape, generator=generator, dtype=dtype)


REDUCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name) for name in "sum mean amax amin logsumexp any all count_nonzero nansum std var".split()
}
WITHOUT_KEEPDIM = ("count_nonzero",)


@both
@pytest.mark.parametrize("name", REDUCTIONS)
def test_over_each_dim(name: str, dynamic: bool) -> None:
    function, x = REDUCTIONS[name], sample(torch.float32, 2, 3, 4)
    for dims in (0, -1, (0, 2), (-1, 1), (2, 0, 1)):
        check(lambda x, d=dims: function(x, dim=d), x, dynamic=dynamic, build_engines=dims == 0)
        if name not in WITHOUT_KEEPDIM:
            check(lambda x, d=dims: function(x, dim=d, keepdim=True), x, dynamic=dynamic, build_engines=dims == (0, 2))


TOTALS: dict[str, Callable[[torch.Tensor], Any]] = {
    name: getattr(torch, name)
    for name in "sum mean prod amax amin max min argmax argmin any all std var count_nonzero".split()
}


@both
@pytest.mark.parametrize("name", TOTALS)
def test_over_all(name: str, dynamic: bool) -> None:
    for shape in ((), (1,), (5,), (2, 3)):
        if name not in ("std", "var") or shape not in ((), (1,)):
            check(TOTALS[name], sample(torch.float32, *shape), dynamic=dynamic, build_engines=shape == (2, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool])
def test_of_integers(dtype: torch.dtype) -> None:
    x = sample(dtype, 3, 4)
    check(lambda x: (x.sum(), x.sum(1), x.prod(0), x.amax(1), x.amin(0, True), x.any(1), x.all(0), x.any(), x.all()), x)
    check(lambda x: (x.max(1).values, x.min(0), torch.cumsum(x, 1)), x)
    check(lambda x: (x.sum(dtype=torch.float32), x.float().mean()), x)
    if dtype is not torch.bool:
        check(lambda x: (x.argmax(1), x.argmin(), x.max(), torch.cummax(x, 0)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_add_up_in_float32(dtype: torch.dtype) -> None:
    x = sample(dtype, 4, 50)
    check(
        lambda x: (x.sum(1), x.mean(1), x.var(1), x.std(1), x.logsumexp(1), x.amax(1), x.norm(dim=1)),
        x,
        rtol=1e-2,
        atol=1e-2,
    )
    check(lambda x: (x * 100).mean(), torch.full((2000,), 60.0, dtype=dtype))
    check(lambda x: (torch.cumsum(x, 0), torch.cumprod(x, 1)), x[:, :8], rtol=1e-2, atol=1e-2)
    check(lambda x: (x.sum(1, dtype=torch.float32), x.mean(dtype=torch.float32)), x, rtol=1e-4, atol=1e-4)


@both
def test_nan_goes_through(dynamic: bool) -> None:
    check(lambda x: (x.amax(0), x.amin(1), x.max(), x.min(), x.aminmax(dim=1), x.amax((0, 1))), NAN, dynamic=dynamic)
    check(
        lambda x: (x.max(0), x.min(1), x.argmax(1), x.argmin(0), x.argmax(), x.argmin(1, keepdim=True)),
        NAN,
        dynamic=dynamic,
    )
    check(lambda x: (x.any(1), x.all(0), x.sum(1), x.nansum(1)), NAN, dynamic=dynamic)


@both
def test_of_equal_elements_the_first_counts(dynamic: bool) -> None:
    for dtype in (torch.int64, torch.float32, torch.float16):
        x = TIES.to(dtype)
        check(lambda x: (x.argmax(1), x.argmin(1), x.argmax(0), x.max(1), x.min(0), x.argmax()), x, dynamic=dynamic)


def test_indices_beyond_the_precision_of_floats() -> None:
    x = torch.tensor([[2**53, 2**53 + 1, 2**53 - 1], [-(2**62), -(2**62) - 1, -(2**62) + 1]])
    check(lambda x: (x.argmax(1), x.argmin(1), x.max(1), x.amin(1), x.sum(1)), x)


@both
@pytest.mark.parametrize("unread", ["values", "indices"])
def test_one_of_two_results_is_read(unread: str, dynamic: bool) -> None:
    check(lambda x: getattr(x.max(1), unread), sample(torch.float32, 3, 4), dynamic=dynamic)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
@both
def test_empty_dims(dynamic: bool) -> None:
    x = torch.zeros(0, 3)
    check(lambda x: (x.sum(0), x.prod(0), x.any(0), x.all(0), x.mean(0), x.sum(), x.any(), x.all()), x, dynamic=dynamic)
    check(lambda x: (x.amax(1), x.argmax(1), x.max(1), x.std(1)), x, dynamic=dynamic)


def test_a_list_without_dims() -> None:
    x = sample(torch.float32, 2, 3)
    check(lambda x: (x.sum(()), x.amax(()), x.any(()), x.all(())), x)


# -- statistics and norms ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
@both
@pytest.mark.parametrize("correction", [0, 1, 2, 0.5, 5])
def test_variance(correction: float, dynamic: bool) -> None:
    x = sample(torch.float32, 4, 5) + 100
    check(
        lambda x: (
            x.var(1, correction=correction),
            torch.std_mean(x, 0, correction=correction),
            torch.var_mean(x, correction=correction),
        ),
        x,
        dynamic=dynamic,
        rtol=1e-4,
        atol=1e-5,
    )


@both
@pytest.mark.parametrize("order", [0, 1, 2, 3, 0.5, -1, math.inf, -math.inf])
def test_vector_norms(order: float, dynamic: bool) -> None:
    x = sample(torch.float32, 3, 4)
    function = torch.linalg.vector_norm
    check(
        lambda x: (
            function(x, order),
            function(x, order, 1),
            function(x, order, (0, 1), True),
            torch.dist(x, x * 2, order),
        ),
        x,
        dynamic=dynamic,
    )


def test_other_norms() -> None:
    x = sample(torch.float32, 3, 4)
    check(
        lambda x: (x.norm(), x.norm(1), x.norm(dim=1, keepdim=True), torch.linalg.norm(x), torch.linalg.matrix_norm(x)),
        x,
    )
    check(lambda x: torch.nn.functional.normalize(x, dim=1), x, dynamic=True)
    check(lambda x: torch.renorm(x, 2, 0, 1.0), x)


def test_logsumexp_of_infinities() -> None:
    x = torch.tensor([[-math.inf, -math.inf], [math.inf, 0.0], [1e4, 1e4], [math.nan, 0.0]])
    check(lambda x: (x.logsumexp(1), x.logsumexp((0, 1)), x.logsumexp(0, keepdim=True)), x)


# -- scans -------------------------------------------------------------------------------------------------------------

SCANS: dict[str, Callable[..., Any]] = {
    "cumsum": torch.cumsum,
    "cumprod": torch.cumprod,
    "cummax": torch.cummax,
    "cummin": torch.cummin,
    "logcumsumexp": torch.logcumsumexp,
}


@both
@pytest.mark.parametrize("name", SCANS)
def test_scans(name: str, dynamic: bool) -> None:
    for shape, dim in (((7,), 0), ((2, 9, 3), 1), ((2, 3, 4), -1), ((1, 1), 0), ((), 0)):
        check(lambda x, d=dim: SCANS[name](x, d), sample(torch.float32, *shape), dynamic=dynamic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_scans_of_nan_and_equal_elements(name: str) -> None:
    check(lambda x: (SCANS[name](x, 1), SCANS[name](x, 0)), NAN)
    check(lambda x: (SCANS[name](x, 1), SCANS[name](x, 0)), TIES)


def test_scans_of_integers() -> None:
    check(lambda x: (x.cumsum(0), x.cumprod(1), x.cumsum(1, dtype=torch.float32)), TIES)
    check(lambda x: x.cumsum(0), torch.tensor([True, False, True]))
