"""`bench` at work: the models that it takes, a small one measured, and the command."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from trt_dynamo.benchmarking import (
    COLUMNS,
    Case,
    Cell,
    Request,
    Result,
    columns,
    measure,
    measuring,
    sources,
)
from trt_dynamo.benchmarking.timing import Spread
from trt_dynamo.cli import app
from trt_dynamo.errors import SettingsError, TrtDynamoError
from trt_dynamo.settings import Settings

CPU = torch.device("cpu")


# -- models -----------------------------------------------------------------------------------------------------------


def test_the_published_table_has_its_20_models() -> None:
    assert len(set(sources.TABLES["torch2trt"])) == 20
    assert sources.TABLES["efficientnet"] == ("torchvision:efficientnet_b0",)


def test_a_users_own_model() -> None:
    model = nn.Linear(3, 2)
    case = sources.case_of("mine", model, (torch.randn(5, 3),), {"flag": True, "ids": torch.arange(4)})
    assert (case.items, case.dtype) == (5, "float32")
    half = case.to(CPU, torch.bfloat16)
    assert half.args[0].dtype is torch.bfloat16 and half.kwargs["ids"].dtype is torch.int64 and half.kwargs["flag"]
    assert half.dtype == "bfloat16" and model.weight.dtype is torch.bfloat16
    assert sources.case_of("mine", abs, (), {}).items == 1 and sources.case_of("mine", abs, (), {}).dtype == "no floats"


def test_a_name_without_a_known_prefix_is_no_case() -> None:
    assert sources.named("model.py:make", 1) is None and sources.named("resnet50", 1) is None


def test_a_config_of_transformers(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    case = sources.named(f"hf:{tmp_path}", 3, tokens=7)
    assert case is not None and case.items == 3 and not case.model.training  # type: ignore[attr-defined]
    assert {name: tuple(value.shape) for name, value in case.kwargs.items()} == {"input_ids": (3, 7)}
    assert len(measuring.tensors(case.model(**case.kwargs))) == 1  # no cache of keys and values


FAKE = {
    "torchvision": SimpleNamespace(
        models=SimpleNamespace(
            list_models=lambda: ["tiny", "tiny_detector", "tiny_segmenter"],
            get_model_builder=lambda name: SimpleNamespace(
                __module__={"tiny": "torchvision.models.tiny"}.get(name, f"torchvision.models.{name[5:10]}")
            ),
            get_model=lambda name, **options: nn.Conv2d(3, 1, 1),
            get_model_weights=lambda name: [SimpleNamespace(transforms=lambda: SimpleNamespace(crop_size=[32]))],
        )
    ),
    "timm": SimpleNamespace(
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny"],
        create_model=lambda name, pretrained: setattr_of(nn.Conv2d(1, 1, 1), pretrained_cfg={"input_size": (1, 4, 6)}),
    ),
}


def setattr_of(model: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("spec", "size", "shape"),
    [
        ("torchvision:tiny", None, (2, 3, 32, 32)),
        ("torchvision:tiny", 8, (2, 3, 8, 8)),
        ("timm:tiny", None, (2, 1, 4, 6)),
    ],
)
def test_models_by_name(spec: str, size: int | None, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package", FAKE.__getitem__)
    case = sources.named(spec, 2, size=size)
    assert case is not None and case.args[0].shape == shape and case.items == 2 and case.name == spec


@pytest.mark.parametrize("spec", ["torchvision:tini", "timm:tini"])
def test_a_name_that_is_nearly_right(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "package", FAKE.__getitem__)
    with pytest.raises(SettingsError, match="has no model 'tini'; did you mean 'tiny'"):
        sources.named(spec, 1)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(SettingsError, match="need no_such_package: pip install no_such_package"):
        sources.package("no_such_package")


# -- measuring --------------------------------------------------------------------------------------------------------


def request(names: str, **changes: Any) -> Request:
    return Request(columns.chosen(names), CPU, calls=10, **changes)


def test_eager_and_inductor_side_by_side() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    told: list[str] = []
    found = measure(Case("net", model, (torch.randn(3, 4),), items=3), request("eager,inductor"), told.append)
    assert told == ["eager", "Inductor", "in turns"]
    assert [(each.missing, each.failed, each.note) for each in found.cells] == [("", "", "")] * 2
    for each in found.cells:
        assert each.alone is not None and each.alone.count == 10 and each.alone.median > 0
        assert each.in_a_row is not None and each.in_a_row.count == 10
    assert found.cells[0].error == 0 and found.cells[1].error is not None and found.cells[1].error < 1e-5
    assert found.baseline is found.cells[0] and found.dtype == "float32" and "torch" in found.versions


def test_accuracy_is_measured_against_the_model_as_it_was() -> None:
    model = nn.Linear(64, 64).eval()
    found = measure(Case("net", model, (torch.randn(3, 64),)), request("eager", dtype=torch.bfloat16))
    assert found.cells[0].error is not None and 1e-4 < found.cells[0].error < 0.05 and found.dtype == "bfloat16"


def test_a_failure_is_told_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(column: Any, model: Any, *_: Any) -> Any:
        def call(*args: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory.\n\nTried to allocate " + "x" * 500)

        return model if column.name == "eager" else call

    monkeypatch.setattr(measuring, "compiled", fails)
    found = measure(Case("net", nn.Linear(4, 4), (torch.randn(3, 4),)), request("eager,inductor,reduce-overhead"))
    eager, inductor, missing = found.cells
    assert eager.alone is not None
    assert inductor.failed.startswith("OutOfMemoryError: out of memory. Tried to allocate xx")
    assert len(inductor.failed) == 200 and missing.missing == "its CUDA graphs need a GPU"


def test_a_model_that_fails_by_itself_has_no_times() -> None:
    found = measure(Case("net", nn.Linear(4, 4), (torch.randn(3, 5),)), request("eager"))
    assert found.baseline is None and found.cells[0].failed.startswith("RuntimeError: mat1 and mat2 shapes")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in the TensorRT column, run by the reference evaluator: for the bookkeeping, not for the times."""
    from trt_dynamo.backend import tensorrt

    def run(column: Any, model: Any, dynamic: Any, options: Any) -> Any:
        options = {"runtime": "reference", **options}
        return model if column.name == "eager" else torch.compile(model, backend=tensorrt, options=options)

    monkeypatch.setattr(measuring, "compiled", run)
    monkeypatch.setattr(measuring, "why_missing", lambda *_: None)


@pytest.mark.parametrize(
    ("options", "failed", "note"),
    [
        ({"min_segment_nodes": "1"}, "", ""),
        ({"min_segment_nodes": "99"}, "TrtDynamoError: no engine answered", ""),
    ],
    ids=["engines", "none"],
)
def test_the_column_of_tensorrt_is_that_of_engines(
    options: dict[str, str], failed: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    found = measure(Case("net", model, (torch.randn(3, 4),)), request("eager,tensorrt", options=options))
    timed = found.cells[1]
    assert timed.failed.startswith(failed) and bool(timed.failed) is bool(failed) and timed.note == note
    assert (timed.alone is None) is bool(failed)


def test_results_that_cannot_be_compared_say_so() -> None:
    x = torch.ones(2)
    assert measuring.compared([x], [x, x]) == (None, "it gives 1 tensors, the model 2")
    assert measuring.compared([], []) == (None, "there are no tensors to compare")
    assert measuring.compared([x.half() * 1.5], [x]) == (0.5, "")
    assert measuring.compared([x * float("nan")], [x]) == (0.0, "2 values are NaN or infinite")
    assert measuring.compared([torch.ones(3)], [x])[0] is None


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "own_model.py"
    file.write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 4).eval(), (torch.randn(3, 4),)\n")
    return f"{file}:make"


def call(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["bench", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_command(model: str, tmp_path: Path) -> None:
    why = columns.why_missing(COLUMNS["tensorrt"], CPU, Settings())
    chart = tmp_path / "chart.png"
    arguments = (model, "--columns", "eager,tensorrt", "--calls", "10", "--device", "cpu", "--png", str(chart))
    code, out, err = call(*arguments)
    assert code == 0 and f"{model} on CPU" in out and "float32, batch 3" in out
    assert "X EAGER" in out and f"TensorRT  missing, {why}" in out and "\u2588 1.00x" in out.replace("  ", " ")
    assert err == f"{model}: eager\n{model}: in turns\n" and chart.read_bytes().startswith(b"\x89PNG")


def test_the_command_for_programs(model: str) -> None:
    code, out, _ = call(model, model, "--columns", "eager,tensorrt", "--seconds", "0.05", "--device", "cpu", "--json")
    assert code == 0
    for found in json.loads(out):
        assert [each["ratio"] for each in found["columns"]] == [1.0, None] and found["columns"][1]["missing"]


def test_several_models_end_in_a_table(model: str) -> None:
    code, out, _ = call(model, model, "--columns", "eager", "--calls", "1", "--device", "cpu")
    assert code == 0 and out.count("on CPU") == 2 and "MODEL" in out.splitlines()[-3]


def test_a_model_that_cannot_be_timed_at_all_is_a_failure(model: str) -> None:
    code, out, _ = call(model, "--columns", "tensorrt", "--device", "cpu")
    assert code == 1 and "missing" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a model"),
        (("--table", "torch3trt"), "there is no table 'torch3trt'; there are torch2trt, efficientnet"),
        (("MODEL", "--columns", "eagre"), "did you mean 'eager'"),
        (("MODEL", "--dtype", "fp8"), "--dtype 'fp8': it is one of float32, fp32, fp16, bf16"),
        (("MODEL", "--device", "tpu"), "--device tpu"),
        (("hf:no/such/folder/or/model",), "hf:no/such/folder/or/model is no config"),
    ],
)
def test_what_is_called_wrongly(arguments: tuple[str, ...], words: str, model: str) -> None:
    code, out, err = call(*(model if each == "MODEL" else each for each in arguments))
    assert (code, out) == (2, "") and words in err


def test_without_matplotlib_nothing_is_timed_for_a_chart(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.setattr(
        "importlib.import_module", lambda name: real("no_such_module") if "matplotlib" in name else None
    )
    with pytest.raises(TrtDynamoError, match=r"pip install 'trt-dynamo\[bench\]'"):
        call(model, "--png", "chart.png")


def test_the_table_is_timed_in_fp16_at_batch_1(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, Any]] = []

    def watch(case: Case, asked: Request, told: Any) -> Result:
        seen.append((case.name, case.items, asked.dtype))
        timed = Cell("eager", "eager", alone=Spread.of([1.0]), in_a_row=Spread.of([1.0]))
        return Result(case.name, "a GPU", "float16", case.items, (timed,))

    monkeypatch.setattr(measuring, "measure", watch)
    monkeypatch.setattr(sources, "package", FAKE.__getitem__)
    monkeypatch.setattr(FAKE["torchvision"].models, "list_models", lambda: sources.TORCH2TRT.split())
    code, _, _ = call("--table", "torch2trt", "--batch", "8", "--device", "cpu")
    assert code == 0 and seen == [(f"torchvision:{n}", 1, torch.float16) for n in sources.TORCH2TRT.split()]
