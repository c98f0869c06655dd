"""Ranges from real traffic: what is recorded, how it is kept in a file, and what graphs and engines come of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiled import assert_same, compiled, in_threads
from trt_dynamo import RecordedShapes, SettingsError, explain, record_shapes
from trt_dynamo.build import build
from trt_dynamo.recorded_shapes import APPLIED
from trt_dynamo.reports import report


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        return y if mask is None else y * mask


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def mixed(first: torch.Tensor, *rest: Any, pair: Any = None, **more: Any) -> Any:
    total = first.sum(1) + rest[0]["a"][0] + more["bias"]
    return total if pair is None else total + pair.left * pair.right


def rows(n: int, width: int = 6) -> torch.Tensor:
    return torch.randn(n, width)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A file that says that `Net` gets from 3 to 20 rows, mostly 8."""
    file = tmp_path / "sizes.json"
    file.write_text('{"x": [{"min": 3, "opt": 8, "max": 20}, 6]}')
    return file


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The profiles of all engines that are built from now on."""
    from trt_dynamo import engine_making

    found: list[dict[str, Any]] = []

    def watched(converted: Any, profile: dict[str, Any], *args: Any, **keywords: Any) -> bytes:
        found.append(profile)
        return build(converted, profile, *args, **keywords)

    monkeypatch.setattr(engine_making, "build", watched)
    return found


def of_rows(profiles: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """What each engine was built for in the first dim of its first input: min, opt, max."""
    return [tuple(shape[0] for shape in next(iter(profile.values()))) for profile in profiles]


# -- what is recorded --------------------------------------------------------------------------------------------------


def in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="tensorrt", options={"runtime": "reference", "min_segment_nodes": 1})
    return net


WAYS: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {
    "a module": lambda net: (net, net),
    "a compiled module": lambda net: ((fast := compiled(net)), fast),
    "a module, called as compiled": lambda net: (net, compiled(net)),
    "a module compiled in place": lambda net: ((fast := in_place(net)), fast),
    "a compiled method": lambda net: ((fast := compiled(net.forward)), fast),
    "a module compiled by another backend": lambda net: ((fast := torch.compile(net, backend="eager")), fast),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh())])
def test_calls_are_recorded(way: str, make: Callable[[], nn.Module]) -> None:
    net = make()
    model, called = WAYS[way](net)
    twin = make()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        called(rows(50))
        with record_shapes(model) as seen:
            for n in (8, 3, 8, 20, 5):
                x = rows(n)
                assert_same(called(x), twin(x))
        called(rows(70))
    (name,) = seen.ranges
    assert seen.ranges == {name: [{"min": 3, "opt": 8, "max": 20}, 6]} and seen.calls == 5
    assert name == ("x" if make is Net else "input")


def test_each_tensor_has_a_name() -> None:
    fast = torch.compile(mixed, backend="eager")
    with record_shapes(fast) as seen:
        for n in (2, 7):
            fast(rows(n), {"a": [torch.randn(n), 3]}, pair=Pair(torch.randn(n), torch.randn(())), bias=torch.ones(1))
    both = {"min": 2, "opt": 7, "max": 7}
    assert seen.ranges == {
        "first": [both, 6], "rest.0.a.0": [both], "pair.left": [both], "pair.right": [], "more.bias": [1],
    }  # fmt: skip


def test_arguments_by_position_and_by_name_are_the_same() -> None:
    net = Net()
    with record_shapes(net) as seen:
        net(rows(3), torch.ones(4))
        net(mask=torch.ones(5, 4), x=rows(5))
        net(x=rows(4))
    assert seen.ranges == {"x": [{"min": 3, "opt": 5, "max": 5}, 6]}, "mask came with two ranks"


def test_a_call_that_fails_fails_as_before() -> None:
    net = Net()
    with record_shapes(net) as seen, pytest.raises(TypeError, match="unexpected keyword"):
        net(rows(3), masque=None)
    assert seen.ranges == {} and net(rows(2)).shape == (2, 4)


def test_nothing_stays_behind_when_the_block_fails() -> None:
    net, fast = Net(), torch.compile(mixed, backend="eager")
    before = [cell.cell_contents for cell in fast.__closure__ or ()]
    for model in (net, in_place(Net()), fast):
        with pytest.raises(ZeroDivisionError), record_shapes(model) as seen:
            raise ZeroDivisionError
        assert seen.calls == 0
    assert not net._forward_pre_hooks
    assert before and [cell.cell_contents for cell in fast.__closure__ or ()] == before


def test_a_plain_function_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"call note\(\.\.\.\)"), record_shapes(mixed):
        pass
    seen = RecordedShapes(mixed)
    seen.note(rows(4), {"a": [torch.ones(4)]}, bias=torch.ones(1))
    assert seen.ranges["first"] == [4, 6]


def test_what_was_recorded_in_threads() -> None:
    net = Net()
    with record_shapes(net) as seen, torch.no_grad():
        in_threads(8, lambda number: [net(rows(2 + number)) for _ in range(50)])
    assert seen.calls == 400
    assert seen.ranges["x"][0] == {"min": 2, "opt": 9, "max": 9}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_file_is_readable_and_comes_back(tmp_path: Path) -> None:
    net, file = Net(), tmp_path / "sizes.json"
    with record_shapes(net) as seen:
        for n in (8, 3, 8, 20):
            net(rows(n), torch.ones(n, 4))
    seen.save(file)
    assert file.read_text().splitlines()[1] == '  "x": [{"min": 3, "opt": 8, "max": 20}, 6],'
    loaded = RecordedShapes.load(file)
    assert loaded.ranges == seen.ranges
    with pytest.raises(TypeError, match="read from a file"):
        loaded.note(rows(3))


def test_a_file_by_hand_may_say_less(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"x": {"0": {"min": 1, "max": 9}}, "y": [4, {"min": 0, "max": 0}]}')
    assert RecordedShapes.load(file).ranges == {"x": {"0": {"min": 1, "opt": 9, "max": 9}}, "y": [4, 0]}
    file.write_text('{"x": {"1": {"min": 1, "max": 9}}}')
    assert RecordedShapes.load(file).ranges == {"x": {"1": {"min": 1, "opt": 9, "max": 9}}}


WRONG: dict[str, tuple[str, str]] = {
    "no JSON": ('{"x": [', "is no JSON"),
    "cut off": ('{"x": [{"min": 3, "opt', "is no JSON"),
    "binary": ("\x00\x01", "is no JSON"),
    "a list": ("[1, 2]", "must hold an object"),
    "a number": ('{"x": 5}', "expected a list"),
    "a word": ('{"x": "3..5"}', "expected a list"),
    "no max": ('{"x": [{"min": 3}]}', "x, dim 0: expected a size, or"),
    "another key": ('{"x": [{"min": 3, "max": 5, "mx": 4}]}', "x, dim 0: expected a size, or"),
    "contradicting": ('{"x": [6, {"min": 9, "max": 5}]}', "x, dim 1: it must be that min <= opt <= max"),
    "opt outside": ('{"x": [{"min": 3, "opt": 2, "max": 5}]}', "it must be that min <= opt <= max"),
    "negative": ('{"x": [{"min": -3, "max": 5}]}', "must be whole numbers"),
    "a fraction": ('{"x": [2.5]}', "expected a size, or"),
    "a bool": ('{"x": [true]}', "expected a size, or"),
    "too large": ('{"x": [{"min": 1, "max": 9999999999}]}', "must be whole numbers"),
    "no dim": ('{"x": {"rows": 5}}', "'rows' is no dim"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_names_the_place_and_the_model_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text, words = WRONG[name]
    file = tmp_path / "sizes.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        RecordedShapes.load(file)
    monkeypatch.setenv("TRT_DYNAMO_PROFILES", str(file))
    net, x = Net(), rows(5)
    with torch.no_grad():
        assert_same(compiled(net)(x), net(x))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert words in warning and str(file) in warning
    assert report()["engine_calls"] == 1


def test_a_missing_file_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRT_DYNAMO_PROFILES", str(tmp_path / "no.json"))
    net = Net()
    with torch.no_grad():
        for n in (3, 4):
            fast, x = compiled(net), rows(n)
            assert_same(fast(x), net(x))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "no.json cannot be read" in warning and "record_shapes makes one, or unset profiles" in warning


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"x": [{"min": 3, "max": 9}, 6, 1]}', "the ranges for x are of 3 dims, it has 2"),
        ('{"x": {"2": {"min": 3, "max": 9}}}', "the ranges for x are of 3 dims, it has 2"),
        ('{"x": [{"min": 3, "max": 9}]}', "the ranges for x are of 1 dims, it has 2"),
        ('{"x": [{"min": 3, "max": 9}, 7]}', "dim 1 of x is 6, and always 7"),
    ],
)
def test_a_file_for_another_model_is_said(
    text: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "sizes.json"
    file.write_text(text)
    net, x = Net(), rows(5)
    with torch.no_grad():
        assert_same(compiled(net, profiles=file)(x), net(x))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert words in warning


def test_a_file_that_changes_is_read_again(recorded: Path, profiles: list[Any]) -> None:
    with torch.no_grad():
        compiled(Net(), profiles=recorded)(rows(5))
        recorded.write_text('{"x": [{"min": 2, "opt": 9, "max": 1000}, 6]}')
        torch._dynamo.reset()
        compiled(Net(), profiles=recorded)(rows(5))
    assert of_rows(profiles) == [(3, 8, 20), (2, 9, 1000)]


# -- what comes of it --------------------------------------------------------------------------------------------------


def test_the_first_call_makes_the_one_graph_and_engine(recorded: Path, profiles: list[Any]) -> None:
    net = Net()
    fast = compiled(net, profiles=recorded)
    with torch.no_grad():
        for n in (5, 3, 20, 8, 6):
            x = rows(n)
            assert_same(fast(x), net(x))
            assert not vars(x), "no mark stays on a tensor of the caller's"
    counts = report()
    assert counts["graphs"] == counts["engines_built"] == 1
    assert counts["engine_calls"] == 5 and counts["eager_calls"] == 0
    assert of_rows(profiles) == [(3, 8, 20)]


def test_a_size_outside_is_answered_and_followed(recorded: Path, profiles: list[Any]) -> None:
    net = Net()
    fast = compiled(net, profiles=recorded)
    with torch.no_grad():
        for n in (50, 3, 2, 41, 8):
            x = rows(n)
            assert_same(fast(x), net(x))
    assert report()["graphs"] == 1
    assert of_rows(profiles)[0] == (3, 8, 20) and len(profiles) == 3


def test_the_environment_names_the_file(recorded: Path, profiles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_DYNAMO_PROFILES", str(recorded))
    with torch.no_grad():
        compiled(Net())(rows(5))
        assert of_rows(profiles) == [(3, 8, 20)]


@pytest.mark.parametrize("way", ["the environment", "the option", "applied"])
def test_explain_tells_the_recorded_ranges(way: str, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the backend would use them: one graph, though the sizes of this call alone make a static one."""
    net = Net().eval()
    options: dict[str, Any] = {"min_segment_nodes": 1}
    assert explain(net, rows(5), options=options).sizes == ()
    torch._dynamo.reset()
    if way == "the environment":
        monkeypatch.setenv("TRT_DYNAMO_PROFILES", str(recorded))
    elif way == "the option":
        options["profiles"] = recorded
    else:
        RecordedShapes.load(recorded).apply(net)
    found = explain(net, rows(5), options=options)
    assert found.graphs == 1 and len(found.sizes) == 1 and "3 to 20 (best: 8)" in found.sizes[0]
    assert found.sizes[0] in str(found) and found.as_dict()["sizes"] == list(found.sizes)
    assert report()["engines_built"] == 0


def test_a_size_of_one_is_a_graph_of_its_own(tmp_path: Path, profiles: list[Any]) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"x": [{"min": 0, "opt": 8, "max": 20}, 6]}')
    net = Net()
    fast = compiled(net, profiles=file)
    with torch.no_grad():
        for n in (1, 8, 20, 0, 5, 1):
            x = rows(n)
            assert_same(fast(x), net(x))
    assert of_rows(profiles) == [(1, 1, 1), (2, 8, 20), (0, 0, 0)]


def test_equal_sizes_at_first_are_not_taken_for_one(tmp_path: Path, profiles: list[Any]) -> None:
    file = tmp_path / "sizes.json"
    span = {"min": 2, "opt": 8, "max": 32}
    file.write_text(json.dumps({"x": [span, {**span, "max": 64}]}))

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + x.sum(0)

    fast = compiled(f, profiles=file)
    with torch.no_grad():
        for shape in ((8, 8), (8, 9), (32, 64), (2, 3)):
            x = torch.randn(shape)
            assert_same(fast(x), f(x))
    assert report()["graphs"] == 1 and len(profiles) == 1
    assert list(profiles[0].values()) == [((2, 2), (8, 8), (32, 64))]


def test_inputs_that_share_a_size_get_a_range_for_both(tmp_path: Path, profiles: list[Any]) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"x": [{"min": 3, "max": 8}, 6], "mask": [{"min": 2, "opt": 4, "max": 16}, 4]}')
    net = Net()
    fast = compiled(net, profiles=file)
    with torch.no_grad():
        for n in (5, 16, 2):
            x, mask = rows(n), torch.ones(n, 4)
            assert_same(fast(x, mask=mask), net(x, mask))
    assert report()["graphs"] == 1 and len(profiles) == 1
    assert {tuple(s[0] for s in spans) for spans in profiles[0].values()} == {(2, 8, 16)}


def test_a_dim_that_the_model_makes_a_constant(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"x": [{"min": 2, "max": 8}, {"min": 2, "max": 9}]}')

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * int(x.shape[0]) if x.shape[0] in (3, 5) else x.exp()

    fast = compiled(f, profiles=file)
    with torch.no_grad():
        for shape in ((3, 4), (3, 9), (5, 4), (7, 4), (2, 4)):
            x = torch.randn(shape)
            assert_same(fast(x), f(x))
            assert not vars(x)
    assert report()["eager_calls"] == 0


def test_marks_of_the_user_stay(recorded: Path, profiles: list[Any]) -> None:
    x, y = rows(5), rows(5)
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.maybe_mark_dynamic(y, 1)
    before = [
        {name: set(value) if isinstance(value, set) else value for name, value in vars(t).items()} for t in (x, y)
    ]
    recorded.write_text('{"x": {"0": {"min": 3, "max": 20}}}')
    fast = compiled(lambda x: x.exp() + 1, profiles=recorded, cache="off")
    for tensor in (x, y):
        fast(tensor)
        torch._dynamo.reset()
    assert [vars(t) for t in (x, y)] == before
    assert [next(iter(profile.values()))[2] for profile in profiles] == [(20, 64), (20, 64)]


def test_floats_and_whole_graphs(tmp_path: Path, profiles: list[Any]) -> None:
    """A float makes Dynamo trace again too."""
    file = tmp_path / "sizes.json"
    file.write_text('{"x": [{"min": 3, "opt": 8, "max": 20}, 6]}')

    def f(x: torch.Tensor, scale: float, n: int) -> torch.Tensor:
        return (x * scale).tanh() + n

    options: dict[str, Any] = {"runtime": "reference", "min_segment_nodes": 1, "profiles": file}
    fast = torch.compile(f, backend="tensorrt", fullgraph=True, options=options)
    with torch.inference_mode():
        for n, scale in ((5, 0.5), (7, 0.25), (3, 2.5), (20, -1.0)):
            x = rows(n)
            assert_same(fast(x, scale, n), f(x, scale, n))
    assert set(of_rows(profiles)) == {(3, 8, 20)} and report()["eager_calls"] == 0


def test_a_transformer_and_its_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config).eval()

    def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(50, (batch, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    traffic = [(8, 12), (3, 5), (8, 31), (2, 12)]
    with torch.no_grad(), record_shapes(model) as seen:
        for batch, length in traffic:
            model(**tokens(batch, length))
    spans = [{"min": 2, "opt": 8, "max": 8}, {"min": 5, "opt": 12, "max": 31}]
    assert seen.ranges == {"input_ids": spans, "attention_mask": spans}
    seen.save(tmp_path / "sizes.json")
    fast = compiled(model, profiles=tmp_path / "sizes.json")
    with torch.no_grad():
        for batch, length in traffic:
            given = tokens(batch, length)
            assert_same(fast(**given).last_hidden_state, model(**given).last_hidden_state)
    counts = report()
    assert counts["graphs"] == 1 and counts["rebuilds"] == 0 and counts["eager_calls"] == 0


def test_static_shapes_stay_static_where_the_user_says_so(recorded: Path, profiles: list[Any]) -> None:
    fast = compiled(Net(), dynamic=False, profiles=recorded)
    with torch.no_grad():
        for n in (5, 6):
            fast(rows(n))
    assert of_rows(profiles) == [(5, 5, 5), (6, 6, 6)]


def test_dynamic_shapes_take_the_ranges_too(recorded: Path, profiles: list[Any]) -> None:
    with torch.no_grad():
        compiled(Net(), dynamic=True, profiles=recorded)(rows(5))
    assert of_rows(profiles) == [(3, 8, 20)]


def test_after_a_graph_break_the_usual_rule_holds(recorded: Path, profiles: list[Any]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x) + 1
        torch._dynamo.graph_break()
        x = torch.cat([y, y]) * 2
        torch._dynamo.graph_break()
        return x.exp() + y.sum()

    fast = compiled(f, profiles=recorded)
    with torch.no_grad():
        for n in (5, 7, 3):
            x = rows(n)
            assert_same(fast(x), f(x))
    assert of_rows(profiles)[0] == (3, 8, 20)
    assert report()["eager_calls"] == 0


def test_names_come_through_decorators_and_containers(tmp_path: Path, profiles: list[Any]) -> None:
    def logged(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            return f(*args, **kwargs)

        return call

    class Model(nn.Module):
        @logged
        def forward(self, batch: Mapping[str, torch.Tensor], *images: torch.Tensor, **more: Any) -> torch.Tensor:
            scale: torch.Tensor = more["scale"][0]
            return batch["ids"].tanh() + images[0].sum(1) * scale

    model = Model()

    def arguments(n: int) -> Any:
        return ({"ids": torch.randn(n)}, rows(n)), {"scale": (torch.ones(n),)}

    with record_shapes(model) as seen:
        for n in (8, 3, 8, 20):
            model(*arguments(n)[0], **arguments(n)[1])
    assert list(seen.ranges) == ["batch.ids", "images.0", "more.scale.0"]
    seen.save(tmp_path / "sizes.json")
    fast = compiled(Model(), profiles=tmp_path / "sizes.json")
    with torch.no_grad():
        for n in (5, 20, 3):
            args, keywords = arguments(n)
            assert_same(fast(*args, **keywords), model(*args, **keywords))
    assert report()["graphs"] == 1 and of_rows(profiles) == [(3, 8, 20)]


def test_what_is_applied_goes_to_that_model_only(profiles: list[Any]) -> None:
    mine, other = Net(), Net()
    with torch.no_grad():
        with record_shapes(mine) as seen:
            for n in (8, 3, 8, 20):
                mine(rows(n))
        seen.apply()
        compiled(mine)(rows(5))
        torch._dynamo.reset()
        compiled(other)(rows(5))
    assert of_rows(profiles) == [(3, 8, 20), (5, 5, 5)]
    del mine, seen
    torch._dynamo.reset()
    __import__("gc").collect()
    assert not APPLIED


def test_what_is_applied_to_a_function(profiles: list[Any]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + 1

    fast = compiled(f)
    with record_shapes(fast) as seen:
        for n in (3, 20, 20):
            fast(rows(n))
    seen.apply()
    torch._dynamo.reset()
    profiles.clear()
    again = compiled(f)
    for n in (5, 20, 3):
        again(rows(n))
    assert of_rows(profiles) == [(3, 20, 20)]


def test_a_file_is_applied_to_a_model(recorded: Path, profiles: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    recorded.write_text(recorded.read_text().replace('"x"', '"input"'))
    RecordedShapes.load(recorded).apply(compiled(net))
    with torch.no_grad():
        compiled(net)(rows(5))
    assert of_rows(profiles) == [(3, 8, 20)]
    with pytest.raises(TypeError, match="give the model"):
        RecordedShapes.load(recorded).apply()


def test_a_graph_that_gradients_may_follow_is_let_alone(recorded: Path) -> None:
    net, x = Net(), rows(5)
    fast = compiled(net, profiles=recorded)
    assert_same(fast(x), net(x))
    fast(x).sum().backward()
    assert net.linear.weight.grad is not None and not vars(x)
