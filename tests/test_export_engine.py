"""Plain plans: their names, sizes and results, Triton's folder, and what a model hears that is more than one engine."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import register_pytree_node

import trt_dynamo
from tests.compiled import assert_same
from trt_dynamo import Unsupported, engine_file, export_engine
from trt_dynamo.build import build
from trt_dynamo.reference import evaluate
from trt_dynamo.settings import warn_once
from trt_dynamo.triton_repository import PlanTensor, config_of

BATCH = Dim("batch", min=1, max=8)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The networks that the builder is given: without a GPU no plan can be loaded, so these are run."""
    seen: list[Any] = []

    def watched(network: Any, *args: Any, **kwargs: Any) -> bytes:
        seen.append(network)
        return engine_build(network, *args, **kwargs)

    engine_build = build
    monkeypatch.setattr(engine_file, "build", watched)
    yield seen
    warn_once.cache_clear()


def outputs_of(network: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return evaluate(network.network.raw, inputs, constants=network.constants)


class Named(torch.nn.Module):
    """Results that are a view, an argument, the same twice, and None; an argument that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)

    def forward(self, ids: torch.Tensor, x: torch.Tensor, unused: Any = None) -> dict[str, Any]:
        y = self.linear(x) + ids[:, None]
        return {"logits": y, "turned": y.t(), "x": x, "pair": (y, [y[:, 0]]), "none": None}


class Sample(OrderedDict[str, torch.Tensor]):
    """As diffusers' models give out: a dict that torch can flatten, without the names of its parts."""


class Pair:
    """Parts without names."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts


def rebuilt(values: Iterable[Any], keys: Any) -> Sample:
    return Sample(zip(keys, values, strict=True))


register_pytree_node(Sample, lambda s: (list(s.values()), list(s)), rebuilt, serialized_type_name="tests.Sample")
register_pytree_node(Pair, lambda p: (p.parts, None), lambda v, _: Pair(list(v)), serialized_type_name="tests.Pair")


@pytest.mark.parametrize(
    ("give", "names"),
    [
        (lambda a, b: Sample(sample=a, mean=b), ["sample", "mean"]),
        (lambda a, b: Pair([a, b]), ["output_0", "output_1"]),
        (lambda a, b: {"x": a, "y": [b]}, ["output_x", "y_0"]),
    ],
)
def test_results_of_all_classes_have_names(give: Callable[..., Any], names: list[str], tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return give(x.relu() + 1, x.sum(-1))

    made = export_engine(Model(), (torch.randn(2, 3),), tmp_path / "model.plan")
    assert [each.name for each in made.outputs] == names


def test_names_sizes_and_results(tmp_path: Path, networks: list[Any]) -> None:
    model = Named().eval()
    args = (torch.arange(3), torch.randn(4, 3).t())
    shapes = {"ids": {0: BATCH}, "x": {0: BATCH}}
    made = export_engine(model, args, tmp_path / "m.plan", dynamic_shapes=shapes)
    assert [(each.name, each.dtype, each.shape) for each in made.inputs] == [
        ("ids", torch.int64, (-1,)),
        ("x", torch.float32, (-1, 4)),
    ]
    expected = {"logits": (-1, 8), "turned": (8, -1), "output_x": (-1, 4), "pair_0": (-1, 8), "pair_1_0": (-1,)}
    assert {each.name: each.shape for each in made.outputs} == expected
    assert (tmp_path / "m.plan").stat().st_size > 1000
    raw = networks[0].network.raw
    assert {raw.get_input(i).name for i in range(raw.num_inputs)} == {"ids", "x"}
    for n in (1, 8):
        ids, x = torch.arange(n), torch.randn(n, 4)
        theirs = model(ids, x)
        found = outputs_of(networks[0], ids=ids, x=x)
        assert_same(found["logits"], theirs["logits"].detach())
        assert_same(found["turned"], theirs["turned"].detach().contiguous())
        assert_same(found["output_x"], x)
        assert_same(found["pair_1_0"], theirs["pair"][1][0].detach())


class Sliced(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :n], x.sum(1) * n


class Halved(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, x * 2, x).half()


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "shapes", "inputs", "outputs"),
    [
        (torch.nn.Identity(), (torch.ones(2, 3),), None, None, ["input: float32 [2, 3]"], ["output: float32 [2, 3]"]),
        (
            torch.nn.Conv2d(3, 4, 3),
            (torch.ones(1, 3, 8, 8).to(memory_format=torch.channels_last),),
            None,
            None,
            ["input: float32 [1, 3, 8, 8]"],
            ["output: float32 [1, 4, 6, 6]"],
        ),
        (
            Halved(),
            (torch.ones(2, 3),),
            {"mask": torch.ones(2, 3) > 0},
            {"x": {1: Dim("n", min=2, max=5)}, "mask": {1: Dim("n", min=2, max=5)}},
            ["x: float32 [2, 2..5]", "mask: bool [2, 2..5]"],
            ["output: float16 [2, 2..5]"],
        ),
        (
            Sliced(),
            (torch.ones(2, 9), 4),
            None,
            {"x": None, "n": Dim.DYNAMIC},
            ["x: float32 [2, 9]", "n: int64 [] on the host"],
            ["output_0: float32 [2, 1..9]", "output_1: float32 [2]"],
        ),
    ],
)
def test_what_goes_in_and_out(
    tmp_path: Path, model: Any, args: Any, kwargs: Any, shapes: Any, inputs: list[str], outputs: list[str]
) -> None:
    made = export_engine(model.eval(), args, tmp_path / "m.plan", kwargs, shapes)
    assert [str(each) for each in made.inputs] == inputs
    assert [str(each) for each in made.outputs] == outputs


def test_the_memory_of_a_plan_is_row_major(tmp_path: Path, networks: list[Any]) -> None:
    model = torch.nn.Conv2d(3, 4, 3).eval()
    x = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    export_engine(model, (x,), tmp_path / "m.plan")
    assert_same(outputs_of(networks[0], input=x.contiguous())["output"], model(x).detach().contiguous())


class Mixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.linalg.svdvals(x.relu())
        result: torch.Tensor = torch.linalg.eigvals(y.diag()).real + 1
        return result


class Writing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Buffer(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return x.add_(1) + self.steps


class Sized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Mixed(), r"does not take the whole model, \d+ of its nodes not:\n(.*\n)*.*svd.*: no converter"),
        (torch.nn.Dropout(), r"aten\.(bernoulli|rand|native_dropout)"),
        (Writing(), r"the model writes to steps, x, which a plan cannot"),
        (Sized(), r"the model's result 1 is 3, and a plan gives tensors only"),
    ],
)
def test_what_is_not_one_engine_is_refused_with_its_nodes(tmp_path: Path, model: Any, text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        export_engine(model, (torch.rand(3, 3),), tmp_path / "m.plan", triton=tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_precision_shapes_the_plan_and_not_its_types(tmp_path: Path, networks: list[Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()
    made = export_engine(model, (torch.randn(2, 8),), tmp_path / "m.plan", precision="fp16")
    assert [each.dtype for each in (*made.inputs, *made.outputs)] == [torch.float32] * 2
    assert torch.float16 in {tensor.dtype for tensor in networks[0].constants.values()}
    with pytest.raises(Unsupported, match="precision=auto knows nothing"):
        export_engine(model, (torch.randn(2, 8),), tmp_path / "m.plan", precision="auto", cache="off")


# -- Triton -----------------------------------------------------------------------------------------------------------


def test_triton_gets_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture, networks: list[Any]) -> None:
    model = torch.nn.Linear(4, 8).eval()
    made = export_engine(
        model, (torch.randn(2, 4),), tmp_path / "line.plan", None, {"input": {0: BATCH}}, tmp_path / "models"
    )
    folder = tmp_path / "models" / "line"
    assert made.triton == folder
    assert (folder / "1" / "model.plan").read_bytes() == (tmp_path / "line.plan").read_bytes()
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) == ["1", "1/model.plan", "config.pbtxt"]
    text = (folder / "config.pbtxt").read_text()
    assert text == (
        'name: "line"\nplatform: "tensorrt_plan"\nmax_batch_size: 8\n'
        'input [\n  {\n    name: "input"\n    data_type: TYPE_FP32\n    dims: [ 4 ]\n  }\n]\n'
        'output [\n  {\n    name: "output"\n    data_type: TYPE_FP32\n    dims: [ 8 ]\n  }\n]\n'
        "dynamic_batching { }\n"
    )
    assert ("this plan is one of TensorRT for RTX" in caplog.text) == trt_dynamo.trt.is_rtx()


B18, B28, FOUR = ("s0", 1, 8), ("s0", 2, 8), ("4", 4, 4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch", "lines"),
    [
        ([(B18, FOUR)], [(B18,)], 8, ["dims: [ 4 ]", "dims: [ 1 ]\n    reshape { shape: [ ] }"]),
        ([(B18, FOUR)], [(FOUR, B18)], 0, ["dims: [ -1, 4 ]", "dims: [ 4, -1 ]"]),
        ([(B28, FOUR)], [(B28,)], 0, ["dims: [ -1, 4 ]", "dims: [ -1 ]"]),
        ([(B18, FOUR), (("s1", 1, 8),)], [(B18,)], 0, ["dims: [ -1 ]"]),
        ([(FOUR, FOUR)], [(FOUR,)], 0, ["dims: [ 4, 4 ]", "dims: [ 4 ]"]),
        ([(B18, ("s1", 1, 32))], [(B18, ("2*s1", 2, 64))], 8, ["dims: [ -1 ]"]),
        ([()], [(B18,)], 0, ["dims: [ 1 ]\n    reshape { shape: [ ] }", "dims: [ -1 ]"]),
    ],
)
def test_when_dim_0_is_the_batch(inputs: Any, outputs: Any, batch: int, lines: list[str]) -> None:
    ins = [PlanTensor(f"in{i}", torch.int64, dims) for i, dims in enumerate(inputs)]
    outs = [PlanTensor(f"out{i}", torch.bfloat16, dims) for i, dims in enumerate(outputs)]
    text = config_of("m", ins, outs)
    assert f"max_batch_size: {batch}\n" in text
    assert ("dynamic_batching" in text) == (batch > 0)
    assert text.count("TYPE_INT64") == len(ins)
    assert text.count("TYPE_BF16") == len(outs)
    for line in lines:
        assert f"    {line}\n" in text


def test_a_number_is_a_shape_tensor_for_triton() -> None:
    number = PlanTensor("n", torch.int64, (), shape_tensor=True)
    text = config_of("m", [PlanTensor("x", torch.int8, (B18,)), number], [PlanTensor("y", torch.bool, (B18,))])
    assert text.count("is_shape_tensor: true") == 1
    assert "max_batch_size: 0" in text


# -- the command ------------------------------------------------------------------------------------------------------

MODEL = """
import torch
def make():
    return torch.nn.Linear(4, 8).eval(), (torch.randn(2, 4),)
def mixed():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)
    return Model(), (torch.randn(2, 4),)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["make", "--batch", "32", "--triton", "models"], 0, "input   input: float32 [1..32, 4]"),
        (["make", "--dynamic"], 0, "output  output: float32 [2.."),
        (["make"], 0, "output  output: float32 [2, 8]"),
        (["mixed"], 1, "TensorRT does not take the whole model"),
        (["make", "--batch", "32", "--dynamic"], 2, "exclude one another"),
        (["make", "--set", "nonsense=1"], 1, "nonsense"),
    ],
)
def test_the_command(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    function, *rest = arguments
    command = [sys.executable, "-m", "trt_dynamo", "export", f"model.py:{function}", "--output", "m.plan", *rest]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert text in (done.stdout if code == 0 else done.stderr)
    assert (tmp_path / "m.plan").exists() == (code == 0)
    assert (tmp_path / "models" / "m" / "config.pbtxt").exists() == ("--triton" in rest)
