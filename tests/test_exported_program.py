"""Compiled models as torch's own `ExportedProgram`, saved by `torch.export.save` and loaded where trt_dynamo is."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

import trt_dynamo
from tests.compiled import assert_same, in_threads
from tests.test_exported import BATCH, OPTIONS, SHAPES, Counting, Labelled, Small, Stepped, counting
from trt_dynamo import EngineError, exported_program, report
from trt_dynamo.carried_segment import segment_in
from trt_dynamo.settings import warn_once

OP = torch.ops.trt_dynamo.run_engine.default


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "cache"))
    warn_once.cache_clear()
    trt_dynamo.reset_report()
    yield
    warn_once.cache_clear()


def program_of(model: torch.nn.Module, *args: Any, shapes: Any = None, **options: Any) -> ExportedProgram:
    return exported_program(trt_dynamo.compile(model.eval(), args, None, shapes, **{**OPTIONS, **options}))


def reloaded(program: ExportedProgram, folder: Path) -> ExportedProgram:
    torch.export.save(program, folder / "m.pt2")
    return torch.export.load(folder / "m.pt2")


def calls(program: ExportedProgram) -> list[Any]:
    return list(program.graph.find_nodes(op="call_function", target=OP))


def changed(program: ExportedProgram, **changes: Any) -> ExportedProgram:
    """The same program with something else in its engine's manifest."""
    (node,) = calls(program)
    manifest = json.loads(node.args[3])
    node.args = (*node.args[:3], json.dumps({**manifest, **changes}))
    program.graph_module.recompile()
    return program


def test_state_views_pytrees_and_sizes_are_eagers_before_and_after_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Counting().eval()
    args, kwargs = counting(3)
    module = trt_dynamo.compile(copy.deepcopy(eager), args, kwargs, SHAPES, **OPTIONS)
    program = exported_program(module)
    assert report()["engines_built"] == 1, "the program has the module's engine"
    loaded = reloaded(program, tmp_path)
    for each in (program, loaded):
        run, twin = each.module(), copy.deepcopy(eager)
        for n in (2, 5, 16):
            args, kwargs = counting(n)
            theirs = copy.deepcopy(kwargs)
            with torch.no_grad():
                expected = twin(*args, **theirs)
            assert_same(run(*args, **kwargs), expected)
            assert_same(kwargs, theirs)
            assert_same(run.calls, twin.calls)
    assert report()["engines_built"] == 1
    assert (report()["engine_calls"], report()["eager_calls"]) == (6, 0)
    assert list(loaded.state_dict) == list(program.state_dict)
    with pytest.raises(Exception, match="17"):
        loaded.module()(*counting(17)[0], **counting(17)[1])


class Mixed(torch.nn.Module):
    """Two engines around what eager does, on sizes that are twice an input's; a view and an argument among the
    results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        a = torch.cat([self.first(x).relu(), self.first(x).tanh()])
        b = self.second(a * torch.linalg.eigvalsh(a.t() @ a)) + y.mean()
        return b, b.t()[1:], (x, b.shape[0], None)


def test_several_engines_and_eager_between_them(tmp_path: Path) -> None:
    model = Mixed().eval()
    shapes = {"x": {0: Dim("batch", max=8)}, "y": None}
    loaded = reloaded(program_of(model, torch.randn(3, 4), torch.randn(3), shapes=shapes), tmp_path)
    assert len(calls(loaded)) == 2
    assert torch.ops.aten._linalg_eigh.default in {node.target for node in loaded.graph.nodes}
    run = loaded.module()
    for n in (1, 3, 8):
        x, y = torch.randn(n, 4), torch.randn(3)
        with torch.no_grad():
            assert_same(run(x, y), model(x, y))
    assert (report()["engine_calls"], report()["eager_calls"]) == (6, 0)


class Layouts(torch.nn.Module):
    """An engine's results in other orders of dims, and one that eager would make a view of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x).relu()
        return y, y.permute(0, 2, 3, 1).contiguous(), torch.linalg.svdvals(x.transpose(2, 3)[0, 0])


@pytest.mark.parametrize(
    ("model", "args", "shapes"),
    [
        (Layouts(), (torch.randn(2, 3, 8, 7).to(memory_format=torch.channels_last),), ({0: BATCH},)),
        (Stepped(), (torch.randn(4, 9), 5, "sum"), {"x": None, "n": Dim.DYNAMIC, "mode": None}),
        pytest.param(
            torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (torch.randn(2, 5, 8),),
            ({1: BATCH},),
            marks=pytest.mark.slow,
        ),
        (torch.nn.Identity(), (torch.randn(3),), None),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, torch.nn.Module) else "",
)
def test_results_are_eagers_and_lie_as_they_do(tmp_path: Path, model: Any, args: Any, shapes: Any) -> None:
    loaded = reloaded(program_of(model, *args, shapes=shapes), tmp_path)
    with torch.no_grad():
        found, expected = loaded.module()(*args), model(*args)
    assert_same(found, expected)
    for mine, theirs in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert mine.stride() == theirs.stride()
    assert report()["eager_calls"] == 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of what torch copies there
def test_the_op_may_be_traced_again(tmp_path: Path) -> None:
    model = Mixed().eval()
    shapes = {"x": {0: Dim("batch", max=8)}, "y": None}
    again = reloaded(program_of(model, torch.randn(3, 4), torch.randn(3), shapes=shapes), tmp_path)
    again = again.run_decompositions({})
    values = [value for node in calls(again) for value in node.meta["val"]]
    assert any(isinstance(size, torch.SymInt) for value in values for size in value.shape)
    compiled: Any = torch.compile(again.module(), backend="aot_eager", dynamic=True)
    for n in (2, 7):
        x, y = torch.randn(n, 4), torch.randn(3)
        with torch.no_grad():
            assert_same(compiled(x, y), model(x, y))


def test_weights_are_followed_and_shared_with_the_module(tmp_path: Path) -> None:
    module: Any = trt_dynamo.compile(Small().eval(), (torch.randn(3, 4),), **OPTIONS, rebuild="sync", rebuild_after=1)
    run: Any = exported_program(module).module()
    x = torch.randn(3, 4)
    run(x)
    with torch.no_grad():
        module.model.linear.weight.mul_(2)
    assert_same(run(x).detach(), module(x))
    loaded: Any = reloaded(exported_program(module), tmp_path).module()
    assert_same(loaded(x).detach(), module(x))
    loaded.load_state_dict(Small().state_dict())
    state = loaded.state_dict()
    expected = torch.nn.functional.linear(x, state["linear.weight"], state["linear.bias"]).relu()
    assert_same(loaded(x).detach(), expected)


def test_a_gradient_is_refused_and_not_lost(tmp_path: Path) -> None:
    run = reloaded(program_of(Small(), torch.randn(3, 4)), tmp_path).module()
    with pytest.raises(RuntimeError, match="run_engine"):
        run(torch.randn(3, 4)).sum().backward()


def test_equal_programs_share_an_engine_which_goes_with_them(tmp_path: Path) -> None:
    from trt_dynamo.carried_runner import RUNNERS

    x = torch.randn(3, 4)
    program = program_of(Small(), x)
    gc.collect()
    before = len(RUNNERS)
    first, second = reloaded(program, tmp_path), reloaded(program, tmp_path)
    trt_dynamo.reset_report()
    assert_same(first.module()(x), second.module()(x))
    assert len(RUNNERS) == before + 2
    one, two = (RUNNERS[each.constants["trt_dynamo_engine_0"]][1] for each in (first, second))
    assert one is two
    del first, second, one, two
    gc.collect()
    assert len(RUNNERS) == before


def test_threads_make_one_engine(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.randn(3, 4)
    loaded = reloaded(program_of(model, x), tmp_path)
    run, found = loaded.module(), []
    trt_dynamo.reset_report()
    in_threads(4, lambda _: found.append(run(x).detach()))
    for each in found:
        assert_same(each, model(x).detach())
    assert len(found) == 4
    assert report()["cache_hits"] == 1


SCRIPT = """
import sys, torch, trt_dynamo, trt_dynamo.engine_op
x = torch.load(sys.argv[2])
y = torch.export.load(sys.argv[1]).module()(x["x"])
torch.testing.assert_close(y, x["y"])
print(trt_dynamo.report()["engines_built"], trt_dynamo.report()["engine_calls"], trt_dynamo.report()["eager_calls"])
"""


def test_another_process_needs_only_an_import(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.randn(5, 4)
    program = program_of(model, torch.randn(3, 4), shapes=({0: BATCH},), cache="off")
    torch.export.save(program, tmp_path / "m.pt2")
    torch.save({"x": x, "y": model(x)}, tmp_path / "x.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.pt2"), str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1", "0"], done.stderr


# -- engines that are not what they should be -------------------------------------------------------------------------


def damaged(program: ExportedProgram) -> ExportedProgram:
    program.constants["trt_dynamo_engine_0"][-100] ^= 1
    return program


def signed_by_nobody(program: ExportedProgram) -> ExportedProgram:
    return program


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (damaged, "the plan's checksum differs"),
        (signed_by_nobody, "it is not signed"),
    ],
)
def test_an_engine_that_is_damaged_is_built_anew_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, spoil: Any, text: str
) -> None:
    model, x = Small().eval(), torch.randn(3, 4)
    program = spoil(reloaded(program_of(model, x, cache="off"), tmp_path))
    if spoil is signed_by_nobody:
        monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", "0123456789abcdef")
    trt_dynamo.reset_report()
    assert_same(program.module()(x), model(x))
    assert report()["engines_built"] == 1
    assert f"no engine that fits: {text}" in caplog.text
    assert "It is built from the program's graph" in caplog.text


@pytest.mark.parametrize(("strict", "calls"), [(True, None), (False, 1)])
def test_an_engine_of_another_tensorrt_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    strict: bool,
    calls: int | None,
) -> None:
    model, x = Small().eval(), torch.randn(3, 4)
    program = program_of(model, x, cache="off", rebuild="never", strict=strict)
    loaded = reloaded(program, tmp_path)
    monkeypatch.setattr(trt_dynamo.trt, "version", lambda: "99.1")
    text = r"TensorRT's version is 99\.1 here and \S+ when it was exported"
    if strict:
        with pytest.raises(EngineError, match=text):
            loaded.module()(x)
        return
    trt_dynamo.reset_report()
    assert_same(loaded.module()(x), model(x))
    assert report()["eager_calls"] == calls
    assert "99.1 here" in caplog.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 7}, "format 'trt_dynamo segment 7', this trt_dynamo reads"),
        ({"kind": "other"}, "'other 1'"),
        ({"graph": ""}, "the graph of segment_0 is damaged"),
    ],
)
def test_a_manifest_that_is_foreign_is_refused(tmp_path: Path, changes: Any, text: str) -> None:
    x = torch.randn(3, 4)
    program = changed(reloaded(program_of(Small(), x), tmp_path), **changes)
    with pytest.raises(EngineError, match=text):
        program.module()(x)


def test_where_no_engine_can_run_eager_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Small().eval(), torch.randn(3, 4)
    module = trt_dynamo.compile(model, (x,), min_segment_nodes=1, runtime="auto", strict=False)
    loaded = reloaded(exported_program(module), tmp_path)
    assert_same(loaded.module()(x), model(x))
    assert caplog.text.count("the model runs in eager") == 1


def test_only_compiled_modules_become_programs_and_what_torch_cannot_write_is_refused() -> None:
    with pytest.raises(TypeError, match=r"trt_dynamo\.compile"):
        exported_program(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    x = torch.randn(3, 4)
    program = program_of(Labelled(), x)  # torch runs a text among the results, and cannot read it from a file
    assert_same(program.module()(x)[0], x.relu() + 1)


def test_a_program_with_engines_can_be_compiled_again(tmp_path: Path) -> None:
    model, x = Small().eval(), torch.randn(3, 4)
    module = trt_dynamo.compile(reloaded(program_of(model, x), tmp_path), **OPTIONS)
    assert_same(module(x), model(x).detach())
    assert_same(exported_program(module).module()(x), model(x))


def test_the_manifest_is_plain_json_and_the_engine_has_a_size() -> None:
    program = program_of(Small(), torch.randn(3, 4))
    (node,) = calls(program)
    assert node.args[2].meta["val"].shape == (program.constants["trt_dynamo_engine_0"].numel(),)
    manifest = json.loads(node.args[3])
    assert (manifest["kind"], manifest["format"]) == ("trt_dynamo segment", 1)
    assert manifest["inputs"] == [["linear.weight", True], ["linear.bias", True], ["x", False]]
    assert segment_in(node.args[3]).segment.weights == ("p_linear_weight", "p_linear_bias")
