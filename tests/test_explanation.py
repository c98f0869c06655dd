"""`explain` in full: each node's place, each engine's facts, the tables and the page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import trt_dynamo
from trt_dynamo.explanation import Explanation
from trt_dynamo.explanation_page import page

HOSTILE = "</script><script>alert(1)</script> <!-- @DATA@ & \" ' \\ é \u2028"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.erfinv(torch.tanh(self.up(x)) / 2))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "cache"))


def explained(model: nn.Module, *args: Any, **options: Any) -> Explanation:
    torch._dynamo.reset()
    return trt_dynamo.explain(model, *args, options={"min_segment_nodes": 1, **options})


def cut() -> Explanation:
    """The model with `tanh` in eager: three engines."""
    return explained(Model().eval(), torch.randn(3, 8), eager_ops="aten.tanh")


def test_each_node_has_its_place() -> None:
    found = cut()
    assert len(found.engines) == 3
    assert {node.name for node in found.nodes if node.engine} == {name for e in found.engines for name in e.nodes}
    eager = [node for node in found.nodes if not node.engine]
    assert [node.target for node in eager] == ["aten.tanh.default"] * 2
    assert all(node.reason == "the setting eager_ops" for node in eager)
    assert [node.modules for node in eager] == [(("blocks.0", "Block"),), (("blocks.1", "Block"),)]
    linear = next(node for node in found.nodes if node.target == "aten.addmm.default")
    assert linear.modules[-1] == ("blocks.0.up", "Linear")
    assert (linear.value, linear.bytes) == ("float32 [3, 16]", 3 * 16 * 4)
    assert "test_explanation.py" in linear.source
    turned = next(node for node in found.nodes if node.target == "aten.t.default")
    assert (turned.bytes, dict(turned.weights)) == (0, {"blocks.0.up.weight": 8 * 16 * 4})


def test_each_engine_has_its_facts() -> None:
    model = Model().eval()
    found = explained(model, torch.randn(3, 8))
    (engine,) = found.engines
    assert dict(engine.weights) == {name: value.nbytes for name, value in model.named_parameters()}
    assert engine.weight_bytes == sum(value.nbytes for value in model.parameters())
    assert (engine.inputs, engine.outputs) == (("float32 [3, 8]",), ("float32 [3, 8]",))
    assert (engine.ranges, engine.precision, engine.stored) == ({}, None, None)


def test_sizes_that_vary_are_named() -> None:
    x = torch.randn(3, 8)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=40)
    (engine,) = explained(Model().eval(), x).engines
    ((name, span),) = engine.ranges.items()
    assert span == (2, 3, 40)
    assert engine.inputs == (f"float32 [{name}, 8]",)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "fp16"}, {"weights": "inputs"}], ids=["native", "fp16", "inputs"]
)
def test_an_engine_in_the_cache_is_found(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_DYNAMO_RUNTIME", "reference")
    model, x = Model().eval(), torch.randn(3, 8)
    given = {"min_segment_nodes": 1, **options}
    with torch.no_grad():
        torch.compile(model, backend="tensorrt", options=given)(x)
    (engine,) = explained(model, x, **options).engines
    assert engine.stored is not None
    assert engine.stored.bytes > 0
    assert engine.stored.build_seconds is not None
    (other,) = explained(model, x, **options, optimization_level=1).engines
    assert other.stored is None
    with torch.no_grad():
        model.blocks[0].up.weight.add_(1)  # type: ignore[union-attr, operator]
    (changed,) = explained(model, x, **options).engines
    assert (changed.stored is None) == (options != {"weights": "inputs"})


def test_several_graphs_have_engines_of_their_own() -> None:
    class Broken(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            out: torch.Tensor = self.blocks[1](x)
            return out

    found = explained(Broken().eval(), torch.randn(3, 8), precision="fp16")
    names = ["graph_0.segment_0", "graph_1.segment_0"]
    assert [engine.name for engine in found.engines] == names
    assert [segment.name for segment in found.segments] == names
    assert [told.segment for told in found.precision] == names
    assert {node.engine for node in found.nodes} == set(names)


def test_the_tables_say_what_the_text_says() -> None:
    shown = io.StringIO()
    Console(file=shown, width=200).print(cut())
    text = shown.getvalue()
    for part in (
        "3 TensorRT engines",
        "segment_0",
        "aten.tanh.default",
        "the setting eager_ops",
        "test_explanation.py:",
    ):
        assert part in text


class TestPage:
    def data(self, text: str) -> Any:
        (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        return json.loads(found)

    def test_it_has_all_that_is_known(self, tmp_path: Path) -> None:
        found = cut()
        path = found.html(tmp_path / "page.html", "My <model>")
        text = path.read_text(encoding="utf-8")
        assert "<h1>My &lt;model&gt;</h1>" in text
        shown, plain = self.data(text), json.loads(json.dumps(found.as_dict()))
        assert shown["nodes"] == plain["nodes"]
        assert shown["engines"] == plain["engines"]

    def test_it_needs_no_other_file(self) -> None:
        text = page(cut().as_dict())
        assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
        assert not re.findall(r"(?:https?:)?//\w", re.sub(r'id="data">.*?</script>', "", text).replace("file://", ""))

    def test_no_text_of_a_model_is_markup(self) -> None:
        facts = cut().as_dict()
        facts["nodes"][0].update(source=f"a.py:1, {HOSTILE}", reason=HOSTILE)
        facts["breaks"] = [HOSTILE]
        text = page(facts, HOSTILE)
        assert "<script>alert" not in text
        shown = self.data(text)
        assert (shown["nodes"][0]["reason"], shown["breaks"]) == (HOSTILE, [HOSTILE])
        assert "@DATA@" in text

    def test_nothing_to_show(self) -> None:
        shown = self.data(page(Explanation((), 0, (), 0).as_dict()))
        assert (shown["nodes"], shown["engines"]) == ([], [])
