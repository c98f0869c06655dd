"""Sizes that depend on data: found by eager between two engines, or, where TensorRT has NonZero, inside of one.

Only TensorRT-RTX is installed where these run, and it builds no engine with NonZero. The fixture `full` takes the place
of TensorRT itself: it says yes for the flavor, and spares networks with NonZero the build, which the stand-in does not
need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

from tests.compiled import assert_same, compiled
from trt_dynamo import engine_making
from trt_dynamo.aten_converters import Network
from trt_dynamo.build import build
from trt_dynamo.errors import BuildError, EngineError
from trt_dynamo.profiles import Range, grown_for, range_of
from trt_dynamo.reference import ReferenceEngine
from trt_dynamo.reports import report
from trt_dynamo.runtime.results import found_result
from trt_dynamo.testing import check, refused

CPU = torch.device("cpu")


def capturing(yes: bool = True) -> Any:
    """Whether Dynamo takes ops with such results into its graphs, while it is entered."""
    return torch._dynamo.config.patch(capture_scalar_outputs=yes, capture_dynamic_output_shape_ops=yes)


def has_nonzero(network: Any) -> bool:
    return any(network.get_layer(i).type.name == "NON_ZERO" for i in range(network.num_layers))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TensorRT itself were installed, whose builder takes NonZero."""

    def build_all_but_nonzero(converted: Any, *args: Any, **keywords: Any) -> bytes:
        return b"no plan" if has_nonzero(converted.network.raw) else build(converted, *args, **keywords)

    monkeypatch.setattr("trt_dynamo.trt.has_data_dependent_sizes", lambda: True)
    monkeypatch.setattr(engine_making, "build", build_all_but_nonzero)


@pytest.fixture(params=["rtx", "full"])
def flavor(request: pytest.FixtureRequest) -> str:
    if request.param == "full":
        request.getfixturevalue("full")
    return str(request.param)


@pytest.fixture(params=["captured", "graph breaks"])
def captured(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether Dynamo captures ops with such results, or ends the graph at them, as it does by default."""
    yes = request.param == "captured"
    with capturing(yes):
        yield yes


# -- models ------------------------------------------------------------------------------------------------------------


def detector(features: torch.Tensor, weight: torch.Tensor) -> Any:
    found = (features @ weight).unflatten(-1, (4, 5)).flatten(0, 1)
    scores = found[:, 4].sigmoid()
    keep = scores > 0.5
    boxes, scores = found[keep, :4], scores[keep]
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return corners * scores[:, None], scores.sum(), boxes.relu() + 1


def best_of_found(scores: torch.Tensor, boxes: torch.Tensor) -> Any:
    keep = (scores > -1).nonzero().squeeze(1)
    torch._check(keep.shape[0] >= 3)
    values, order = scores[keep].topk(3)
    return values * 2, torch.gather(boxes[keep], 0, order[:, None].expand(-1, 4)) + 1


def masked_loss(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> Any:
    gap = (x - y).pow(2)
    return torch.masked_select(gap, mask).mean(), gap.sum()


def bag(ids: torch.Tensor, table: torch.Tensor) -> Any:
    rows = F.embedding(ids[ids > 10], table)
    return rows.sum(0) * 2, rows.relu().cumsum(0)


def experts(x: torch.Tensor, gate: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    share, chosen = (x @ gate).softmax(-1).topk(2, -1)
    share = share / share.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for number, weight in enumerate(weights):
        row, which = torch.where(chosen == number)
        out.index_add_(0, row, (x[row] @ weight).relu() * share[row, which, None])
    return out * 2


def packed_attention(x: torch.Tensor, mask: torch.Tensor) -> Any:
    tokens = x[mask]
    weights = (tokens @ tokens.t() / 8).softmax(-1)
    mixed = F.layer_norm(weights @ tokens, (8,))
    out = torch.zeros_like(x)
    out[mask] = mixed
    return out + 1, mixed.view(mixed.shape[0], 2, 4).transpose(0, 1) * 2


def written_back(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, mask] = y[:, mask] * 2 + 1
    return y.relu() + 1


def parts(x: torch.Tensor, scores: torch.Tensor) -> Any:
    above, below = x[scores > 0], x[scores <= 0]
    every = torch.cat([above, below, x])
    return every[:-1] * 3, every[1:] + every[:-1], torch.stack([above.sum(0), below.sum(0)]) * 2


def grouped(ids: torch.Tensor, x: torch.Tensor) -> Any:
    names, place, count = torch.unique(ids, return_inverse=True, return_counts=True)
    sums = torch.zeros(names.shape[0], 3).index_add(0, place, x)
    return sums / count[:, None], names * 2


def repeated(x: torch.Tensor, times: torch.Tensor) -> Any:
    y = x.exp().repeat_interleave(times, 0)
    return (y * 2).tanh(), y.flip(0) + 1


def first(x: torch.Tensor, count: torch.Tensor) -> Any:
    n = int(count.item())
    torch._check(n >= 0)
    torch._check(n <= x.shape[0])
    return x[:n] * 2 + 1, x[n:].exp(), torch.arange(n) * 2.5, x * n


def from_the_end(x: torch.Tensor, count: torch.Tensor) -> Any:
    n = int(count.item())
    return x[n:] * 2 + 1, x[:n].exp()


@dataclasses.dataclass(frozen=True)
class Model:
    """A function, the arguments of its i-th call, and whether all of it goes into one engine where there is NonZero."""

    function: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    whole: bool = True


def sorted_mask(size: int, count: int) -> torch.Tensor:
    return torch.arange(size).flip(0) < count


R = torch.randn
COUNTS = [5, 2, 0, 9, 1]
MODELS = {
    "detector": Model(detector, lambda i: (R(7, 16), R(16, 20) - (1e3 if i == 2 else 0))),
    "best_of_found": Model(best_of_found, lambda i: (R(30), R(30, 4)), whole=False),
    "masked_loss": Model(masked_loss, lambda i: (R(4, 5), R(4, 5), R(4, 5) > i - 2)),
    "bag": Model(bag, lambda i: (torch.randint(0, [50, 12, 5, 40, 12][i], (17,)), R(50, 8))),
    "experts": Model(experts, lambda i: (R(20, 8), R(8, 4) * (i + 1), [R(8, 8) for _ in range(4)])),
    "packed_attention": Model(packed_attention, lambda i: (R(3, 9, 8), R(3, 9) > i - 1)),
    "written_back": Model(written_back, lambda i: (R(2, 9, 3), sorted_mask(9, COUNTS[i]))),
    "parts": Model(parts, lambda i: (R(9, 3), torch.arange(9) - COUNTS[i])),
    "grouped": Model(grouped, lambda i: (torch.randint(0, i + 1, (13,)), R(13, 3)), whole=False),
    "repeated": Model(repeated, lambda i: (R(4, 3), torch.randint(0, [3, 5, 1, 2, 9][i], (4,))), whole=False),
    "first": Model(first, lambda i: (R(9, 6), torch.tensor(COUNTS[i])), whole=False),
    "from_the_end": Model(from_the_end, lambda i: (R(9, 6), torch.tensor(COUNTS[i] - 4)), whole=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_eager_whatever_is_found(name: str, flavor: str, captured: bool) -> None:
    model = MODELS[name]
    fast = compiled(model.function)
    with torch.no_grad():
        for i in range(len(COUNTS)):
            arguments = model.arguments(i)
            assert_same(fast(*arguments), model.function(*arguments))
    counts = report()
    assert counts["eager_calls"] == 0
    if captured:
        assert counts["engine_calls"] >= len(COUNTS)
        one_engine = flavor == "full" and model.whole
        assert (counts["engine_calls"] == len(COUNTS) and counts["engines_built"] == 1) or not one_engine


CUTS: dict[str, dict[str, Any]] = {
    "default": {"min_segment_nodes": 3},
    "movement": {"eager_ops": ("aten.view", "aten.cat", "aten.slice", "aten.index_put")},
    "arithmetic": {"eager_ops": ("aten.mul", "aten.exp", "aten.add", "aten.relu", "aten.mm")},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["detector", "packed_attention", "parts", "best_of_found"])
def test_any_cut_of_a_model_equals_eager(name: str, cut: str, full: None) -> None:
    """Sizes go from engines to eager and back."""
    model = MODELS[name]
    fast = compiled(model.function, **CUTS[cut])
    with torch.no_grad(), capturing():
        for i in range(len(COUNTS)):
            arguments = model.arguments(i)
            assert_same(fast(*arguments), model.function(*arguments))
    assert report()["eager_calls"] == 0 and report()["engine_calls"] > 0


@pytest.mark.parametrize("name", ["detector", "experts", "packed_attention", "parts"])
def test_eager_does_nothing_but_the_search(name: str) -> None:
    """With RTX: an engine before it, one after it."""
    told = explain_captured(MODELS[name])
    assert {reason.split(":")[0] for reason in told.values()} <= {
        "the size of its result depends on data, for which TensorRT-RTX has no engine",
        "in a run of fewer than min_segment_nodes=1 compute nodes",
    }
    assert told


def explain_captured(model: Model) -> dict[str, str]:
    from trt_dynamo import explain

    with capturing(), torch.no_grad():
        told = explain(model.function, *model.arguments(0), options={"min_segment_nodes": 1})
    return {f"{v.node} {v.target}": v.reason for v in told.eager}


# -- what TensorRT-RTX has and has not ---------------------------------------------------------------------------------


def found_places(*shape: int) -> Network:
    """A network that finds the elements of `x` that are not 0."""
    net = Network()
    x = net.input("x", torch.float32, shape)
    net.raw.mark_output(net.out(net.raw.add_non_zero(x.raw)).raw)
    net.raw.get_output(0).name = "y"
    return net


def test_rtx_does_not_build_it() -> None:
    """If this fails, RTX has learned it, and `has_data_dependent_sizes` is out of date."""
    net = found_places(3, 4)
    config = net.builder.create_builder_config()
    assert net.builder.build_serialized_network(net.raw, config) is None
    with refused("TensorRT-RTX has no engine"):
        check(lambda x: x.nonzero() * 2, R(3, 4), dynamic=True)


FOUND: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "nonzero": (lambda x: (x.nonzero() * 2).contiguous(), (R(5, 3).relu(),)),
    "nonzero of none": (lambda x: x.nonzero() * 2, (torch.zeros(4, 3),)),
    "nonzero of ints": (lambda x: (x.nonzero() * 2).contiguous(), (torch.tensor([[0, 3], [-1, 0]]),)),
    "argwhere": (lambda x: (torch.argwhere(x > 0) + 1).contiguous(), (R(5, 4),)),
    "where": (lambda x: [i * 2 for i in torch.where(x > 0)], (R(5, 4),)),
    "masked_select": (lambda x, m: x.masked_select(m) * 2, (R(5, 3), R(5, 3) > 0)),
    "masked_select, broadcast": (lambda x, m: x.masked_select(m) * 2, (R(5, 1), R(3) > 0)),
    "masked_select of a number": (lambda x, m: x.masked_select(m) * 2, (R(()), torch.tensor(True))),
    "a mask of two dims": (lambda x, m: x[m] * 2, (R(5, 3, 4), R(5, 3) > 0)),
    "a mask of later dims": (lambda x, m: x[:, m] * 2, (R(2, 5, 3), R(5, 3) > 0)),
    "a mask between": (lambda x, m: x[:, m] * 2, (R(2, 5, 3), R(5) > 0)),
    "a mask and an index": (lambda x, m: x[m, :, 1] * 2, (R(5, 3, 4), R(5) > 0)),
    "a mask of bytes": (lambda x, m: x[m.bool()] * 2, (R(5, 3), (R(5) > 0).byte())),
    "twice the same": (lambda x, m: x[m] @ x[m].t(), (R(5, 4), R(5) > 0)),
    "its size as a number": (lambda x, m: x[m].sum(0) * x[m].shape[0], (R(5, 4), R(5) > 0)),
    "a range of its size": (lambda x, m: x[m] + torch.arange(x[m].shape[0])[:, None], (R(5, 4), R(5) > 0)),
    "a reshape": (lambda x, m: x[m].reshape(-1, 2, 2).flatten(1).sum(-1) + 1, (R(5, 4), R(5) > 0)),
    "a reshape of none": (lambda x, m: x[m].view(x[m].shape[0], 2, 2) * 2, (R(5, 4), R(5) > 99)),
    "put": (lambda x, m: torch.index_put(x, [m], x[m] * 3) * 2, (R(5, 4), R(5) > 0)),
    "put nowhere": (lambda x, m: torch.index_put(x, [m], x[m] * 3) * 2, (R(5, 4), R(5) > 99)),
    "added": (lambda x, m: torch.index_put(x, [m], x[m] * 3, True) * 2, (R(5, 4), R(5) > 0)),
    "put with an index": (
        lambda x, m: torch.index_put(x, [m, torch.tensor(1)], x[m, 1] * 3) * 2,
        (R(5, 4), R(5) > 0),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_inside_of_an_engine(name: str, full: None) -> None:
    function, arguments = FOUND[name]
    checked = check(function, *arguments, dynamic=True, build_engines=False)
    assert len(checked.networks) == 1


def test_a_mask_is_searched_once(full: None) -> None:
    checked = check(lambda x, m: x[m] @ x[m].t() + x[m].sum(), R(5, 4), R(5) > 0, dynamic=True, build_engines=False)
    network = checked.networks[0].network.raw
    assert sum(network.get_layer(i).type.name == "NON_ZERO" for i in range(network.num_layers)) == 1


def test_a_size_that_only_the_engine_reads_stays_inside(full: None) -> None:
    checked = check(lambda x, m: x[m].view(x[m].shape[0], 2, 2).sum((1, 2)), R(5, 4), R(5) > 0, dynamic=True,
                    build_engines=False)  # fmt: skip
    calls = [node for node in checked.partitioned.module.graph.nodes if node.op == "call_function"]
    assert [node.target.__name__ for node in calls] == ["getitem"]


# -- on every flavor, by running counts --------------------------------------------------------------------------------

STATIC: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "nonzero_static": (lambda x: torch.nonzero_static(x, size=7), (R(4, 3).relu(),)),
    "too few": (lambda x: torch.nonzero_static(x, size=20, fill_value=-5), (R(4, 3) > 0,)),
    "too many": (lambda x: torch.nonzero_static(x, size=2), (torch.ones(4, 3, 2, dtype=torch.int32),)),
    "none": (lambda x: torch.nonzero_static(x, size=3), (torch.zeros(4),)),
    "histc": (lambda x: torch.histc(x, 6, -1.0, 2.0), (torch.cat([R(40), torch.tensor([-1.0, 2.0, 5.0])]),)),
    "histc of two dims": (lambda x: torch.histc(x, 3, 0, 1), (torch.rand(5, 6),)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", STATIC)
def test_a_search_of_static_size(name: str, dynamic: bool) -> None:
    function, arguments = STATIC[name]
    check(function, *arguments, dynamic=dynamic)


def test_no_search_no_elements() -> None:
    check(lambda x: torch.nonzero_static(x, size=2), torch.zeros(0, 3))
    check(lambda x: torch.nonzero_static(x, size=0), R(2, 3))
    with refused("edges of its bins depend on data"):
        check(lambda x: torch.histc(x, 4), R(9))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_rows_written_to_a_mask(count: int) -> None:
    """With RTX: eager finds the rows, an engine writes them back."""

    def f(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.index_put(x, [mask], x[mask] * 3) + 1

    checked = check(f, R(5, 4), sorted_mask(5, count), dynamic=True, whole=False)
    assert any("index_put" in name for s in checked.partitioned.segments for name in s.nodes)


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_the_range_of_what_was_never_seen() -> None:
    env = ShapeEnv()
    free, checked, closed, huge = (env.create_unbacked_symint() for _ in range(4))
    torch._check(checked >= 4)
    torch._check(closed <= 100)
    torch._check(huge <= 10**9)
    symbols = [size.node.expr for size in (free, checked, closed, huge)]
    found = [range_of(symbol, env) for symbol in symbols]
    assert [(r.min, r.max) for r in found] == [(0, 64), (4, 64), (0, 100), (0, 2**16)]
    assert all(r.min <= r.opt <= r.max for r in found)
    assert range_of(symbols[2], env, is_number=True) == Range(0, 1, 100)


def test_sums_of_sizes_grow_together() -> None:
    env = ShapeEnv()
    a, b = env.create_unbacked_symint(), env.create_unbacked_symint()
    torch._check(a >= 0)
    torch._check(b >= 0)
    ranges = {size.node.expr: Range(2, 3, 10) for size in (a, b)}
    for number in (0, 3, 20, 21, 1000, 2**31):
        wider = grown_for(ranges, [a + b], [number])
        assert number > 2**30 or number in Range(*(sum(getattr(r, end) for r in wider.values()) for end in ENDS))
        assert (wider == ranges) == (number == 20)
    assert grown_for(ranges, [2 * a + 1], [101]) == {**ranges, a.node.expr: Range(2, 50, 50)}


ENDS = ("min", "opt", "max")


def test_any_number_can_be_found(flavor: str) -> None:
    """From none to thousands: eager answers no call, and the builds are few."""

    def f(x: torch.Tensor) -> Any:
        found = x[x > 0]
        return found.exp() + 1, found * found.shape[0], (x + 1).sum()

    sizes = [3, 7, 0, 300, 2, 5000, 4999, 40000, 1]
    fast = compiled(f, dynamic=True)
    with torch.no_grad(), capturing():
        for size in sizes:
            x = torch.cat([torch.ones(size), -torch.ones(5)])
            assert_same(fast(x), f(x))
    counts = report()
    assert counts["eager_calls"] == 0 and counts["graphs"] == 1
    assert counts["engines_built"] <= (8 if flavor == "rtx" else 5)


@pytest.mark.parametrize("strict", [False, True])
def test_where_no_wider_engine_can_be_built_the_narrow_one_stays(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(converted: Any, profile: Any, *args: Any, **keywords: Any) -> bytes:
        if any(max(largest, default=0) > 100 for _, _, largest in profile.values()):
            raise BuildError("too wide")
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", narrow)
    fast = compiled(lambda x: x.exp() + 1, dynamic=True, strict=strict)
    with torch.no_grad():
        for size in (5, 50, 200, 7, 300, 60):
            x = R(size)
            assert_same(fast(x), x.exp() + 1)
    assert report()["engine_calls"] == 4 and report()["eager_calls"] == 2
    assert report()["engines_built"] == 1


def test_a_check_of_the_user_is_kept(flavor: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        found = x[x > 0]
        torch._check(found.shape[0] <= 4)
        return found.exp() * 2

    fast = compiled(f)
    with torch.no_grad(), capturing():
        x = torch.tensor([1.0, -1.0, 2.0, -3.0, -2.0, -1.0])
        assert_same(fast(x), f(x))
        with pytest.raises(RuntimeError, match="u0 <= 4"):
            fast(-x + 4)


CHOICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": lambda y: y.max() + 1,
    "max along": lambda y: y.max(0)[0] + 1,
    "amin": lambda y: y.amin(0) + 1,
    "argmax": lambda y: y.argmax() + 1,
    "topk": lambda y: y.topk(2)[0] + 1,
    "kthvalue": lambda y: y.kthvalue(1)[0] + 1,
    "median": lambda y: y.median() + 1,
    "median along": lambda y: y.median(0)[0] + 1,
    "nanmedian": lambda y: y.nanmedian() + 1,
    "mode": lambda y: y.mode()[0] + 1,
    "the first": lambda y: y[0] * 2,
    "sort": lambda y: y.sort()[0] * 2,
    "mean": lambda y: y.mean() * 2,
    "softmax": lambda y: y.softmax(0) * 2,
    "logsumexp": lambda y: y.logsumexp(0) * 2,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_among_none_raises_as_eager_does(name: str, flavor: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return CHOICES[name](x[x > 0] * 2)

    fast = compiled(f)
    with torch.no_grad(), capturing():
        assert_same(fast(torch.arange(6.0) - 2), f(torch.arange(6.0) - 2))
        nothing = -torch.ones(6)
        try:
            expected = f(nothing)
        except (RuntimeError, IndexError):
            with pytest.raises((RuntimeError, IndexError), match=r"u0|non-zero size|numel\(\) == 0"):
                fast(nothing)
        else:
            assert_same(fast(nothing), expected)


def test_a_size_that_leaves_as_a_number(flavor: str) -> None:
    def f(x: torch.Tensor) -> Any:
        found = x[x > 0] * 2
        return found + 1, found.shape[0], torch.zeros(found.shape[0] + 2, 3) + 1

    fast = compiled(f)
    with torch.no_grad(), capturing():
        for x in (R(9), R(9), -R(9).abs()):
            assert_same(fast(x), f(x))


# -- results whose size the engine finds -------------------------------------------------------------------------------


def test_results_do_not_share_memory_with_later_ones(full: None) -> None:
    fast = compiled(lambda x: (x[x > 0] * 2, x.sum() + 1))
    with torch.no_grad(), capturing():
        given = [R(50) for _ in range(5)]
        results = [fast(x)[0] for x in given]
    for x, result in zip(given, results, strict=True):
        assert_same(result, x[x > 0] * 2)
    assert len({r.untyped_storage().data_ptr() for r in results}) == len(results)
    assert report()["engine_calls"] == 5


def test_a_result_found_in_less_than_was_asked_for() -> None:
    """TensorRT may ask for the most that there can be."""
    found: Any = found_result("y", CPU)
    found.start(None)
    address = found.reallocate_output("y", 0, 4 * 2**20, 256)
    assert address % 256 == 0
    found.notify_shape("y", (2, 3))
    memory = found.memory
    memory.view(torch.float32)[:6] = torch.arange(6.0)
    result = found.take(torch.float32)
    assert_same(result, torch.arange(6.0).view(2, 3))
    assert result.untyped_storage().nbytes() == 24  # a copy: the large memory goes back
    found.start(None)
    with pytest.raises(EngineError, match="neither memory nor shape"):
        found.take(torch.float32)
    found.reallocate_output_async("y", 0, 1, 256, 0)
    found.notify_shape("y", (2, 0))
    assert found.take(torch.float32).shape == (2, 0)
    found.reallocate_output_async("y", 0, 8, 256, 0)
    found.notify_shape("y", (3,))
    with pytest.raises(EngineError, match="in memory of 8 bytes"):
        found.take(torch.float32)


def test_the_stand_in_knows_the_most_that_can_be_found() -> None:
    context = ReferenceEngine(found_places(3, 4).raw, device=CPU).create_execution_context()
    assert context.get_max_output_size("y") == 2 * 12 * 4
    assert context.get_max_output_size("x") == -1


# -- on a GPU ----------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def moved(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda x: x.cuda(), value)


class TestOnTheDevice:
    pytestmark = on_gpu

    @pytest.mark.parametrize(
        "name", ["detector", "masked_loss", "experts", "packed_attention", "written_back", "parts"]
    )
    def test_a_model_equals_eager(self, name: str, flavor: str) -> None:
        model = MODELS[name]
        fast = compiled(model.function)
        with torch.no_grad(), capturing():
            for i in range(len(COUNTS)):
                arguments = moved(model.arguments(i))
                assert_same(fast(*arguments), model.function(*arguments))
        assert report()["eager_calls"] == 0

    def test_memory_that_was_found_belongs_to_the_caller(self, full: None) -> None:
        """On the default stream, where a stream of ours writes it, and on others, while memory comes and goes."""

        def f(x: torch.Tensor) -> Any:
            found = x[x > 0]
            return found * 2, found.exp().cumsum(0)

        fast = compiled(f)
        streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(2))]
        with torch.no_grad(), capturing():
            fast(R(4000, device="cuda"))
            for _ in range(20):
                results = []
                for stream in streams:
                    stream.wait_stream(torch.cuda.default_stream())
                    with torch.cuda.stream(stream):
                        x = R(4000, device="cuda")
                        results.append((fast(x), f(x)))
                        del x
                        R(4000, device="cuda").mul_(3)
                torch.cuda.synchronize()
                for ours, eager in results:
                    assert_same(ours, eager)
        assert report()["eager_calls"] == 0
