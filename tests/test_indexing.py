"""Reads and writes at indices against eager: positions of the index, negative places, masks, writes that combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.converter_cases import Case, case, numbers, run, table, whole_numbers
from trt_dynamo.testing import check, refused

aten = torch.ops.aten

x = numbers(4, 6, 9)
i = torch.tensor([[0, 3, -1], [2, -4, 1]])
j = torch.tensor([0, -5, 2])
permuted = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n))[:3] for n in range(36)], 1)
unique = permuted.reshape(3, 4, 9).permute(1, 0, 2).contiguous()

ids_of_bags = whole_numbers(7, 3, 5)

READS: dict[str, Case] = {
    "embedding": case(F.embedding, i.abs(), numbers(5, 7)),
    "embedding_padding": case(lambda i, w: F.embedding(i, w, padding_idx=0), i.int().abs(), numbers(5, 7)),
    "embedding_scalar": case(F.embedding, torch.tensor(2), numbers(5, 7)),
    "first": case(lambda x, i: x[i], x, i),
    "middle": case(lambda x, i: x[:, i], x, i),
    "last": case(lambda x, i: x[..., i], x, i),
    "two_adjacent": case(lambda x, i, j: x[i, j], x, i, j),
    "two_adjacent_inside": case(lambda x, i, j: x[:, i, j], x, i, j),
    "two_apart": case(lambda x, i, j: x[i, :, j], x, i, j),
    "two_of_four_inside": case(lambda x, i, j: x[:, :, i, j], numbers(2, 3, 6, 7), i, j),
    "three": case(lambda x, i, j: x[i, j, j], x, i, j),
    "with_new_dim": case(lambda x, i, j: x[None, i, :, j], x, i, j),
    "with_int": case(lambda x, i: x[1, i] + x[i % 4, 0], x, j),
    "constant": case(lambda x: x[:, [0, -2]], x),
    "two_constants": case(lambda x: x[[1, 2], [0, -2]], x),
    "int32": case(lambda x, i: x[i], x, i.int()),
    "of_bool": case(lambda x, i: (x > 0)[i], x, i),
    "of_uint8": case(lambda x, i: x[i], whole_numbers(255, 4, 6).to(torch.uint8), i),
    "of_float16": case(lambda x, i: x[i], x.half(), i),
    "empty_index": case(lambda x, i: x[i] + 1, x, torch.zeros(0, dtype=torch.int64)),
    "scalar_index": case(lambda x, i: aten.index(x, [i]) + 1, x, torch.tensor(-2)),
    "index_select": case(lambda x, i: x.index_select(1, i) + 1, x, torch.tensor([1, 2, 2])),
    "index_select_scalar_index": case(lambda x, i: x.index_select(1, i) + 1, x, torch.tensor(1)),
    "index_select_of_scalar": case(lambda x, i: x.index_select(0, i) + 1, numbers(), torch.tensor([0])),
    "gather": case(lambda x, i: x.gather(1, i), x, whole_numbers(6, 4, 3, 9)),
    "gather_smaller": case(lambda x, i: x.gather(-2, i), x, whole_numbers(6, 3, 8, 7)),
    "gather_scalar": case(lambda x, i: x.gather(0, i) + 1, numbers(), torch.tensor(0)),
    "gather_nothing": case(lambda x, i: x.gather(1, i) + 1, x, torch.zeros(4, 0, 9, dtype=torch.int64)),
    "take_along_dim": case(
        lambda x, i: torch.take_along_dim(x, i, 1), x, whole_numbers(6, 4, 3, 9, low=-6), fixed=True
    ),
    "take": case(torch.take, x, whole_numbers(216, 3, 5, low=-216)),
    "tril_indices": case(lambda x: x[torch.tril_indices(4, 4)[0], torch.triu_indices(4, 4)[1]], x),
    "one_hot": case(lambda i: F.one_hot(i % 5, 5), i),
    "repeat_interleave": case(
        lambda r: torch.repeat_interleave(r, output_size=9), torch.tensor([2, 0, 4, 3]), fixed=True
    ),
    "embedding_bag": case(lambda i, w: F.embedding_bag(i, w, mode="sum"), ids_of_bags, numbers(7, 4)),
    "embedding_bag_mean": case(
        lambda i, o, w: F.embedding_bag(i, w, o, padding_idx=2),
        whole_numbers(7, 9),
        torch.tensor([0, 4, 4]),
        numbers(7, 4),
        fixed=True,
    ),
    "embedding_bag_max": case(
        lambda i, o, w: F.embedding_bag(i, w, o, mode="max", include_last_offset=True),
        whole_numbers(7, 9),
        torch.tensor([0, 4, 4, 9]),
        numbers(7, 4),
        fixed=True,
    ),
    "embedding_bag_weighted": case(
        lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s),
        ids_of_bags,
        numbers(7, 4),
        numbers(3, 5),
    ),
}


@table(READS)
def test_reads(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


def write_masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[y > 0] = 0
    y[:, 2] = 1
    y[0, 1:3, ::2] = 5
    return y


rows = torch.tensor([0, 2])
WRITES: dict[str, Case] = {
    "scatter": case(lambda x, i, s: x.scatter(1, i, s), x, unique, numbers(4, 5, 9), fixed=True),
    "scatter_value": case(lambda x, i: x.scatter(1, i, 3.5), x, unique[:3, :, :7]),
    "scatter_bool": case(lambda x, i: (x > 0).scatter(1, i, True), x, unique),
    "scatter_scalar": case(lambda x, i, s: x.scatter(0, i, s) + 1, numbers(), torch.tensor(0), torch.tensor(2.0)),
    "scatter_nothing": case(lambda x, i: x.scatter(1, i, 2.0) + 1, x, torch.zeros(4, 0, 9, dtype=torch.int64)),
    "scatter_into_zeros": case(lambda x, i: torch.zeros_like(x).scatter_(1, i, 1.0), x, unique),
    "put_first": case(lambda x, v: x.index_put((rows,), v), x, numbers(2, 6, 9), fixed=True),
    "put_two": case(lambda x, v: x.index_put((rows, torch.tensor([1, -1])), v), x, numbers(9)),
    "put_middle": case(lambda x, v: aten.index_put(x, [None, rows], v), x, numbers(2, 9), fixed=True),
    "put_last_two": case(
        lambda x, v: aten.index_put(x, [None, rows, torch.tensor([1, -1])], v), x, numbers(4, 2), fixed=True
    ),
    "put_apart": case(
        lambda x, v: aten.index_put(x, [rows, None, torch.tensor([1, -1])], v), x, numbers(2, 6), fixed=True
    ),
    "put_broadcast": case(
        lambda x, v: aten.index_put(x, [rows[:, None], None, torch.tensor([1, -1])], v), x, numbers(2, 2, 6), fixed=True
    ),
    "put_mask": case(lambda x, v: x.index_put((x > 0,), v), x, torch.tensor(2.0)),
    "put_mask_of_rows": case(lambda x, v: x.index_put((x[:, :, 0] > 0,), v), x, numbers(9)),
    "put_mask_one_row": case(lambda x, v: x.index_put((x[:, :, 0] > 0,), v), x, numbers(1, 9)),
    "put_mask_behind": case(lambda x, v: aten.index_put(x, [None, x[0] > 0], v), x, torch.tensor(3.0)),
    "put_mask_adds": case(lambda x, v: x.index_put((x > 0,), v, accumulate=True), x, torch.tensor(3.0)),
    "setitem_masked": case(write_masked, x),
    "flat_put": case(lambda x, v: x.put(torch.tensor([3, -1, 20]), v), x, numbers(3), fixed=True),
    "index_copy": case(lambda x, v: x.index_copy(1, rows, v), x, numbers(4, 2, 9), fixed=True),
    "index_fill": case(lambda x: x.index_fill(1, rows, 3.0), x),
    "index_fill_other_strides": case(lambda x: x.clone().index_fill_(-2, rows, 3.0) * 2, x.mT),
    "index_fill_by_tensor": case(lambda x, v: x.index_fill(0, rows[1], v), x, torch.tensor(3.0)),
    "index_fill_of_scalar": case(lambda x: x.index_fill(0, rows[:1], 3) + 1, numbers()),
    "masked_fill": case(lambda x: x.masked_fill(x > 0, float("-inf")), x),
    "masked_scatter": case(lambda x, v: x.masked_scatter(x > 0, v), x, numbers(700)),
    "masked_scatter_broadcast": case(lambda x, v: x.masked_scatter(x[0] > 0, v), x, numbers(700)),
}


@table(WRITES)
def test_writes(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


ids = whole_numbers(6, 4, 5, 9)
values = numbers(4, 5, 9, seed=1)
small = whole_numbers(9, 4, 6, 9, low=-9)
small_values = whole_numbers(9, 4, 5, 9, low=-9, seed=1)
thrice = torch.tensor([0, 2, 0])
near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

COMBINED: dict[str, Case] = {
    **{
        f"scatter_{how}{'' if own else '_alone'}{'_int' if data is small else ''}": case(
            lambda x, i, s, how=how, own=own: x.scatter_reduce(1, i, s, how, include_self=own),
            data,
            ids,
            source,
            **near,
        )
        for how in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
        for data, source in ((x, values), (small, small_values))
    },
    "scatter_add": case(lambda x, i, s: x.scatter_add(1, i, s), x, ids, values, **near),
    "scatter_add_smaller": case(lambda x, i, s: x.scatter_add(-2, i, s), x, ids[:3, :, :7], values, **near),
    "scatter_add_scalar": case(
        lambda x, i, s: x.scatter_add(0, i, s) + 1, numbers(), torch.tensor(0), torch.tensor(2.0)
    ),
    "scatter_add_float16": case(
        lambda x, i, s: x.scatter_add(1, i, s), x.half(), ids, values.half(), rtol=1e-2, atol=1e-2
    ),
    "scatter_bool": case(lambda x, i, s: (x > 1).scatter_add(1, i, s > 1), x, ids, values),
    "index_add": case(lambda x, v: x.index_add(1, thrice, v, alpha=2), x, numbers(4, 3, 9), fixed=True),
    "index_add_int": case(lambda x, v: x.index_add(1, thrice, v), small, small_values[:, :3], fixed=True),
    "index_reduce": case(
        lambda x, v: x.index_reduce(1, torch.tensor([0, 2, 0]), v, "amax"), x, numbers(4, 3, 9), fixed=True
    ),
    "put_adds": case(
        lambda x, v: aten.index_put(x, [None, torch.tensor([0, 2, 0]), torch.tensor([1, -1, 1])], v, True),
        x,
        numbers(4, 3),
        fixed=True,
    ),
    "put_adds_apart": case(
        lambda x, v: aten.index_put(x, [torch.tensor([0, 2, 0]), None, torch.tensor([1, -1, 1])], v, True),
        x,
        numbers(3, 6),
        fixed=True,
    ),
    "unfold": case(lambda x: F.unfold(x, 3, stride=2), numbers(2, 3, 6, 9)),
    "fold": case(
        lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 9), 3, padding=1), numbers(2, 3, 6, 9), fixed=True, **near
    ),
}


@pytest.mark.filterwarnings("ignore:index_reduce.*:UserWarning")
@table(COMBINED)
def test_writes_that_combine(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


def test_what_depends_on_data_is_refused() -> None:
    for function in (lambda x: x[x > 0], lambda x: x.index_put((x > 0,), x.flatten()[:100])):
        with refused("depends on data"):
            check(function, x)


def test_a_table_that_would_be_too_large_is_refused() -> None:
    many = numbers(9000)
    with refused("would be too large"):
        check(lambda x: x.scatter_add(0, whole_numbers(9000, 9000), x), many)
