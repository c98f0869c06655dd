"""Tensors from numbers and sizes against eager."""

from __future__ import annotations

import torch

from tests.converter_cases import Case, case, numbers, run, table
from trt_dynamo.testing import check

x = numbers(4, 6, 9)

CASES: dict[str, Case] = {
    "full": case(lambda x: torch.full((2, x.shape[1]), 3.0) + 1, x),
    "full_of_size": case(lambda x: torch.full((2, 3), x.shape[1]) + 1, x),
    "full_bool": case(lambda x: torch.full(x.shape, True) & (x > 0), x),
    "full_like": case(lambda x: torch.full_like(x, -1.5) + torch.full_like(x, 7, dtype=torch.int32), x),
    "full_infinite": case(lambda x: torch.full_like(x, float("-inf")).triu(1) + x, x[0]),
    "full_scalar": case(lambda x: torch.full((), 2.5) * x, x),
    "full_empty": case(lambda x: torch.full((0, 3), 2.5) + 1, x),
    "zeros_ones": case(lambda x: torch.zeros_like(x) + torch.ones_like(x, dtype=torch.int64), x),
    "new": case(lambda x: x.new_full((3, 2), 7) + x.new_zeros(2) + x.new_ones(3, 1), x),
    "uint8": case(lambda x: torch.full((2, 3), 250, dtype=torch.uint8) + x, torch.tensor(9, dtype=torch.uint8)),
    "scalar_tensor": case(lambda x: torch.scalar_tensor(x.shape[1]) + x, x),
    "arange": case(lambda x: torch.arange(x.shape[1]) + torch.arange(2, 2 + x.shape[1] * 3, 3), x),
    "arange_down": case(lambda x: torch.arange(x.shape[1], 0, -1) + 1, x),
    "arange_float": case(lambda x: torch.arange(0.5, 4.0, 0.7) + 1, x),
    "arange_of_float_dtype": case(lambda x: torch.arange(x.shape[1], dtype=torch.float16) * 0.5, x),
    "arange_int32": case(lambda x: torch.arange(3, x.shape[1] + 3, dtype=torch.int32) + 1, x),
    "arange_long": case(lambda x: torch.arange(100_000)[::1000] + x.shape[0], x),
    "linspace": case(lambda x: torch.linspace(-1, 1, x.shape[1]) + 1, x, fixed=True),
    "eye": case(lambda x: torch.eye(x.shape[1], x.shape[2]) + 1, x),
    "causal_mask": case(lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(), x),
    "positions": case(lambda x: torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1) * 2, x),
    "tril_indices": case(lambda x: torch.tril_indices(4, 5, 1) + torch.tril_indices(4, 5, 1)[0], x),
}


@table(CASES)
def test_creation(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


def test_a_constant_mask_takes_no_space() -> None:
    """What is one number all over is one number in the network too."""
    (network,) = check(lambda x: torch.full((512, 512), 3.0) + x, numbers(512)).networks
    assert max(value.numel() for value in network.constants.values()) == 1
