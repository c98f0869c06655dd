"""Views, slices, concatenations against eager: static, and with every dim symbolic at two sizes each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.converter_cases import Case, case, numbers, run, table
from trt_dynamo.testing import check, refused, trace

x = numbers(4, 6, 8)
y = numbers(4, 6, seed=1)

SHUFFLES: dict[str, Case] = {
    "view_merge": case(lambda x: x.view(x.shape[0], -1) + 1, x),
    "view_flat": case(lambda x: x.view(-1) + 1, x),
    "view_split": case(lambda x: x.view(2, 2, 6, 8) + 1, x, fixed=True),
    "view_symbolic_split": case(lambda x: x.view(x.shape[0], x.shape[1] // 2, 2, x.shape[2]) + 1, x),
    "view_to_scalar": case(lambda x: x.view(()) + 1, numbers(1, 1)),
    "view_of_scalar": case(lambda x: x.view(1, 1) + 1, numbers()),
    "view_empty": case(lambda x: x.view(3, 0, 2) + 1, numbers(0, 6)),
    "unsafe_view": case(lambda x: torch.ops.aten._unsafe_view(x, [x.shape[0] * 6, 8]) + 1, x, fixed=True),
    "reshape_of_permuted": case(lambda x: x.permute(2, 0, 1).reshape(x.shape[2], -1) + 1, x),
    "permute_contiguous_view": case(lambda x: x.permute(0, 2, 1).contiguous().view(x.shape[0], -1) + 1, x),
    "permute": case(lambda x: x.permute(2, 0, 1) + 1, x),
    "permute_negative": case(lambda x: x.permute(-1, 0, -2) + 1, x),
    "transpose": case(lambda x: x.transpose(-1, 0) + 1, x),
    "transpose_scalar": case(lambda x: x.transpose(0, -1) + 1, numbers()),
    "t": case(lambda x: x.t() + 1, y),
    "t_1d": case(lambda x: x.t() + 1, numbers(5)),
    "movedim": case(lambda x: x.movedim((0, 1), (2, 0)) + 1, x),
    "expand": case(lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1) + 1, x),
    "expand_like": case(lambda x, y: x.unsqueeze(1).expand(-1, y.shape[0], -1, -1) + 1, x, numbers(3, 2)),
    "expand_scalar": case(lambda x, y: x.expand(y.shape) + 1, numbers(), y),
    "expand_to_empty": case(lambda x: x.expand(0, 3) + 1, numbers(1, 3), fixed=True),
    "squeeze_all": case(lambda x: x.squeeze() + 1, numbers(4, 1, 6, 1)),
    "squeeze_dim": case(lambda x: x.squeeze(-1).squeeze(0) + 1, numbers(4, 1, 6, 1)),
    "squeeze_dims": case(lambda x: x.squeeze((1, -1, 0)) + 1, numbers(4, 1, 6, 1)),
    "squeeze_scalar": case(lambda x: x.squeeze(0) + 1, numbers()),
    "unsqueeze": case(lambda x: x.unsqueeze(-1).unsqueeze(1).unsqueeze(0) + 1, x),
    "pixel_shuffle": case(lambda x: torch.pixel_shuffle(x, 2) + 1, numbers(2, 8, 3, 5), fixed=True),
    "pixel_unshuffle": case(lambda x: torch.pixel_unshuffle(x, 2) + 1, numbers(2, 3, 4, 6)),
    "channel_shuffle": case(lambda x: torch.channel_shuffle(x, 2) + 1, numbers(2, 6, 3, 5)),
    "meshgrid": case(lambda a, b: torch.meshgrid(a, b, indexing="xy")[0] + 1, numbers(3), numbers(5)),
    "rot90": case(lambda x: x.rot90(1, (1, 2)) + 1, x),
}


@table(SHUFFLES)
def test_shuffles(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


SLICES: dict[str, Case] = {
    "slice": case(lambda x: x[1:, 2:-1, ::2] + 1, x),
    "slice_from_end": case(lambda x: x[:, -3:] + 1, x),
    "slice_to_from_end": case(lambda x: x[:-2, 1:-3] + 1, x),
    "slice_beyond": case(lambda x: x[:, 3:100] + 1, x),
    "slice_all_beyond": case(lambda x: x[:, 100:] + 1, x, fixed=True),
    "slice_before": case(lambda x: x[-100:, :-100] + 1, x, fixed=True),
    "slice_step_beyond": case(lambda x: x[:, 1::4] + 1, x),
    "slice_symbolic": case(lambda x: x[x.shape[0] - 2 :, : x.shape[1] // 2 + 1] + 1, x),
    "slice_symbolic_negative": case(lambda x: x[-(x.shape[0] // 2) :] + 1, x),
    "slice_empty": case(lambda x: x[2:2] + 1, x),
    "narrow": case(lambda x: x.narrow(1, 2, 3) + 1, x),
    "narrow_copy": case(lambda x: torch.narrow_copy(x, 1, 2, 3) + 1, x),
    "select_first": case(lambda x: x[:, 0] + x[:, -1], x),
    "select_last_dim": case(lambda x: x.select(2, 3) + 1, x),
    "select_of_vector": case(lambda x: x[2] + 1, numbers(5)),
    "select_symbolic": case(lambda x: x[x.shape[0] - 1] + x[x.shape[0] // 2], x, fixed=True),
    "split": case(lambda x: x.split(4, 1)[1] + 1, x),
    "split_all": case(lambda x: [p * 2 for p in x.split(3, 2)], x, fixed=True),
    "split_sizes": case(lambda x: x.split([1, 2, 3], 1)[1] + 1, x, fixed=True),
    "split_symbolic": case(lambda x: x.split([x.shape[2] - 3, 3], 2)[0] + 1, x),
    "chunk": case(lambda x: x.chunk(2, 2)[0] * x.chunk(2, 2)[1], x),
    "tensor_split": case(lambda x: x.tensor_split(3, 1)[1] + 1, x, fixed=True),
    "unbind": case(lambda x: x.unbind(1)[3] + x.unbind(1)[0], x, fixed=True),
    "flip": case(lambda x: x.flip(0, -1), x),
    "flip_empty": case(lambda x: x.flip(0) + 1, numbers(0, 3)),
    "roll": case(lambda x: x.roll((1, -3), (0, -1)), x),
    "roll_far": case(lambda x: x.roll(17, 1), x),
    "roll_twice": case(lambda x: x.roll((1, 2), (1, 1)), x),
    "roll_flat": case(lambda x: x.roll(5), x),
    "roll_symbolic": case(lambda x: x.roll(x.shape[1] // 2, 1), x),
    "roll_scalar": case(lambda x: x.roll(0) + 1, numbers()),
    "roll_empty": case(lambda x: x.roll(1, 0) + 1, numbers(0, 3)),
    "repeat": case(lambda x: x.repeat(2, 1, 3, 2), x),
    "repeat_none": case(lambda x: x.repeat(2, 0, 3), x),
    "repeat_ones": case(lambda x: x.repeat(2, 1, 3), numbers(1, 4, 5)),
    "repeat_symbolic": case(lambda x: x.repeat(x.shape[1], 1, 1), x),
    "tile": case(lambda x: x.tile(2), x),
    "repeat_interleave": case(lambda x: x.repeat_interleave(3, 1), x),
    "diagonal": case(lambda x: x.diagonal() + 1, x, fixed=True),
    "diagonal_below": case(lambda x: x.diagonal(-2, 1, 2) + 1, x, fixed=True),
    "diagonal_above": case(lambda x: x.diagonal(2, 2, 0) + 1, x, fixed=True),
    "diagonal_square": case(lambda x: x.diagonal(1, -2, -1) + 1, numbers(3, 5, 5)),
    "diagonal_none": case(lambda x: x.diagonal(8, 0, 1) + 1, x, fixed=True),
    "diag_embed": case(lambda x: torch.diag_embed(x, 1), y),
    "trace": case(torch.trace, numbers(5, 5)),
    "unfold": case(lambda x: x.unfold(2, 3, 2) + 1, x),
    "unfold_first": case(lambda x: x.unfold(0, 2, 1) + 1, x),
    "unfold_scalar": case(lambda x: x.unfold(0, 1, 1) + 1, numbers()),
    "as_strided_window": case(lambda x: x.as_strided((4, 2, 3), (48, 8, 1), 2) + 1, x, fixed=True),
    "as_strided_overlap": case(lambda x: x.as_strided((5, 3), (2, 1)) + 1, numbers(16), fixed=True),
    "as_strided_same_count_overlap": case(lambda x: torch.as_strided_copy(x, (2, 2, 4), (1, 1, 1)), numbers(16)),
    "as_strided_transposed": case(
        lambda x: x.as_strided((x.shape[0], x.shape[2], x.shape[1]), (x.shape[1] * x.shape[2], 1, x.shape[2])) + 1, x
    ),
    "as_strided_of_permuted": case(
        lambda x: x.permute(2, 0, 1).contiguous().as_strided((8, 24), (24, 1)) + 1, x, fixed=True
    ),
}


@table(SLICES)
def test_slices(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


def assign(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1] = 0
    y[1:3, 2:4] = x[1:3, :2]
    y[..., ::3] += 1
    y[-1] = y[0]
    return y


JOINS: dict[str, Case] = {
    "cat": case(lambda x, y: torch.cat([x[:, :, 0], y, y * 2], 1), x, y),
    "cat_promotes": case(lambda x, y: torch.cat([x, y.half(), y.int()], -1), y, y),
    "cat_legacy_empty": case(lambda x: torch.cat([torch.zeros(0), x, x[:, :0]], 1) + 1, x),
    "cat_all_empty": case(lambda x: torch.cat([x[:, :0], x[:, :0]], 1) + 1, x),
    "stack": case(lambda x: torch.stack([x, x + 1], 1), x),
    "stack_last": case(lambda x: torch.stack([x, x * 2], -1), x),
    "stack_scalars": case(lambda a, b: torch.stack([a, b, a * b]), numbers(), numbers(seed=1)),
    "hstack": case(lambda x: torch.hstack([x, x * 2]), x),
    "block_diag": case(lambda x, y: torch.block_diag(x, y[:2]), y, y),
    "slice_scatter": case(lambda x, s: x.slice_scatter(s, 1, 1, 4), x, numbers(4, 3, 8, seed=1), fixed=True),
    "slice_scatter_step": case(lambda x, s: x.slice_scatter(s, 1, 1, 6, 2), x, numbers(4, 3, 8), fixed=True),
    "slice_scatter_end": case(lambda x: x.slice_scatter(x[:, :2] * 2, 1, -2), x),
    "slice_scatter_whole": case(lambda x: x.slice_scatter(x * 2, 1), x),
    "slice_scatter_nothing": case(lambda x: x.slice_scatter(x[:, :0], 1, 3, 3) + 1, x),
    "select_scatter": case(lambda x, s: x.select_scatter(s, 1, -2), x, numbers(4, 8)),
    "select_scatter_first": case(lambda x, s: x.select_scatter(s, 0, 0), x, numbers(6, 8)),
    "diagonal_scatter": case(lambda x, s: x.diagonal_scatter(s, 1, 0, 1), x, numbers(8, 4), fixed=True),
    "diagonal_scatter_below": case(lambda x: x.diagonal_scatter(x[:, 0, 1:], -1, 1, 2), numbers(2, 5, 5)),
    "as_strided_scatter": case(lambda x, s: x.as_strided_scatter(s, (2, 3), (8, 2), 1), y, numbers(2, 3), fixed=True),
    "setitem": case(assign, x),
    "copy": case(lambda x, y: torch.ops.aten.copy(x, y) + 1, x, numbers(8)),
    "clone": case(lambda x: x.clone(), x),
    "tril": case(lambda x: x.tril(-1), x),
    "triu": case(lambda x: x.triu(2), x),
}


@table(JOINS)
def test_joins_and_writes(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
OF_EVERY_DTYPE: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda x: x.view(-1, 8).t().flip(0),
    "slices": lambda x: torch.cat([x[1:, :, ::2], x[:-1, :, 1::2]], 1).roll(1, 1),
    "select": lambda x: torch.stack([x[0], x[:, 1].repeat(2, 1)[:6]]),
    "expand": lambda x: x[:, :1].expand(4, 5, 8).unfold(1, 2, 1).clone(),
    "write": lambda x: x.slice_scatter(x[:, :2], 1, 3, 5).diagonal(0, 1, 2).clone(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OF_EVERY_DTYPE)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    check(OF_EVERY_DTYPE[name], (x * 3).to(dtype), dynamic=True)


def test_casts_wrap_as_torch_does() -> None:
    wide = torch.tensor([-1, 0, 127, 128, 255, 256, 300, -129])
    for dtype in (torch.uint8, torch.int8, torch.bool, torch.int32, torch.float16):
        check(lambda x, dtype=dtype: x.to(dtype), wide)
    check(lambda x: x.to(torch.int64), torch.tensor([0.5, -0.5, 1.9, -1.9, 1e6]))
    check(lambda x: x.to(torch.bool), torch.tensor([0.0, 0.25, -0.0, float("nan"), float("inf")]))


def test_unused_pieces_are_not_made() -> None:
    one = check(lambda x: x.split(2, 1)[2] + 1, x).layers
    assert one < check(lambda x: [p + 1 for p in x.split(2, 1)], x).layers


def test_whole_symbolic_dims_cost_no_arithmetic() -> None:
    kinds = [
        layer.type.name
        for network in check(
            lambda x: x[:, :, 2:5] * x.narrow(2, 1, 3), numbers(4, 6, 8)[:, :, :], dynamic=False
        ).networks
        for layer in network.network.raw
    ]
    assert "SHAPE" not in kinds

    def function(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0].unsqueeze(1).expand(-1, 3, -1) + 1

    found = check(function, x, dynamic=True)
    assert sum(layer.type.name == "SHAPE" for n in found.networks for layer in n.network.raw) == 0


def test_a_part_of_memory_cannot_be_strided() -> None:
    with refused("strides over a tensor that is itself a part of another"):
        check(lambda x: (x + 1)[1:].as_strided((2, 2), (1, 2)) * 2, x)


def test_float64_stays_eager() -> None:
    with refused("TensorRT has no float64"):
        check(lambda x: x.double() + 1, y)


def test_the_trace_has_views_not_copies() -> None:
    targets = {str(node.target) for node in trace(lambda x: x.view(-1)[2:] + 1, (x,)).graph.nodes}
    assert {"aten.view.default", "aten.slice.Tensor"} <= targets
