"""Tensors of subclasses that carry no data of their own, as arguments, weights and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiled import assert_same, compiled


class Image(torch.Tensor):
    """Like torchvision's `tv_tensors.Image`: a name for a tensor, which results of its ops have too."""


class Scale(nn.Parameter):
    """A parameter with a class of its own, as quantizers have."""


def written(x: Tensor) -> tuple[Tensor, ...]:
    x[1:].mul_(2)
    x.t()[0] = 3.0
    return x.sin(), x[0], x


def turned(x: Tensor) -> Tensor:
    x.t_()
    return torch.erfinv(x) + 1


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "computed and viewed": lambda x: (x * 2 + 1, x[0], x, x.t(), x.as_subclass(torch.Tensor) + 1),
    "read by eager": lambda x: (torch.erfinv(x) + 1, torch.erfinv(x).exp()),
    "beside plain ones": lambda x: (torch.ones(4) + x, torch.erfinv(x).sum(0), torch.zeros(2)),
    "written": written,
    "turned": turned,
}


@pytest.mark.parametrize("options", [{}, {"compile": "background"}], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_with_a_class(name: str, options: dict[str, Any]) -> None:
    f = CALLS[name]
    fast = compiled(f, eager_ops="aten.erfinv", **options)
    with torch.no_grad():
        for x in (torch.rand(3, 4), torch.rand(3, 4)):
            ours, its = x.clone().as_subclass(Image), x.clone().as_subclass(Image)
            found, expected = fast(ours), f(its)
            assert [type(y) for y in found] == [type(y) for y in expected]
            assert_same((found, ours), (expected, its))


def test_a_parameter_with_a_class() -> None:
    model = nn.Linear(4, 3).eval()
    model.weight = Scale(model.weight.detach())
    fast = compiled(model, eager_ops="aten.t")
    x = torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), model(x))
            model.weight.data.mul_(2)
