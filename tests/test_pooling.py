"""Pooling and padding against eager: each argument with each other, windows of every kind, indices, dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.converter_cases import Case, case, numbers, run, table, whole_numbers
from trt_dynamo.testing import check, refused


def unit(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def fractional(dims: int) -> torch._ops.OpOverload:
    return {2: torch.ops.aten.fractional_max_pool2d.default, 3: torch.ops.aten.fractional_max_pool3d.default}[dims]


plane = numbers(2, 3, 9, 11)
line, space = numbers(2, 3, 11), numbers(2, 3, 5, 6, 7)

MAXIMA: dict[str, Case] = {
    "max": case(lambda x: F.max_pool2d(x, 3, 2, 1), plane),
    "max_uneven": case(lambda x: F.max_pool2d(x, (2, 3), (3, 1), (1, 0)), plane),
    "max_default_stride": case(lambda x: F.max_pool2d(x, 2), plane),
    "max_unbatched": case(lambda x: F.max_pool2d(x, 3, 2, 1), plane[0]),
    "max_channels_last": case(
        lambda x: F.max_pool2d(x, 3, 2, 1), plane.to(memory_format=torch.channels_last), fixed=True
    ),
    "max_ceil": case(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), numbers(2, 3, 10, 13)),
    "max_ceil_drops_a_window": case(
        lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True), numbers(2, 3, 7, 10), fixed=True
    ),
    "max_ceil_of_points": case(lambda x: F.max_pool2d(x, 1, 2, ceil_mode=True), numbers(2, 3, 7, 10), fixed=True),
    "max_dilated": case(lambda x: F.max_pool2d(x, 3, 1, 1, dilation=2), plane),
    "max_dilated_ceil": case(lambda x: F.max_pool2d(x, 2, 3, 1, dilation=3, ceil_mode=True), plane, fixed=True),
    "max_indices": case(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), plane),
    "max_indices_of_equal": case(lambda x: F.max_pool2d(x, 3, 1, return_indices=True), plane.round()),
    "max_indices_ceil": case(
        lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True, return_indices=True), plane, fixed=True
    ),
    "max_unpool": case(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]), numbers(2, 3, 4, 6)),
    "max_1d": case(lambda x: F.max_pool1d(x, 3, 2, 1), line, fixed=True),
    "max_1d_indices": case(lambda x: F.max_pool1d(x, 3, 2, 1, return_indices=True), line),
    "max_3d": case(lambda x: F.max_pool3d(x, 2, 2, 1, ceil_mode=True), space, fixed=True),
    "max_3d_indices": case(lambda x: F.max_pool3d(x, 2, 2, 1, return_indices=True), space),
    "max_int64": case(lambda x: F.max_pool2d(x, 3, 2, 1), whole_numbers(99, 2, 3, 9, 11, low=-99)),
    "max_uint8": case(lambda x: F.max_pool2d(x, 3, 2, 1), whole_numbers(255, 2, 3, 9, 11).to(torch.uint8)),
    "adaptive_max": case(lambda x: F.adaptive_max_pool2d(x, (4, 7)), plane),
    "adaptive_max_even": case(lambda x: F.adaptive_max_pool2d(x, (3, 11)), plane, fixed=True),
    "adaptive_max_whole": case(lambda x: F.adaptive_max_pool2d(x, 1), plane),
    "adaptive_max_one_dim": case(lambda x: F.adaptive_max_pool2d(x, [x.shape[2], 3]), plane, fixed=True),
    "adaptive_max_indices": case(lambda x: F.adaptive_max_pool2d(x, (4, 7), return_indices=True), plane),
    "adaptive_max_1d": case(lambda x: F.adaptive_max_pool1d(x, 4), line),
    "adaptive_max_3d_indices": case(lambda x: F.adaptive_max_pool3d(x, (2, 3, 4), return_indices=True), space),
}


@table(MAXIMA)
def test_maxima(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


AVERAGES: dict[str, Case] = {
    **{
        f"stride{stride}_padding{padding}{'_ceil' if ceil else ''}{'_counted' if counted else ''}_{divisor}": case(
            lambda x, size=size, stride=stride, padding=padding, ceil=ceil, counted=counted, divisor=divisor: (
                F.avg_pool2d(x, size, stride, padding, ceil, counted, divisor)
            ),
            numbers(2, 3, 7, 10),
            fixed=True,
        )
        for (size, stride, padding), ceil, counted, divisor in itertools.product(
            ((3, 2, 1), (2, 3, 1), (2, 3, 0)), (True, False), (True, False), (None, 5)
        )
    },
    "other_sizes": case(lambda x: F.avg_pool2d(x, 3, 2, 1), plane),
    "1d": case(lambda x: F.avg_pool1d(x, 3, 2, 1), line),
    "1d_ceil": case(lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True), numbers(2, 3, 12), fixed=True),
    "3d": case(lambda x: F.avg_pool3d(x, 2, 2, 1, ceil_mode=True), space, fixed=True),
    "unbatched": case(lambda x: F.avg_pool2d(x, 3), plane[0]),
    "powers": case(lambda x: F.lp_pool2d(x, 2, 3, 2), plane.abs()),
    "adaptive": case(lambda x: F.adaptive_avg_pool2d(x, (4, 7)), plane, rtol=1e-4, atol=1e-5),
    "adaptive_even": case(lambda x: F.adaptive_avg_pool2d(x, (3, 11)), plane, fixed=True),
    "adaptive_whole": case(lambda x: F.adaptive_avg_pool2d(x, 1), plane),
    "adaptive_larger": case(lambda x: F.adaptive_avg_pool2d(x, (12, 9)), plane, rtol=1e-4, atol=1e-5),
    "adaptive_of_one": case(lambda x: F.adaptive_avg_pool2d(x, (3, 4)), numbers(2, 3, 1, 6), rtol=1e-4, atol=1e-5),
    "adaptive_one_dim": case(lambda x: F.adaptive_avg_pool2d(x, (None, 3)), plane, rtol=1e-4, atol=1e-5),
    "adaptive_1d": case(lambda x: F.adaptive_avg_pool1d(x, 4), line, rtol=1e-4, atol=1e-5),
    "adaptive_3d": case(lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4)), space, rtol=1e-4, atol=1e-5),
    "area": case(lambda x: F.interpolate(x, size=(4, 5), mode="area"), plane, rtol=1e-4, atol=1e-5),
}


@table(AVERAGES)
def test_averages(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_floats(dtype: torch.dtype) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.max_pool2d(x, 3, 2), F.avg_pool2d(x, 3, 2), F.adaptive_avg_pool2d(x, 4), F.adaptive_max_pool2d(x, 4)

    check(function, plane.to(dtype), rtol=2e-2, atol=2e-2)


def test_indices_of_nan() -> None:
    x = plane.clone()
    x[0, 0, 2, 3] = float("nan")
    check(lambda x: F.max_pool2d(x, 3, 2, return_indices=True), x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_indices_of_several_nans_and_of_equal_values(dynamic: bool) -> None:
    x = numbers(2, 3, 9, 11).masked_fill(numbers(2, 3, 9, 11) > 0.8, float("nan"))
    check(lambda x: F.adaptive_max_pool2d(x, (4, 5), return_indices=True), x, dynamic=dynamic)
    check(lambda x: F.adaptive_max_pool2d(x, (4, 5)), x, dynamic=dynamic)
    check(lambda x: F.adaptive_max_pool2d(x, (4, 5), return_indices=True), x.sign(), dynamic=dynamic)


FRACTIONS: dict[str, Case] = {
    "two_dims": case(lambda x, s: fractional(2)(x, [2, 3], [4, 5], s), plane, unit(2, 3, 2), fixed=True),
    "one_window": case(lambda x, s: fractional(2)(x, [2, 3], [1, 9], s), plane, unit(2, 3, 2), fixed=True),
    "unbatched": case(lambda x, s: fractional(2)(x, [3, 3], [4, 5], s), plane[0], unit(1, 3, 2), fixed=True),
    "three_dims": case(lambda x, s: fractional(3)(x, [2, 2, 3], [3, 4, 2], s), space, unit(2, 3, 3), fixed=True),
}


@table(FRACTIONS)
def test_fractional(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


def test_what_is_refused() -> None:
    with refused("averages of integers"):
        check(lambda x: F.avg_pool2d(x, 2), whole_numbers(9, 1, 1, 4, 4))
    with refused("a window of 81 elements"):
        check(lambda x: F.max_pool2d(x, 9, 1, return_indices=True), plane)


PADDINGS: dict[str, Case] = {
    "constant": case(lambda x: F.pad(x, (1, 2, -1, 3), value=2.0), plane),
    "constant_bool": case(lambda x: F.pad(x > 0, (1, 2), value=True), plane),
    "constant_int": case(lambda x: F.pad(x, (1, 2, -1, 3, 1, 1), value=2), whole_numbers(99, 2, 3, 4)),
    "constant_uint8": case(lambda x: F.pad(x, (1, 2)), whole_numbers(99, 3, 4).to(torch.uint8)),
    "constant_infinite": case(lambda x: F.pad(x, (0, 1), value=float("-inf")), plane),
    "constant_symbolic": case(lambda x: F.pad(x, (0, x.shape[2] - 2)), plane),
    "constant_cuts": case(lambda x: F.pad(x, (-1, -2, -3, 0)), plane),
    "constant_of_empty": case(lambda x: F.pad(x, (1, 2), value=3.0) + 1, numbers(2, 0)),
    "constant_float16": case(lambda x: F.pad(x, (1, 2)), plane.half()),
    "reflect": case(lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"), plane),
    "reflect_1d": case(lambda x: F.pad(x, (4, 3), mode="reflect"), line),
    "reflect_3d": case(lambda x: F.pad(x, (1, 2, 3, 1, 1, 1), mode="reflect"), space),
    "replicate": case(lambda x: F.pad(x, (1, 2, 30, 1), mode="replicate"), plane),
    "replicate_1d": case(lambda x: F.pad(x, (1, 2), mode="replicate"), line),
    "replicate_3d": case(lambda x: F.pad(x, (1, 2, 3, 1, 1, 1), mode="replicate"), space),
    "circular": case(lambda x: F.pad(x, (1, 2, 3, 1), mode="circular"), plane),
    "circular_1d": case(lambda x: F.pad(x, (11, 2), mode="circular"), line),
    "circular_cuts_first": case(lambda x: F.pad(x, (-1, 1, -2, 1), mode="circular"), plane),
    "circular_3d": case(lambda x: F.pad(x, (1, 2, 3, 1, 1, 1), mode="circular"), space),
}


@table(PADDINGS)
def test_padding(case: Case, dynamic: bool) -> None:
    run(case, dynamic)
