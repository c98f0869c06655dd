"""Windows added where they overlap: the gradient of `unfold`, which is also the end of an inverse Fourier transform."""

from __future__ import annotations

import pytest
import torch

from trt_dynamo.testing import check

unfold_backward = torch.ops.aten.unfold_backward.default


@pytest.mark.parametrize(
    ("sizes", "dim", "size", "step", "most_layers"),
    [
        ((3, 20), 1, 6, 2, 16),
        ((3, 20), 1, 6, 4, 16),  # the last piece of a window is shorter
        ((4, 23, 2), 1, 5, 3, 20),  # some elements lie in no window
        ((17, 2), -2, 3, 5, 16),  # and here between windows
        ((12,), 0, 12, 1, 60),
        ((2, 4096), 1, 512, 128, 20),
        ((3, 200), 1, 130, 2, 200),  # more pieces than are worth it
    ],
)
def test_windows_add_up(sizes: tuple[int, ...], dim: int, size: int, step: int, most_layers: int) -> None:
    windows = torch.randn(torch.empty(sizes).unfold(dim, size, step).shape)
    checked = check(lambda w: unfold_backward(w, sizes, dim, size, step) * 2, windows)
    assert checked.layers <= most_layers


def test_any_number_of_windows() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        windows: torch.Tensor = unfold_backward(x.unfold(1, 4, 2).cos(), x.shape, 1, 4, 2)
        return windows

    check(function, torch.randn(3, 10), dynamic=True, also=[[torch.randn(5, 15)], [torch.randn(2, 4)]])


def test_in_half_precision() -> None:
    windows = torch.randn(2, 9, 4, dtype=torch.float16)
    check(lambda w: unfold_backward(w, (2, 20), 1, 4, 2), windows, rtol=1e-3, atol=1e-3)
