"""Shapes at the edges, as properties: dims of 0 and 1, 0-D tensors, odd dims, indices, sizes computed from sizes.

Each family is a strategy that draws a call; eager says what the call means. Dynamic networks see further sizes too
where the family says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tests.compiled import assert_same, compiled, engine_calls
from tests.edges import Call, assert_agrees, broadcast_with, mild_values, one_of, shapes, tensors

Function = Callable[..., Any]

TYPES = (torch.float32, torch.float32, torch.int64, torch.bool, torch.float16, torch.uint8)
FLOAT = (torch.float32,)

# -- dims of 0 and 1 ---------------------------------------------------------------------------------------------------

EMPTY: dict[str, Function] = {
    "linear": lambda b, n, m: (lambda x, w: F.linear(x, w), [b, n], [m, n]),
    "matmul": lambda b, n, m: (torch.matmul, [b, n], [n, m]),
    "bmm": lambda b, n, m: (torch.bmm, [b, n, m], [b, m, 2]),
    "batches": lambda b, n, m: (torch.matmul, [b, 1, n, m], [3, m, n]),
    "vector": lambda b, n, m: (torch.matmul, [b, n], [n]),
    "dot": lambda b, n, m: (torch.dot, [n], [n]),
    "addmm": lambda b, n, m: (lambda x, y: torch.addmm(x[:1, :1], x, y, beta=2, alpha=3), [b, n], [n, m]),
    "outer": lambda b, n, m: (torch.outer, [n], [m]),
    "einsum": lambda b, n, m: (lambda x, y: torch.einsum("bnm,bm->nb", x, y), [b, n, m], [b, m]),
    "conv1d": lambda b, n, m: (lambda x, w: F.conv1d(x, w, padding=1), [b, 2, n + 1], [3, 2, 3]),
    "conv2d": lambda b, n, m: (lambda x, w: F.conv2d(x, w, padding=1), [b, 2, n + 1, m + 1], [3, 2, 2, 3]),
    "transposed": lambda b, n, m: (lambda x, w: F.conv_transpose2d(x, w, stride=2), [b, 2, n + 1, m + 1], [2, 3, 2, 2]),
    "max_pool": lambda b, n, m: (lambda x, w: F.max_pool2d(x, 2, 1, 1), [b, 2, n + 1, m + 1], []),
    "avg_pool": lambda b, n, m: (lambda x, w: F.avg_pool2d(x, 2, ceil_mode=True), [b, 2, n + 2, m + 2], []),
    "adaptive": lambda b, n, m: (lambda x, w: F.adaptive_avg_pool2d(x, (1, 2)), [b, 2, n + 1, m + 1], []),
    "adaptive max": lambda b, n, m: (lambda x, w: F.adaptive_max_pool1d(x, 1), [b, 2, m + 1], []),
    "layer_norm": lambda b, n, m: (lambda x, w: F.layer_norm(x, w.shape, w), [b, n, m + 1], [m + 1]),
    "group_norm": lambda b, n, m: (lambda x, w: F.group_norm(x, 2), [b, 4, n + 1, m + 1], []),
    "instance_norm": lambda b, n, m: (lambda x, w: F.instance_norm(x), [b, 2, n + 1, m + 2], []),
    "batch_norm": lambda b, n, m: (lambda x, w: F.batch_norm(x, w, w.abs() + 1), [b, 3, n], [3]),
    "rms_norm": lambda b, n, m: (lambda x, w: F.rms_norm(x, [x.shape[-1]]), [b, n, m + 1], []),
    "attention": lambda b, n, m: (lambda q, k: F.scaled_dot_product_attention(q, k, k), [b, 2, n, 4], [b, 2, m + 1, 4]),
    "embedding": lambda b, n, m: (lambda x, w: F.embedding(x.long().abs() % 3, w), [b, n], [3, m]),
    "interpolate": lambda b, n, m: (lambda x, w: F.interpolate(x, scale_factor=2.0), [b, 2, n + 1, m + 1], []),
    "bilinear": lambda b, n, m: (lambda x, w: F.interpolate(x, (3, 2), mode="bilinear"), [b, 2, n + 1, m + 1], []),
    "cat": lambda b, n, m: (lambda x, y: torch.cat([x, y, x], 1), [b, n, 2], [b, m, 2]),
    "cat of none": lambda b, n, m: (lambda x, y: torch.cat([torch.zeros(0), x, y]), [b, m], [n, m]),
    "stack": lambda b, n, m: (lambda x, y: torch.stack([x, y, x], -1), [b, n], [b, n]),
    "unfold": lambda b, n, m: (lambda x, w: F.unfold(x, 2, padding=1), [b, 1, n + 1, m + 1], []),
    "shuffle": lambda b, n, m: (lambda x, w: F.pixel_shuffle(x, 2), [b, 4, n, m], []),
    "cdist": lambda b, n, m: (lambda x, y: torch.cdist(x, y), [b, n, 3], [b, m, 3]),
    "tril": lambda b, n, m: (lambda x, w: (x.tril(-1), x.triu(1)), [b, n, m], []),
    "cosine": lambda b, n, m: (lambda x, y: F.cosine_similarity(x, y, -1), [b, n, m], [b, 1, m]),
    "loss": lambda b, n, m: (lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y, reduction="none")), [b, n], [b, n]),
    "one_hot": lambda b, n, m: (lambda x, w: F.one_hot(x.long().abs() % 4, 4), [b, n], []),
    "kron": lambda b, n, m: (torch.kron, [b, n], [m]),
    "meshgrid": lambda b, n, m: (lambda x, y: torch.meshgrid(x, y, indexing="xy"), [n], [m]),
    "glu": lambda b, n, m: (lambda x, w: F.glu(x, 1), [b, 2 * n, m], []),
    "repeat_interleave": lambda b, n, m: (lambda x, w: x.repeat_interleave(3, 1), [b, n, m], []),
}


@st.composite
def empty(draw: st.DrawFn) -> Call:
    name, make = draw(one_of(EMPTY))
    b, n, m = (draw(st.sampled_from([0, 1, 2, 3])) for _ in range(3))
    function, *given = make(b, n, m)
    args = tuple(draw(tensors(s, FLOAT, mild_values)) for s in given)
    return Call(f"{name}{b, n, m}", lambda *a: copies(function(*a)), args, near=1e-4)


def copies(found: Any) -> Any:
    """A view of an input is eager's to make."""
    return [r.clone() for r in found] if isinstance(found, tuple | list) else found.clone()


# -- dims in any order -------------------------------------------------------------------------------------------------

ARRANGED: dict[str, Function] = {
    "permute": lambda x, d, k: x.permute(d), "movedim": lambda x, d, k: x.movedim(d[:k], tuple(reversed(d[:k]))),
    "transpose": lambda x, d, k: x.transpose(d[0], d[-1]), "flip": lambda x, d, k: x.flip(d[:k]),
    "roll": lambda x, d, k: x.roll([3 - i * 4 for i in range(k)], d[:k]), "roll all": lambda x, d, k: x.roll(-k),
    "sum": lambda x, d, k: x.sum(d[:k]), "amax": lambda x, d, k: x.amax(d[:k], keepdim=True),
    "any": lambda x, d, k: x.any(d[0]), "mean": lambda x, d, k: x.float().mean(d[:k], keepdim=True),
    "var": lambda x, d, k: x.float().var(d[:k], correction=0), "logsumexp": lambda x, d, k: x.float().logsumexp(d[:k]),
    "squeeze": lambda x, d, k: x.squeeze(d[:k]), "all": lambda x, d, k: x.all(d[-1], keepdim=True),
    "unsqueeze": lambda x, d, k: x.unsqueeze(d[0]), "softmax": lambda x, d, k: x.float().softmax(d[0]),
    "rot90": lambda x, d, k: x.rot90(k, d[:2]), "cumsum": lambda x, d, k: x.cumsum(d[0]),
    "sort": lambda x, d, k: x.sort(d[0]).values, "norm": lambda x, d, k: torch.linalg.vector_norm(x.float(), 2, d[:k]),
    "diagonal": lambda x, d, k: x.diagonal(k - 2, d[0], d[1]), "flatten": lambda x, d, k: x.flatten(0, -k),
    "unbind": lambda x, d, k: x.unbind(d[0]), "chunk": lambda x, d, k: x.chunk(k, d[0]),
    "split": lambda x, d, k: x.split(k, d[0]), "tensor_split": lambda x, d, k: x.tensor_split(k, d[0]),
    "unflatten": lambda x, d, k: x.unflatten(d[0], (1, -1)), "argmax": lambda x, d, k: x.float().argmax(d[0]),
    "diff": lambda x, d, k: x.float().diff(k, d[0]),
    "topk": lambda x, d, k: x.float().topk(min(k, x.shape[d[0]]), d[0]).values,
    "none": lambda x, d, k: x.float().topk(0, d[0]),
    "pad": lambda x, d, k: F.pad(x, [1, -1, k - 2, 2][: 2 * min(x.ndim, 2)], value=k),
    "swap": lambda x, d, k: x.mT if k % 2 else x.adjoint(),
    "unfold": lambda x, d, k: x.unfold(d[0], min(k, x.shape[d[0]]), 2), "tile": lambda x, d, k: x.tile([k, 2]),
    "repeat": lambda x, d, k: x.repeat([k - 1] + [2] * x.ndim),
    "index": lambda x, d, k: x.index_select(d[0], torch.zeros(k, dtype=torch.int64)),
    "select": lambda x, d, k: x.select(d[0], -1),
    "narrow": lambda x, d, k: x.narrow(d[0], -min(k, x.shape[d[0]]), min(k, x.shape[d[0]])),
    "expand": lambda x, d, k: x.expand(k, *x.shape),
    "scatter": lambda x, d, k: x.scatter(d[0], torch.zeros([min(1, s) for s in x.shape], dtype=torch.int64), 1),
    "take": lambda x, d, k: x.take(torch.tensor([0, -1])),
    "slice_scatter": lambda x, d, k: x.slice_scatter(x.narrow(d[0], 0, 1), d[0], -1),
    "select_scatter": lambda x, d, k: x.select_scatter(x.select(d[0], 0), d[0], -1),
    "gather": lambda x, d, k: x.gather(d[0], torch.zeros(x.shape, dtype=torch.int64)),
    "vstack": lambda x, d, k: torch.vstack([x, x]), "hstack": lambda x, d, k: torch.hstack([x, x]),
}  # fmt: skip


@st.composite
def arranged(draw: st.DrawFn) -> Call:
    """An op over several dims: in any order, each counted from the front or from the end."""
    name, function = draw(one_of(ARRANGED))
    shape = draw(shapes(1, 5, (0, 1, 1, 2, 3)))
    order = draw(st.permutations(range(len(shape))))
    dims = tuple(d - len(shape) if draw(st.booleans()) else d for d in order)
    many = draw(st.integers(1, len(shape)))
    x = draw(tensors(shape, TYPES, mild_values))

    return Call(f"{name}{dims, many}", lambda x: copies(function(x, dims, many)), (x,))


# -- indices -----------------------------------------------------------------------------------------------------------


@st.composite
def sliced(draw: st.DrawFn) -> Call:
    """Slices beyond both ends, steps, single places, None and an ellipsis."""
    shape = draw(shapes(1, 4, (0, 1, 2, 3, 5)))
    bound = st.one_of(st.none(), st.integers(-7, 7))
    key: list[Any] = []
    for size in shape:
        kind = draw(st.sampled_from(["slice", "slice", "place", "all", "new"]))
        place = draw(st.integers(-size, size - 1)) if kind == "place" and size else slice(None)
        piece = slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2, 3])))
        pieces: dict[str, list[Any]] = {"slice": [piece], "place": [place], "all": [slice(None)], "new": [None, piece]}
        key += pieces[kind]
    key = [*key[:-1], ...] if draw(st.booleans()) else key
    x = draw(tensors(shape, TYPES, mild_values))
    return Call(f"x[{key}]", lambda x: x[tuple(key)].clone(), (x,))


@st.composite
def picked(draw: st.DrawFn) -> tuple[list[Any], torch.Tensor, list[torch.Tensor]]:
    """A key of index tensors that broadcast, slices between them, for a tensor: `...` stands for the next index."""
    shape = draw(shapes(1, 4, (1, 2, 3)))
    common = draw(shapes(0, 2, (0, 1, 2, 3)))
    key: list[Any] = []
    places: list[torch.Tensor] = []
    for size in shape:
        kind = draw(st.sampled_from(["tensor", "tensor", "all", "slice", "place"]))
        if kind == "tensor":
            form = draw(broadcast_with(common)) or [1]
            dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32]))
            inside = torch.tensor(draw(st.lists(st.integers(-size, size - 1), min_size=6, max_size=6)), dtype=dtype)
            places.append(inside.repeat(2)[: torch.Size(form).numel()].reshape(form))
        key.append({"tensor": ..., "all": slice(None), "slice": slice(None, None, 2), "place": -1}[kind])
    return key, draw(tensors(shape, TYPES, mild_values)), places


def filled(key: list[Any], places: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    left = iter(places)
    return tuple(next(left) if k is ... else k for k in key)


@st.composite
def indexed(draw: st.DrawFn) -> Call:
    key, x, places = draw(picked())
    return Call(f"x[{key}]", lambda x, *i: x[filled(key, i)].clone(), (x, *places))


@st.composite
def written(draw: st.DrawFn) -> Call:
    """Adding at indices, some twice, infinities among what is added; and writing one value."""
    key, x, places = draw(picked())
    key = [slice(None) if k == -1 else k for k in key]
    value = draw(
        tensors([], [x.dtype], lambda d: (*mild_values(d), *([torch.inf, torch.nan] if d.is_floating_point else [])))
    )
    if draw(st.booleans()):
        return Call(f"x[{key}] = v", lambda x, v, *i: put(x, filled(key, i), v), (x, value, *places))
    indices = [next(left) if k is ... else None for left in [iter(places)] for k in key if k in (..., slice(None))]
    return (
        Call(f"put {key}", lambda x, v, *i: torch.index_put(x, spread(key, i), v, accumulate=True), (x, value, *places))
        if indices
        else Call("nothing", lambda x: x + 1, (x,))
    )


def spread(key: list[Any], places: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    left = iter(places)
    return [next(left) if k is ... else None for k in key]


def put(x: torch.Tensor, key: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[key] = value
    return x


# -- sizes computed from sizes -----------------------------------------------------------------------------------------

SIZES: dict[str, Function] = {
    "s // 2 + 1": lambda m, n: m // 2 + 1, "n": lambda m, n: n, "m": lambda m, n: m, "least": lambda m, n: min(m, n),
    "largest": lambda m, n: max(m, n), "product": lambda m, n: m * n, "sum": lambda m, n: m + n,
    "gap": lambda m, n: abs(m - n), "rest": lambda m, n: m % 3, "ceil": lambda m, n: (n + 1) // 2,
    "one less": lambda m, n: m - 1, "linear": lambda m, n: 2 * n + 1,
}  # fmt: skip

SIZED: dict[str, Function] = {
    "full": lambda x, k: torch.full((k, 2), 3.0) + x.sum(), "arange": lambda x, k: torch.arange(k) * x.sum(),
    "pad": lambda x, k: F.pad(x, (k, 1)), "arange float": lambda x, k: torch.arange(0, k, 0.5) + x.sum(),
    "down": lambda x, k: torch.arange(k, -1, -1) + x.sum(), "expand": lambda x, k: x[:1, :1].expand(k, k) + 0,
    "slice": lambda x, k: x[:, :k] + 0, "behind": lambda x, k: x[k:] + 0, "last": lambda x, k: x[..., -k:] + 0,
    "narrow": lambda x, k: x.narrow(1, 0, k) * 2, "repeat": lambda x, k: x.repeat(k, 1),
    "roll": lambda x, k: x.roll(k, 1), "roll back": lambda x, k: x.roll(-k, 0),
    "topk": lambda x, k: x.topk(k, 1).values, "unfold": lambda x, k: x.unfold(1, k, 1) + 0,
    "resize": lambda x, k: F.interpolate(x[None, None], (k, 2)),
    "bilinear": lambda x, k: F.interpolate(x[None, None], (k, k), mode="bilinear"), "select": lambda x, k: x[:, k] + 0,
    "not to": lambda x, k: x.select(1, -k) * 2, "reshape": lambda x, k: x.reshape(-1)[: k * 2].reshape(k, -1) * 2,
    "view": lambda x, k: x.flatten().view(-1, 1).expand(-1, k) + 0,
    "split": lambda x, k: [p + 0 for p in x.split([k, x.shape[1] - k], 1)],
    "zeros": lambda x, k: torch.cat([torch.zeros(k, x.shape[1]), x]), "eye": lambda x, k: torch.eye(k) * x.mean(),
    "number": lambda x, k: x * k + k / 2, "one_hot": lambda x, k: F.one_hot(torch.arange(3) % k, k) + x.sum().long(),
    "mask": lambda x, k: torch.where(torch.arange(x.shape[1]) < k, x, 0.0),
    "pool": lambda x, k: F.adaptive_avg_pool1d(x[None], 1) * k, "tril": lambda x, k: x.tril(k),
    "power": lambda x, k: x**2 / k**0.5, "clamp": lambda x, k: x.clamp(max=k),
    "fill": lambda x, k: torch.full_like(x, k) + x, "linspace": lambda x, k: torch.linspace(0, 1, k) + x.sum(),
    "diagonal": lambda x, k: x.diagonal(k) + 0, "index": lambda x, k: x[torch.arange(k)],
    "cut": lambda x, k: F.pad(x, (-k, k)), "steps": lambda x, k: x[:, 1:k:2] + 0,
    "scatter": lambda x, k: torch.zeros(3, k).scatter(1, torch.zeros(3, 1, dtype=torch.int64), 1.0) + x.sum(),
    "tile": lambda x, k: x.tile(1, k),
}  # fmt: skip


@st.composite
def sized(draw: st.DrawFn) -> Call:
    """Every op that takes sizes, with one that was computed from sizes; the network then sees larger ones."""
    (size_name, size), (name, function) = draw(one_of(SIZES)), draw(one_of(SIZED))
    m, n, more = draw(st.integers(2, 6)), draw(st.integers(2, 6)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(m * 7 + n)
    x, larger = (torch.randn(m + d, n + d, generator=generator) for d in (0, more))
    return Call(f"{name} of {size_name}", lambda x: function(x, size(x.shape[0], x.shape[1])), (x,), ((larger,),))


@st.composite
def stretched(draw: st.DrawFn) -> Call:
    """Dims of 1 beside symbolic ones, and leading dims that only one of the two has."""
    shape = draw(shapes(0, 5, (0, 1, 2, 3)))
    first, second = (draw(tensors(draw(broadcast_with(shape)), TYPES, mild_values)) for _ in range(2))
    name, function = draw(
        one_of(
            {
                "add": lambda a, b: a + b,
                "where": lambda a, b: torch.where(a > 0, b, a),
                "expand": lambda a, b: a.expand(torch.broadcast_shapes(a.shape, b.shape)) * 2,
                "compare": lambda a, b: (a == b) | (a < b),
                "tensors": lambda a, b: [t.clone() for t in torch.broadcast_tensors(a, b)],
                "fill": lambda a, b: a.expand(torch.broadcast_shapes(a.shape, b.shape)).masked_fill(b > 0, 1),
            }
        )
    )
    return Call(name, function, (first, second))


FAMILIES: dict[str, Callable[[], st.SearchStrategy[Call]]] = {
    f.__name__: f for f in (empty, arranged, sliced, indexed, written, sized, stretched)
}

UNSUPPORTED = (
    "TensorRT has floats only",
    "a symbolic kernel",
    "a float that was made of a symbolic size",
    "the size Abs",
    "ToFloat",  # the size of a range whose step is no whole number
)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family: str, dynamic: bool) -> None:
    @hypothesis.given(FAMILIES[family](), st.integers(0, 3))
    def agree(call: Call, build: int) -> None:
        assert_agrees(call, dynamic=dynamic, build=build == 0, unsupported=UNSUPPORTED)

    agree()


# -- memory ------------------------------------------------------------------------------------------------------------

LAID_OUT: dict[str, Function] = {
    "transposed": lambda x: x.transpose(1, 2), "stretched": lambda x: x[:, :1].expand(x.shape),
    "steps": lambda x: x[::2, :, 1::2],
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 1), "row": lambda x: x[1], "behind": lambda x: x[1:],
    "part": lambda x: x[:, 1:3, :2], "0-D": lambda x: x[0, 0, 0], "none": lambda x: x[:, :0],
    "all stretched": lambda x: x[0, 0, 0].expand(3, 4), "new dim": lambda x: x[:, None].transpose(0, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LAID_OUT)
def test_inputs_with_any_strides(name: str) -> None:
    def f(x: torch.Tensor) -> Any:
        return x * 2 + 1, x.relu().sum(-1) if x.ndim else x.relu(), x.reshape(-1) * 3

    given = LAID_OUT[name](torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert_same(compiled(f, dynamic=name in ("transposed", "steps", "part"))(given), f(given))
    assert engine_calls() == 1
