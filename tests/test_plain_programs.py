"""The short way from an exported program to its functional graph: the graph is AOTAutograd's, or there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

from trt_dynamo import engine_file, export_engine
from trt_dynamo.engine_file import with_plain_results, with_weights
from trt_dynamo.exported import Lifted, lift, lowered
from trt_dynamo.lowering import Lowered
from trt_dynamo.lowering.plain_programs import functional
from trt_dynamo.settings import Settings


class Calls(nn.Module):
    """A function with a weight and a buffer to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("steps", torch.arange(4.0))

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def lifted(model: nn.Module, *args: Any, **keywords: Any) -> Lifted:
    with torch.no_grad():
        program = torch.export.export(model.eval(), args, **keywords)
    return with_plain_results(lift(program))[0]


def by_aot(program: Lifted) -> Lowered:
    found: list[Lowered] = []

    def keep(graph: Lowered) -> Callable[..., Any]:
        found.append(graph)
        return graph.module.forward

    with torch.no_grad():
        lowered(program, Settings(), keep)
    return found[0]


def described(module: GraphModule) -> list[tuple[Any, ...]]:
    """Each node: its op, its arguments by number, its shape, dtype and strides."""
    numbers = {node: f"#{index}" for index, node in enumerate(module.graph.nodes)}
    found = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        form = (tuple(value.shape), value.dtype, value.stride()) if isinstance(value, torch.Tensor) else None
        arguments = torch.fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        target = node.target if node.op == "call_function" else node.op
        found.append((str(target), str(arguments), form))
    return found


def fill(self: Calls, x: torch.Tensor) -> torch.Tensor:
    mask = x.new_zeros(2, 4)
    mask[:, 1:3].fill_(1)
    mask[0] += 2
    return x * mask


def several(self: Calls, x: torch.Tensor) -> Any:
    first, second = (x @ self.weight).chunk(2, -1)
    values, places = x.sort()
    return {"a": first, "b": (second.relu_(), values), "c": places, "x": x, "w": self.weight, "n": None}


IMAGE = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
)
x = torch.randn(2, 4)
PLAIN: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "linear": (Calls(lambda self, x: F.linear(x, self.weight).sigmoid()), (x,)),
    "image": (IMAGE, (torch.randn(2, 3, 12, 12),)),
    "channels_last": (IMAGE, (torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last),)),
    "writes to what it made": (Calls(fill), (x,)),
    "views written to": (Calls(lambda self, x: (y := x + 1, y.t().add_(1), y.view(-1)[::2].mul_(3))[0] * 2), (x,)),
    "several results": (Calls(several), (x,)),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (torch.randn(2, 3, 4),)),
    "buffers and constants": (Calls(lambda self, x: x[:, torch.tensor([2, 0])] + self.steps[:2]), (x,)),
    "numbers": (Calls(lambda self, x, a, b: (x * a).clamp(max=b) + self.weight[0]), (x, 2, 0.5)),
    "complex": (Calls(lambda self, x: torch.fft.rfft(x).abs()), (x,)),
    "dropout": (Calls(lambda self, x: F.dropout(x, 0.5, training=False) + torch.rand_like(x) * 0), (x,)),
    "recurrent": (nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), (torch.randn(2, 5, 4),)),
    "matrix products": (Calls(lambda self, x: x.expand(3, 2, 4) @ x.t() @ x[:, 0] + self.weight.sum()), (x,)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), (torch.randn(1, 3, 4, 4),)),
}


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # torch's export of recurrent layers
@pytest.mark.parametrize("name", PLAIN)
def test_the_graph_is_the_one_that_aot_autograd_makes(name: str) -> None:
    model, args = PLAIN[name]
    wanted, program = by_aot(lifted(model, *args)), lifted(model, *args)
    with torch.no_grad():
        found = functional(program.module, Settings())
    assert found is not None
    assert described(found) == described(wanted.module)
    assert kinds_of_names(found) == kinds_of_names(wanted.module)
    graph = with_weights(found, program)
    assert graph.names == wanted.names
    assert [id(each) for each in graph.weights.values()] == [id(each) for each in lifted_state(program, wanted)]


def kinds_of_names(module: GraphModule) -> list[str]:
    """The nodes' names without their numbers, which those of dropped nodes change."""
    return [re.sub(r"_\d+$", "", node.name) for node in module.graph.nodes]


def lifted_state(program: Lifted, graph: Lowered) -> list[torch.Tensor]:
    """The program's own tensors at the places where another lowering has its weights."""
    state = program.state()
    return [state[position] for position in graph.weights]


def test_each_node_knows_the_line_of_the_model() -> None:
    model, args = PLAIN["image"]
    with torch.no_grad():
        graph = functional(lifted(model, *args).module, Settings())
    assert graph is not None
    (norm,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten._native_batch_norm_legit_no_training.default
    )
    assert "batchnorm.py" in norm.meta["stack_trace"] and "F.batch_norm(" in norm.meta["stack_trace"]


def test_what_aot_autograd_alone_can_do_is_left_to_it() -> None:
    def autocast(self: Calls, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ self.weight

    models: list[tuple[nn.Module, dict[str, Any]]] = [
        (Calls(lambda self, x: self.steps.add_(1) * x), {}),
        (Calls(lambda self, x: x.mul_(2) + 1), {}),
        (Calls(autocast), {}),
        (Calls(lambda self, x: x.relu()), {"dynamic_shapes": (({0: Dim("n", min=2, max=8)},),)}),
        (Calls(lambda self, x: x.nonzero()), {}),
    ]
    for model, keywords in models:
        assert functional(lifted(model, x, **keywords).module, Settings()) is None


def test_a_plan_is_made_the_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("AOTAutograd was asked")

    monkeypatch.setattr(engine_file, "lowered", never)
    made = export_engine(IMAGE, (torch.randn(2, 3, 12, 12),), tmp_path / "model.plan")
    assert [str(each.dtype) for each in made.outputs] == ["torch.float32"] and made.path.stat().st_size > 1000
