"""Convolutions against eager: every argument, every float dtype, weights as constants and as inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.converter_cases import Case, case, numbers, run, table
from trt_dynamo.testing import check, refused

TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 5e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 2e-1},
}

LINE, PLANE, SPACE = (2, 4, 11), (2, 4, 9, 10), (2, 4, 5, 6, 7)


def of(weight: tuple[int, ...], function: Callable[..., Any], x: tuple[int, ...], bias: int = 0, **more: Any) -> Case:
    """A case whose weight and bias are constants of the network, as a model's are."""
    return case(Weighted(weight, function, bias), numbers(*x), **{"kept": (1,), **TOLERANCE[torch.float32], **more})


class Weighted:
    def __init__(self, weight: tuple[int, ...], function: Callable[..., Any], bias: int) -> None:
        self.weight = numbers(*weight, seed=1)
        self.bias = numbers(bias, seed=2) if bias else None
        self.function = function

    def __call__(self, x: torch.Tensor) -> Any:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.function(x, self.weight.to(x.dtype), bias)


CASES: dict[str, Case] = {
    "1d": of((8, 4, 3), lambda x, w, b: F.conv1d(x, w, b, 2, 1), LINE, 8),
    "1d_dilated": of((8, 2, 3), lambda x, w, b: F.conv1d(x, w, b, 1, 2, 3, 2), LINE, 8),
    "2d": of((8, 4, 3, 3), lambda x, w, b: F.conv2d(x, w, b, 2, 1), PLANE, 8),
    "2d_point": of((8, 4, 1, 1), lambda x, w, b: F.conv2d(x, w, b), PLANE, 8),
    "2d_uneven": of((8, 4, 3, 2), lambda x, w, b: F.conv2d(x, w, b, (1, 2), (2, 1), (2, 3)), PLANE),
    "2d_groups": of((8, 2, 3, 3), lambda x, w, b: F.conv2d(x, w, b, groups=2), PLANE, 8),
    "2d_depthwise": of((4, 1, 3, 3), lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=4), PLANE, 4),
    "2d_same": of((8, 4, 3, 3), lambda x, w, b: F.conv2d(x, w, b, padding="same"), PLANE, 8),
    "2d_unbatched": of((8, 4, 3, 3), lambda x, w, b: F.conv2d(x, w, b, 2, 1), PLANE[1:], 8, kept=(0,)),
    "2d_empty_batch": of((8, 4, 3, 3), lambda x, w, b: F.conv2d(x, w, b), (0, 4, 9, 10), 8, fixed=True),
    "3d": of((8, 4, 3, 2, 1), lambda x, w, b: F.conv3d(x, w, b, 2, 1), SPACE, 8),
    "transposed_1d": of((4, 8, 3), lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), LINE, 8),
    "transposed_2d": of((4, 8, 3, 3), lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1), PLANE, 8),
    "transposed_2d_output_padding": of(
        (4, 8, 3, 3), lambda x, w, b: F.conv_transpose2d(x, w, b, 3, 1, (1, 2)), PLANE, 8
    ),
    "transposed_2d_beyond_the_kernel": of((4, 8, 2, 2), lambda x, w, b: F.conv_transpose2d(x, w, b, 3, 0, 2), PLANE, 8),
    "transposed_2d_beyond_no_bias": of((4, 8, 2, 2), lambda x, w, b: F.conv_transpose2d(x, w, b, 3, 0, 2), PLANE),
    "transposed_2d_groups": of((4, 3, 3, 3), lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, groups=4), PLANE, 12),
    "transposed_2d_dilated": of((4, 8, 3, 3), lambda x, w, b: F.conv_transpose2d(x, w, b, 1, 1, dilation=2), PLANE, 8),
    "transposed_2d_strided_dilated": of(
        (4, 8, 3, 2), lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, dilation=(2, 3)), PLANE, 8
    ),
    "transposed_3d": of((4, 8, 3, 3, 2), lambda x, w, b: F.conv_transpose3d(x, w, b, 2, 1, 1), SPACE, 8),
}


@table(CASES)
def test_weights_as_constants(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_low_floats(name: str, dtype: torch.dtype) -> None:
    check(CASES[name].function, CASES[name].args[0].to(dtype), **TOLERANCE[dtype])  # type: ignore[arg-type]


def test_weights_as_inputs() -> None:
    x, weight, bias = numbers(*PLANE), numbers(8, 4, 3, 3), numbers(8)
    check(lambda x, w, b: F.conv2d(x, w, b, 2, 1), x, weight, bias, **TOLERANCE[torch.float32])  # type: ignore[arg-type]
    check(lambda x, w: F.conv_transpose2d(x, w), x, weight.transpose(0, 1).contiguous(), rtol=1e-4, atol=1e-4)


def test_each_weight_is_one_constant_in_its_own_layout() -> None:
    module = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.ConvTranspose1d(8, 2, 3, 2)).eval()
    (network,) = check(lambda x: module(x), numbers(*LINE), dynamic=True, rtol=1e-4, atol=1e-4).networks
    held = sorted(tuple(value.shape) for value in network.constants.values() if value.is_floating_point())
    assert held == sorted(tuple(parameter.shape) for parameter in module.parameters())


def test_what_is_refused() -> None:
    with refused("convolution of int64"):
        check(lambda x, w: F.conv2d(x, w), torch.ones(1, 1, 4, 4).long(), torch.ones(1, 1, 2, 2).long())
    with refused("a symbolic kernel"):
        check(lambda x, w: F.conv2d(x, w), numbers(*PLANE), numbers(8, 4, 3, 2), dynamic=True)


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("transposed", [F.conv_transpose1d, F.conv_transpose2d])
def test_a_strided_transposed_convolution_with_a_bias_in_bfloat16(
    transposed: Callable[..., torch.Tensor], output_padding: int
) -> None:
    """RTX's builder fails at it when the layer itself has the bias."""
    dims = 1 if transposed is F.conv_transpose1d else 2
    x, weight, bias = numbers(2, 3, *[4] * dims), numbers(3, 3, *[3] * dims), numbers(3)
    args = [t.bfloat16() for t in (x, weight, bias)]
    check(lambda x, w, b: transposed(x, w, b, 2, 1, output_padding), *args, rtol=5e-2, atol=5e-2)
