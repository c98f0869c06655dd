"""What the property tests of edges share: strategies for shapes and tensors full of edge values, and the property.

The property: TensorRT networks mean what eager means. Calls that eager itself refuses say nothing and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from trt_dynamo.errors import Unsupported
from trt_dynamo.profiles import dim_of, shape_env_of
from trt_dynamo.testing import check, copied, trace

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)

NAN, INF = float("nan"), float("inf")
PLAIN = (0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -7.0, 0.25)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function and its arguments. `also`: arguments of other sizes for dynamic networks. `near`: the tolerance of
    what is computed in another order.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    also: tuple[tuple[Any, ...], ...] = ()
    near: float | None = None

    def __repr__(self) -> str:
        return f"{self.name}{self.args}"


def edge_values(dtype: torch.dtype) -> tuple[Any, ...]:
    """Numbers at which formulas break: halves, the ends of the type, and what is no number."""
    if dtype is torch.bool:
        return False, True
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        return (*PLAIN, -0.0, NAN, INF, -INF, limits.max, -limits.max, limits.tiny, limits.eps)
    limit = torch.iinfo(dtype)
    beyond = (2**31 + 5, -(2**31) - 7, 2**40 + 1, 2**53 + 1) if dtype is torch.int64 else ()
    signed = (-1, -2, -3, -7) if limit.min < 0 else (200, 254)
    return (0, 1, 2, 3, 5, 7, *signed, *beyond, limit.max, limit.min)


def mild_values(dtype: torch.dtype) -> tuple[Any, ...]:
    """Numbers that stay numbers through a chain of ops."""
    if dtype is torch.bool:
        return False, True
    if dtype.is_floating_point:
        return PLAIN
    return (0, 1, 2, 3, 5, 7) if dtype is torch.uint8 else (0, 1, 2, 3, -1, -2, -3, -7)


def shapes(low: int = 0, high: int = 4, sizes: Sequence[int] = (0, 1, 1, 2, 3, 4)) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(list(sizes)), min_size=low, max_size=high)


@st.composite
def broadcast_with(draw: st.DrawFn, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts with this one: some dims 1, some leading ones gone."""
    narrowed = [1 if draw(st.integers(0, 3)) == 0 else d for d in shape]
    return narrowed[draw(st.sampled_from([0, 0, 0, *range(len(shape) + 1)])) :]


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
    values: Callable[[torch.dtype], Sequence[Any]] = edge_values,
) -> torch.Tensor:
    """A tensor of one of the dtypes that holds a few of the values, in an order of their own."""
    dtype = draw(st.sampled_from(list(dtypes)))
    count = torch.Size(shape).numel()
    chosen = draw(st.lists(st.sampled_from(list(values(dtype))), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    places = torch.arange(count) if count <= len(chosen) else torch.randint(len(chosen), (count,), generator=generator)
    return torch.tensor(chosen, dtype=dtype)[places].reshape(list(shape))


def one_of(table: Mapping[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    return st.sampled_from(list(table.items()))


def eager_takes(call: Call) -> bool:
    """Whether eager itself has an answer."""
    try:
        with torch.no_grad():
            call.function(*copied(call.args))
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError):
        return False
    return True


def guards_allow(call: Call, args: Sequence[Any]) -> bool:
    """Whether torch would run the graph traced for the call with these arguments too."""
    if not eager_takes(dataclasses.replace(call, args=tuple(args))):
        return False
    values = [
        node.meta["val"] for node in trace(call.function, call.args, dynamic=True).graph.find_nodes(op="placeholder")
    ]
    pairs = [
        (dim_of(d), size)
        for value, a in zip(values, args, strict=True)
        for d, size in zip(value.shape, a.shape, strict=True)
    ]
    if any(isinstance(dim, int) and dim != size for dim, size in pairs):
        return False
    return bool(shape_env_of(values).evaluate_guards_for_args(values, args))


def assert_agrees(call: Call, *, dynamic: bool, build: bool = False, unsupported: Sequence[str] = ()) -> None:
    """The property, for one call. `unsupported`: the reasons for which a call may be left to eager."""
    hypothesis.assume(eager_takes(call))
    also = [other for other in call.also if dynamic and guards_allow(call, other)]
    half = any(isinstance(a, torch.Tensor) and a.dtype in HALVES for a in call.args)
    near = 1e-2 if half else call.near
    try:
        check(call.function, *call.args, dynamic=dynamic, build_engines=build, also=also, rtol=near, atol=near)
    except Unsupported as error:
        if not any(reason in str(error) for reason in unsupported):
            raise AssertionError(f"left to eager: {error}") from error
