"""Interpolation and grids against eager: modes, factors that are no ratio of sizes, aligned corners, symbolic sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.compiled import compiled
from tests.converter_cases import Case, case, numbers, run, table, whole_numbers
from trt_dynamo.testing import check, refused

line, plane, space = numbers(2, 3, 7), numbers(2, 3, 5, 8), numbers(2, 3, 4, 5, 6)
near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

MODES = {
    "nearest": (line, plane, space),
    "nearest-exact": (line, plane, space),
    "linear": (line,),
    "bilinear": (plane,),
    "trilinear": (space,),
    "bicubic": (plane,),
}
HOW: dict[str, dict[str, Any]] = {
    "double": {"scale_factor": 2},
    "odd_factor": {"scale_factor": 1.3},
    "odd_factor_recomputed": {"scale_factor": 1.3, "recompute_scale_factor": True},
    "half": {"scale_factor": 0.5},
    "size": {"size": 9},
    "smaller": {"size": 3},
    "one": {"size": 1},
}


def cases() -> dict[str, Case]:
    found = {}
    for (mode, inputs), (how, arguments) in itertools.product(MODES.items(), HOW.items()):
        for x, align in itertools.product(inputs, (None,) if mode.startswith("nearest") else (False, True)):

            def function(
                x: torch.Tensor, mode: str = mode, align: Any = align, arguments: Any = arguments
            ) -> torch.Tensor:
                return F.interpolate(x, mode=mode, align_corners=align, **arguments)

            cubic = mode == "bicubic" and not align and how in ("odd_factor", "half")
            found[f"{mode}_{x.ndim - 2}d_{how}{'_aligned' if align else ''}"] = case(
                function, x, dynamic=not cubic, **near
            )
    return found


@table(cases())
def test_interpolate(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


OTHERS: dict[str, Case] = {
    "size_of_another": case(
        lambda x, y: F.interpolate(x, size=y.shape[1:], mode="bilinear"), plane, numbers(4, 9, 10), **near
    ),
    "size_computed": case(lambda x: F.interpolate(x, size=(x.shape[2] * 2 - 1, 7)), plane, **near),
    "uneven_factors": case(lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear"), plane, **near),
    "uint8": case(lambda x: F.interpolate(x, scale_factor=2), whole_numbers(255, 2, 3, 4, 5).to(torch.uint8)),
    "module": case(torch.nn.Upsample(scale_factor=2, mode="bilinear"), plane, **near),
    "antialias": case(
        lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True), plane, dynamic=False, **near
    ),
    "antialias_cubic": case(
        lambda x: F.interpolate(x, scale_factor=0.3, mode="bicubic", antialias=True),
        numbers(2, 3, 9, 10),
        dynamic=False,
        **near,
    ),
    "affine_grid": case(
        lambda t, x: F.grid_sample(x, F.affine_grid(t, list(x.shape), align_corners=False), align_corners=False),
        numbers(2, 2, 3),
        plane,
        fixed=True,
        **near,
    ),
}


@table(OTHERS)
def test_other_forms(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", [{"scale_factor": 2}, {"scale_factor": 1.3}], ids=["double", "odd"])
def test_low_floats(dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    for mode in ("nearest", "bilinear"):
        check(lambda x, m=mode: F.interpolate(x, mode=m, **arguments), plane.to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("align", [False, True], ids=["centers", "corners"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample(mode: str, padding: str, align: bool) -> None:
    grid = numbers(2, 4, 6, 2, seed=3)
    check(lambda x, g: F.grid_sample(x, g, mode, padding, align), plane, grid, dynamic=True, **near)


@pytest.mark.parametrize(("mode", "padding"), [("bilinear", "zeros"), ("nearest", "border")])
def test_grid_sample_in_space(mode: str, padding: str) -> None:
    grid = numbers(2, 4, 6, 3, 3, seed=3)
    check(lambda x, g: F.grid_sample(x, g, mode, padding, False), space, grid, dynamic=True, **near)


def test_what_is_refused() -> None:
    with refused("interpolation of uint8"):
        check(lambda x: F.interpolate(x, size=3, mode="bilinear"), whole_numbers(255, 2, 3, 4, 5).to(torch.uint8))
    with refused("bicubic interpolation by 1.3 of a symbolic dim"):
        check(lambda x: F.interpolate(x, scale_factor=1.3, mode="bicubic"), plane, dynamic=True)


@pytest.mark.parametrize("factor", [2, 1.5])
def test_through_the_backend(factor: float) -> None:
    """The backend keeps `interpolate` whole, with a batch and sizes that change from call to call."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(F.pad(x, (1, 1, 1, 1), mode="circular"), scale_factor=factor, mode="bilinear") * 2

    model = compiled(function, dynamic=True)
    for shape in ((2, 3, 5, 8), (4, 3, 7, 6), (3, 3, 12, 9)):
        x = numbers(*shape)
        torch.testing.assert_close(model(x), function(x), **near)


# Called by themselves, with symbolic sizes, torch takes them apart before we see them.
KERNELS: dict[str, Case] = {
    "nearest1d": case(lambda x: torch.ops.aten.upsample_nearest1d(x, [9], 1.3), line, dynamic=False),
    "nearest2d": case(lambda x: torch.ops.aten.upsample_nearest2d(x, [9, 5]), plane, dynamic=False),
    "nearest2d_vec": case(lambda x: torch.ops.aten.upsample_nearest2d.vec(x, None, [2.0, 1.5]), plane, dynamic=False),
    "nearest_exact3d": case(lambda x: torch.ops.aten._upsample_nearest_exact3d(x, [9, 5, 3]), space, dynamic=False),
    "bilinear2d": case(
        lambda x: torch.ops.aten.upsample_bilinear2d(x, [6, 9], False, 1.3, None), plane, dynamic=False, **near
    ),
    "bilinear2d_vec": case(
        lambda x: torch.ops.aten.upsample_bilinear2d.vec(x, [6, 9], True, None), plane, dynamic=False, **near
    ),
    "bicubic2d": case(lambda x: torch.ops.aten.upsample_bicubic2d(x, [6, 9], True), plane, dynamic=False, **near),
    "trilinear3d": case(
        lambda x: torch.ops.aten.upsample_trilinear3d(x, [6, 9, 3], False), space, dynamic=False, **near
    ),
}


@table(KERNELS)
def test_kernels(case: Case, dynamic: bool) -> None:
    run(case, dynamic)
