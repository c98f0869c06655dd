"""Models compiled through torch.export, and the files that they are saved to."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import trt_dynamo
from tests.compiled import assert_same
from trt_dynamo import FileError, TrtDynamoError, load, report, save
from trt_dynamo.settings import warn_once

OPTIONS: dict[str, Any] = {"runtime": "reference", "min_segment_nodes": 1, "strict": True}


class Counting(torch.nn.Module):
    """Writes to a buffer and to an argument, has a constant and nested arguments, gives a dict with a view in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.calls = torch.nn.Buffer(torch.zeros(()))
        self.steps = torch.arange(8.0)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, *, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.calls.add_(1)
        y = self.norm(self.linear(x)) + self.steps + state["seen"] * scale
        state["seen"].add_(1)
        return {"y": y.relu(), "rest": (y, x.shape[0], y.t())}


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x).relu()
        return result


def counting(n: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    return (torch.randn(n, 4), torch.tensor(2.0)), {"state": {"seen": torch.randn(n, 8)}}


BATCH = Dim("batch", min=2, max=16)
SHAPES = {"x": {0: BATCH}, "scale": None, "state": {"seen": {0: BATCH}}}


def small(**options: Any) -> Any:
    return trt_dynamo.compile(Small().eval(), (torch.randn(3, 4),), **{**OPTIONS, **options})


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRT_DYNAMO_CACHE_DIR", str(tmp_path / "cache"))
    warn_once.cache_clear()
    trt_dynamo.reset_report()
    yield
    warn_once.cache_clear()


def test_state_views_pytrees_and_sizes_are_eagers_before_and_after_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Counting().eval()
    args, kwargs = counting(3)
    module = trt_dynamo.compile(copy.deepcopy(eager), args, kwargs, SHAPES, **OPTIONS)
    save(module, tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2")
    for each in (module, loaded):
        twin = copy.deepcopy(eager)
        for n in (2, 5, 16):
            args, kwargs = counting(n)
            theirs = copy.deepcopy(kwargs)
            with torch.no_grad():
                expected = twin(*args, **theirs)
            assert_same(each(*args, **kwargs), expected)
            assert_same(kwargs, theirs)
            assert_same(each.model.calls, twin.calls)
    assert report()["eager_calls"] == 0
    assert report()["engines_built"] == report()["cache_hits"] == 1


def test_an_argument_that_lies_otherwise_is_written_all_the_same() -> None:
    eager = Counting().eval()
    args, kwargs = counting(3)
    module = trt_dynamo.compile(copy.deepcopy(eager), args, kwargs, SHAPES, **OPTIONS)
    given, twin = ({"state": {"seen": torch.ones(8, 3).t()}} for _ in range(2))
    with torch.no_grad():
        assert_same(module(*args, **given), eager(*args, **twin))
    assert_same(given, twin)
    assert given["state"]["seen"].stride() == (1, 3)


def test_a_range_without_a_lower_end_has_one_and_all_sizes_above(tmp_path: Path) -> None:
    model = Small().eval()
    module = trt_dynamo.compile(model, (torch.randn(3, 4),), None, ({0: Dim("batch", max=8)},), **OPTIONS)
    save(module, tmp_path / "m.pt2")
    for each in (module, load(tmp_path / "m.pt2", rebuild=False)):
        trt_dynamo.reset_report()
        for n in (1, 2, 8):
            x = torch.randn(n, 4)
            assert_same(each(x), model(x).detach())
        assert report()["engine_calls"] == 3
        with pytest.raises(ValueError, match="dim 0 of x is 9"):
            each(torch.randn(9, 4))


class Casting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.relu().double().float() + 1).to(torch.float16).neg()


def test_what_an_export_asserts_of_dtypes_is_no_part_of_the_graph() -> None:
    x = torch.randn(3, 4)
    module = trt_dynamo.compile(Casting(), (x,), **OPTIONS)
    assert_same(module(x), Casting()(x))
    assert "_assert_tensor_metadata" in str(module.program.graph)
    assert "_assert_tensor_metadata" not in str(module.lifted.module.graph)


class Stepped(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: int, mode: str = "sum") -> torch.Tensor:
        y = x[:, :n] * n
        return y.sum(1) if mode == "sum" else y.amax(1)


def test_a_number_may_vary_and_a_constant_may_not() -> None:
    shapes = {"x": None, "n": Dim.DYNAMIC, "mode": None}
    module = trt_dynamo.compile(Stepped(), (torch.randn(4, 9), 5, "sum"), None, shapes, **OPTIONS)
    x = torch.randn(4, 9)
    for n in (3, 5, 8):
        assert_same(module(x, n, "sum"), Stepped()(x, n, "sum"))
    with pytest.raises(ValueError, match="mode is 'max'; the model was exported for 'sum'"):
        module(x, 5, "max")
    with pytest.raises(TypeError, match="n must be an int"):
        module(x, torch.tensor(5), "sum")


@pytest.mark.parametrize(
    ("x", "seen", "error", "text"),
    [
        (torch.ones(17, 4), torch.ones(17, 8), ValueError, "dim 0 of x is 17; the model was exported for 2 to 16"),
        (torch.ones(3, 5), torch.ones(3, 8), ValueError, "dim 1 of x is 5; the model was exported for 4"),
        (torch.ones(3, 4), torch.ones(4, 8), ValueError, "dim 0 of state_seen is 4; by the other inputs"),
        (torch.ones(3, 4).half(), torch.ones(3, 8), TypeError, "x has dtype torch.float16"),
        (torch.ones(3, 4, 1), torch.ones(3, 8), TypeError, "x has ndim 3"),
        (3, torch.ones(3, 8), TypeError, "x must be a tensor, not int"),
        (torch.ones(3, 4), None, TypeError, "another structure"),
    ],
)
def test_what_the_export_does_not_allow_is_refused(x: Any, seen: Any, error: type, text: str) -> None:
    args, kwargs = counting(3)
    module = trt_dynamo.compile(Counting().eval(), args, kwargs, SHAPES, **OPTIONS)
    state = {"state": {"seen": seen} if seen is not None else {}}
    with pytest.raises(error, match=text):
        module(x, args[1], **state)
    assert_same(module.model.calls, torch.zeros(()))


def test_a_change_of_weights_is_followed_and_saved(tmp_path: Path) -> None:
    module = small(rebuild="sync", rebuild_after=1)
    x = torch.randn(3, 4)
    with torch.no_grad():
        module.model.linear.weight.mul_(2)
    state = module.state_dict()
    expected = torch.nn.functional.linear(x, state["model.linear.weight"], state["model.linear.bias"]).relu()
    assert_same(module(x), expected)
    save(module, tmp_path / "m.pt2")
    assert_same(load(tmp_path / "m.pt2")(x), expected)


def test_a_module_stays_where_it_was_compiled() -> None:
    module = small()
    assert module.eval() is module.train() is module.cpu() is module
    with pytest.raises(TypeError, match="devices and dtypes"):
        module.half()


def test_weights_may_stay_out_of_the_file(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256)).eval()
    x = torch.randn(2, 256)
    module = trt_dynamo.compile(model, (x,), **OPTIONS)
    save(module, tmp_path / "with.pt2")
    save(module, tmp_path / "without.pt2", weights=False)
    saved = (tmp_path / "with.pt2").stat().st_size - (tmp_path / "without.pt2").stat().st_size
    assert saved > 2 * 256 * 256 * 4
    with pytest.raises(FileError, match="saved without weights"):
        load(tmp_path / "without.pt2")
    with pytest.raises(FileError, match=r"lack these.*: 2\.bias"):
        load(tmp_path / "without.pt2", weights={k: v for k, v in model.state_dict().items() if k != "2.bias"})
    trt_dynamo.reset_report()
    assert_same(load(tmp_path / "without.pt2", weights=model.state_dict(), rebuild=False)(x), model(x).detach())
    assert report()["engines_built"] == 0


def test_other_weights_are_taken_and_their_engines_built(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, other, x = small(), Small().eval(), torch.randn(3, 4)
    save(module, tmp_path / "m.pt2")
    with pytest.raises(FileError, match="no engine that fits: the weights are others"):
        load(tmp_path / "m.pt2", weights=other.state_dict(), rebuild=False, strict=False)
    assert_same(load(tmp_path / "m.pt2", weights=other.state_dict())(x), other(x).detach())
    assert "the weights are others. It is built from the file's graph" in caplog.text


SCRIPT = """
import sys, torch, trt_dynamo
module = trt_dynamo.load(sys.argv[1], rebuild=False, cache="off")
x = torch.load(sys.argv[2])
torch.testing.assert_close(module(x["x"]), x["y"])
print(trt_dynamo.report()["engines_built"], trt_dynamo.report()["engine_calls"], trt_dynamo.report()["eager_calls"])
"""


@pytest.mark.slow
def test_another_process_needs_neither_the_source_nor_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    module = trt_dynamo.compile(model, (x,), None, ({0: Dim("b", max=8), 1: Dim("t", max=32)},), **OPTIONS)
    save(module, tmp_path / "m.pt2")
    torch.save({"x": x, "y": module(x)}, tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "m.pt2", tmp_path / "x.pt"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "1", "0"], done.stderr


# -- files that are not what they should be ---------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None], *, seal: bool = True) -> None:
    """The same zip with other members, its checksums renewed as somebody would who has no key."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if seal:
        manifest = json.loads(members["manifest.json"])
        for name in manifest["members"]:
            manifest["members"][name]["sha256"] = hashlib.sha256(members[name]).hexdigest()
        members["manifest.json"] = json.dumps(manifest).encode()
        old = json.loads(members["seal"])
        members["seal"] = json.dumps({**old, "sha256": hashlib.sha256(members["manifest.json"]).hexdigest()}).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def flipped(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        data = bytearray(members[name])
        data[len(data) // 2] ^= 1
        members[name] = bytes(data)

    return change


def noted(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        manifest["platform"].update(changes.pop("platform", {}))
        manifest.update(changes)
        members["manifest.json"] = json.dumps(manifest).encode()

    return change


@pytest.mark.parametrize(
    ("change", "seal", "text"),
    [
        (flipped("graph.pt2"), False, "damaged: the checksum of graph.pt2 differs"),
        (flipped("manifest.json"), False, "damaged: the checksum of its manifest differs"),
        (flipped("seal"), False, "damaged"),
        (lambda members: members.pop("graph.pt2"), False, "damaged: graph.pt2"),
        (lambda members: members.pop("seal"), False, "damaged"),
        (noted(format=7), True, "has format 7, this trt_dynamo reads format 1"),
        (noted(kind="other"), True, "no file of trt_dynamo.save"),
        (lambda members: members.update({"graph.pt2": members["engines"]}), True, "damaged: File is not a zip file"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, change: Any, seal: bool, text: str) -> None:
    file = tmp_path / "m.pt2"
    save(small(), file)
    rewritten(file, change, seal=seal)
    with pytest.raises(FileError, match=text):
        load(file)


def test_a_graph_that_this_torch_cannot_read_names_both_versions(tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    save(small(), file)

    def change(members: dict[str, bytes]) -> None:
        inner = tmp_path / "inner"
        inner.write_bytes(members["graph.pt2"])
        rewritten(inner, lambda graph: graph.update({"m/models/model.json": b"{}"}), seal=False)
        members["graph.pt2"] = inner.read_bytes()
        noted(platform={"torch": "9.9"})(members)

    rewritten(file, change)
    with pytest.raises(FileError, match=r"torch .* cannot read the graph in .*, which torch 9\.9 wrote"):
        load(file)


@pytest.mark.parametrize("length", [0, 10, 1000, -1, -100])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "m.pt2"
    save(small(), file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FileError, match=r"cut off|damaged"):
        load(file)


def test_no_flipped_bit_gives_other_answers(tmp_path: Path) -> None:
    file, x = tmp_path / "m.pt2", torch.randn(3, 4)
    module = small()
    save(module, file)
    whole, expected, refused = file.read_bytes(), module(x), 0
    for position in range(0, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[position] ^= 4
        file.write_bytes(data)
        try:
            assert_same(load(file)(x), expected)
        except FileError:
            refused += 1
    assert refused  # those in the engines cost a rebuild instead


@pytest.mark.parametrize("change", [flipped("engines"), lambda members: members.pop("engines")])
def test_damaged_engines_are_built_anew(tmp_path: Path, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    file, module, x = tmp_path / "m.pt2", small(cache="off"), torch.randn(3, 4)
    save(module, file)
    rewritten(file, change, seal=False)
    trt_dynamo.reset_report()
    assert_same(load(file, cache="off")(x), module(x))
    assert report()["engines_built"] == 1
    assert "the engines in" in caplog.text and "are not used" in caplog.text
    with pytest.raises(FileError, match="no engine that fits"):
        load(file, cache="off", rebuild=False)


def test_what_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.pt2"
    save(small(), file)
    monkeypatch.setattr(trt_dynamo.trt, "version", lambda: "99.1")
    with pytest.raises(FileError, match=r"TensorRT's version is 99\.1 here and .* in the file"):
        load(file, rebuild=False)


def test_signed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, signed, x = tmp_path / "plain.pt2", tmp_path / "signed.pt2", torch.randn(3, 4)
    module = small()
    save(module, plain)
    monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", "0123456789abcdef")
    save(module, signed)
    assert_same(load(signed)(x), module(x))
    with pytest.raises(FileError, match="refused: it is not signed"):
        load(plain)
    rewritten(signed, noted(options={**OPTIONS, "strict": False}))
    with pytest.raises(FileError, match="refused: its signature is not one of our key"):
        load(signed)
    monkeypatch.setenv("TRT_DYNAMO_CACHE_KEY", "short")
    with pytest.raises(FileError, match="16 or more"):
        save(module, plain)


def test_nothing_in_a_file_is_pickled(tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    save(small(), file)

    def add_pickle(members: dict[str, bytes]) -> None:
        (tmp_path / "inner").write_bytes(members["graph.pt2"])
        rewritten(tmp_path / "inner", lambda inner: inner.update(examples(inner)), seal=False)
        members["graph.pt2"] = (tmp_path / "inner").read_bytes()

    def examples(inner: dict[str, bytes]) -> dict[str, bytes]:
        (name,) = [name for name in inner if "sample_inputs" in name]
        assert inner[name] == b""
        return {name: b"anything"}

    rewritten(file, add_pickle)
    with pytest.raises(FileError, match=r"only pickle could read.*sample_inputs"):
        load(file)


def test_only_a_compiled_module_is_saved_and_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.pt2"
    with pytest.raises(TypeError, match=r"trt_dynamo\.compile"):
        save(torch.nn.Linear(2, 2), file)  # type: ignore[arg-type]
    module = small()
    save(module, file)
    before = file.read_bytes()
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(b"half of it") / 0)
    with pytest.raises(ZeroDivisionError):
        save(module, file)
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".m")] == []
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt2")


class Labelled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x.relu() + 1, "label"


def test_what_torch_cannot_read_again_runs_and_is_not_saved(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    module = trt_dynamo.compile(Labelled(), (x,), **OPTIONS)
    assert_same(module(x)[0], x.relu() + 1)
    assert module(x)[1] == "label"
    with pytest.raises(FileError, match="torch cannot write this model to a file and read it again"):
        save(module, tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


def test_where_no_engine_can_run_eager_answers_or_strict_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = small(), torch.randn(3, 4)
    save(module, tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2", runtime="auto", strict=False)
    assert_same(loaded(x), module(x))
    assert caplog.text.count("the model runs in eager") == 1
    with pytest.raises(TrtDynamoError, match="no engine can run here"):
        load(tmp_path / "m.pt2", runtime="tensorrt")
