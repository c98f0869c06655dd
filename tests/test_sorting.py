"""Order and searches against eager. Numbers that are all different: which of two equal ones comes first is open."""

from __future__ import annotations

import pytest
import torch

from tests.converter_cases import Case, case, numbers, run, table, whole_numbers
from trt_dynamo.testing import check, refused

x = numbers(4, 6, 9)
distinct = torch.randperm(216, generator=torch.Generator().manual_seed(0)).reshape(4, 6, 9)
few = whole_numbers(4, 4, 6, 9)
nan = x.clone()
nan[0, 0, 0] = nan[1, 2:4, 3] = float("nan")
edges = torch.tensor([-1.0, 0.0, 0.0, 1.0])

ORDERS: dict[str, Case] = {
    "topk": case(lambda x: x.topk(3), x, fixed=True),
    "topk_smallest": case(lambda x: x.topk(3, 1, False), x, fixed=True),
    "topk_vector": case(lambda x: x.topk(3), x[0, 0], fixed=True),
    "topk_int": case(lambda x: x.topk(3, 0), distinct, fixed=True),
    "topk_symbolic": case(lambda x: x.topk(x.shape[1] - 2, 2), x, fixed=True),
    "topk_values_at_other_sizes": case(lambda x: x.topk(x.shape[1] - 2, 2)[0], x),
    "topk_none": case(lambda x: x.topk(0)[0] + 1, x),
    "topk_scalar": case(lambda x: x.topk(1)[0] + 1, numbers()),
    "sort": case(lambda x: x.sort(1), x, fixed=True),
    "sort_down": case(lambda x: x.sort(0, True), distinct, fixed=True),
    "sort_values_at_other_sizes": case(lambda x: x.sort(1)[0], x),
    "sort_bool": case(lambda x: (x > 0).sort(1)[0], x),
    "sort_uint8": case(lambda x: x.sort(-1)[0], whole_numbers(255, 4, 6).to(torch.uint8)),
    "sort_scalar": case(lambda x: x.sort()[0] + 1, numbers()),
    "sort_float16": case(lambda x: x.sort(1)[0], x.half()),
    "sort_empty": case(lambda x: x.sort(1)[0] + 1, numbers(3, 0)),
    "sort_beyond_topk": case(lambda x: x.sort()[0], numbers(5000), dynamic=False),
    "argsort": case(lambda x: x.argsort(-1, True), x, fixed=True),
    "stable": case(lambda x: x.sort(dim=1, stable=True), few),
    "stable_down": case(lambda x: x.sort(dim=-1, stable=True, descending=True), few),
    "msort": case(torch.msort, x),
    "kthvalue": case(lambda x: x.kthvalue(2, 1), x, fixed=True),
    "kthvalue_kept": case(lambda x: x.kthvalue(2, 1, True)[0], x),
    "median": case(lambda x: x.median(), x[0]),
    "median_dim": case(lambda x: x.median(1), x, fixed=True),
    "median_int": case(lambda x: x.median(-1, True)[0], distinct),
    "median_nan": case(lambda x: x.median(2)[0], nan),
    "nanmedian": case(lambda x: x.nanmedian(2)[0], nan),
    "nanmedian_all": case(lambda x: x.nanmedian(), nan[0]),
    "nanmedian_int": case(lambda x: x.nanmedian(1)[0], distinct),
    "mode": case(lambda x: x.mode(2), few),
    "mode_kept": case(lambda x: x.mode(1, True)[0], few),
    "mode_bool": case(lambda x: (x > 1).mode(1)[0], few),
    "quantile": case(lambda x: x.quantile(0.3, 1), x, dynamic=False),
    "bucketize": case(lambda x, b: torch.bucketize(x, b), nan.round(), edges, fixed=True),
    "bucketize_right": case(
        lambda x, b: torch.bucketize(x, b, right=True, out_int32=True), nan.round(), edges, fixed=True
    ),
    "bucketize_number": case(lambda b: torch.bucketize(0.5, b) + 1, edges, fixed=True),
    "searchsorted": case(lambda b, x: torch.searchsorted(b, x), numbers(4, 6, 5).sort()[0], x, fixed=True),
    "searchsorted_right": case(lambda b, x: torch.searchsorted(b, x, side="right"), edges, x.round(), fixed=True),
    "searchsorted_sorter": case(
        lambda b, x: torch.searchsorted(b, x, sorter=torch.tensor([3, 1, 0, 2])),
        torch.tensor([0.5, 0.0, 1.0, -1.0]),
        x,
        fixed=True,
    ),
    "isin": case(lambda x: torch.isin(x, torch.tensor([1, 3])), few),
}


@table(ORDERS)
def test_order(case: Case, dynamic: bool) -> None:
    run(case, dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_too_many_are_refused(dynamic: bool) -> None:
    with refused("TensorRT takes 3840"):
        check(lambda x: x.topk(4000)[0], numbers(2, 5000), dynamic=dynamic)
    with refused("would be too large"):
        check(lambda x: x.sort()[0], numbers(20_000), dynamic=dynamic)
