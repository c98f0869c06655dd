"""The core ATen overloads that have no converter of their own, because what they are taken apart into has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trt_dynamo.cli.operators_page import core_overloads, way_of
from trt_dynamo.testing import check

aten = torch.ops.aten

x, image = torch.randn(3, 4), torch.randn(2, 4, 6, 8)
ones, zeros = torch.ones(4), torch.zeros(4)
mean, rstd = torch.randn(3, 1), torch.rand(3, 1) + 0.5

CASES: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    aten._fft_c2r.default: (lambda x: aten._fft_c2r(aten._fft_r2c(x, [1], 0, True), [1], 2, 8), (torch.randn(3, 8),)),
    aten._fft_r2c.default: (lambda x: torch.view_as_real(aten._fft_r2c(x, [1], 0, True)), (torch.randn(3, 8),)),
    aten._native_batch_norm_legit.default: (
        lambda x: aten._native_batch_norm_legit(x, ones, zeros, x.new_zeros(4), x.new_ones(4), True, 0.1, 1e-5)[0],
        (image,),
    ),
    aten.adaptive_avg_pool1d.default: (lambda x: aten.adaptive_avg_pool1d(x, [3]), (torch.randn(2, 3, 7),)),
    aten.atan2.out: (lambda a, b: torch.atan2(a, b, out=torch.empty(3, 4)) + 1, (x, x.flip(0))),
    aten.avg_pool1d.default: (lambda x: aten.avg_pool1d(x, [3], [2], [1], True, False), (torch.randn(2, 3, 7),)),
    aten.col2im.default: (
        lambda x: aten.col2im(x, [5, 6], [2, 3], [1, 1], [1, 0], [2, 1]),
        (torch.randn(2, 18, 12),),
    ),
    aten.embedding_dense_backward.default: (
        lambda grad, index: aten.embedding_dense_backward(grad, index, 10, 3, False),
        (torch.randn(5, 4), torch.tensor([1, 3, 9, 1, 0])),
    ),
    aten.fill.Scalar: (lambda x: aten.fill.Scalar(x, 2.5), (x,)),
    aten.native_group_norm_backward.default: (
        lambda g, x, m, r: aten.native_group_norm_backward(g, x, m, r, ones, 2, 4, 48, 2, [True, True, True]),
        (torch.randn(2, 4, 6, 8), image, torch.randn(2, 2), torch.rand(2, 2) + 0.5),
    ),
    aten.native_layer_norm_backward.default: (
        lambda g, x: aten.native_layer_norm_backward(g, x, [4], mean, rstd, ones, zeros, [True, True, True]),
        (torch.randn(3, 4), x),
    ),
    aten.var.dim: (lambda x: aten.var.dim(x, [1], True, True), (x,)),
}

# Their arguments hold sizes: no other ones fit.
FIXED = {op for op in CASES if op.overloadpacket in (aten._fft_c2r, aten._fft_r2c, aten.col2im)}
FIXED.add(aten.native_group_norm_backward.default)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", CASES, ids=str)
def test_what_an_operator_is_taken_apart_into_has_converters(op: Any, dynamic: bool) -> None:
    function, args = CASES[op]
    check(function, *args, dynamic=dynamic and op not in FIXED, rtol=1e-4, atol=1e-5)


def test_they_are_all_here() -> None:
    assert {op for op in core_overloads() if way_of(op) == "decomposed"} == set(CASES)
