"""How the backend is reached and refused: its names beside another package's, options, and machines without a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends import registry

import trt_dynamo
from tests.compiled import compiled, engine_calls
from trt_dynamo.build import build, profile_of
from trt_dynamo.registration import release_shared_name, warn_if_taken
from trt_dynamo.reports import report
from trt_dynamo.settings import Settings
from trt_dynamo.testing import check


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """torch's table of backends, as it was before the test afterwards."""
    registry.list_backends()  # fills the table
    functions, entries = dict(registry._COMPILER_FNS), dict(registry._BACKENDS)
    yield registry._COMPILER_FNS
    registry._COMPILER_FNS.clear()
    registry._COMPILER_FNS.update(functions)
    registry._BACKENDS.clear()
    registry._BACKENDS.update(entries)


def model(x: torch.Tensor) -> torch.Tensor:
    return (x.exp() + 1).sin() * 2


@pytest.mark.parametrize("name", ["tensorrt", "trt_dynamo"])
def test_both_names_need_no_import(name: str) -> None:
    code = (
        "import torch, sys\n"
        f"f = torch.compile(lambda x: x.exp() * 2 + 1, backend={name!r}, options={{'runtime': 'reference'}})\n"
        "x = torch.randn(3)\n"
        "with torch.no_grad(): torch.testing.assert_close(f(x), x.exp() * 2 + 1)\n"
        "print(sys.modules['trt_dynamo.reports'].report()['engine_calls'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


def test_another_package_can_take_the_name_after_ours_was_used(names: dict[str, Any]) -> None:
    x = torch.randn(3)
    with torch.no_grad():
        compiled(model)(x)

        def theirs(module: Any, _: Any) -> Any:
            return module.forward

        registry.register_backend(theirs, name="tensorrt")
        assert registry.lookup_backend("tensorrt") is theirs
        assert registry.lookup_backend("trt_dynamo") is trt_dynamo.tensorrt


def test_our_name_works_again_after_it_was_released(names: dict[str, Any]) -> None:
    for _ in range(3):
        assert registry.lookup_backend("tensorrt") is trt_dynamo.tensorrt
        release_shared_name(trt_dynamo.tensorrt)
        assert "tensorrt" not in names


def test_a_name_that_another_package_holds_is_left_alone_with_one_warning(
    names: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def theirs(module: Any, _: Any) -> Any:
        return module.forward

    names["tensorrt"] = theirs
    for _ in range(2):
        warn_if_taken(trt_dynamo.tensorrt)
        release_shared_name(trt_dynamo.tensorrt)
    assert names["tensorrt"] is theirs
    told = [record.getMessage() for record in caplog.records if 'backend="trt_dynamo"' in record.getMessage()]
    assert len(told) == 1


def test_an_unknown_option_names_the_nearest() -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"min_segment_node.*Did you mean 'min_segment_nodes'"):
        torch.compile(model, backend="tensorrt", options={"min_segment_node": 1})(torch.randn(3))


def test_a_mode_is_not_ours_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TRT_DYNAMO_RUNTIME", "reference")
    x = torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="tensorrt", mode="max-autotune")(x), model(x))
    assert any("max-autotune" in record.getMessage() for record in caplog.records)
    assert engine_calls() == 1


def test_a_misspelled_variable_warns_and_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRT_DYNAMO_RUNTIMES", "reference")
    x = torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert any("Did you mean" in record.getMessage() for record in caplog.records)


def test_a_model_on_the_cpu_runs_in_eager_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    fast = torch.compile(model, backend="tensorrt", options={"strict": False}, dynamic=False)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for n in (3, 4, 5):
            x = torch.randn(n)
            torch.testing.assert_close(fast(x), model(x))
    assert sum("runs in eager" in record.getMessage() for record in caplog.records) == 1
    assert report()["graphs"] == 0
    assert sum(report()["eager_graphs"].values()) == 3


def test_the_guards_that_failed_are_told() -> None:
    class Scaled(torch.nn.Module):
        factor = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * self.factor + x

    scaled = Scaled()
    fast = compiled(scaled, dynamic=False)
    with torch.no_grad():
        fast(torch.ones(2))
        assert report()["guard_failures"] == 0 and report()["guard_failure_reasons"] == {}
        fast(torch.ones(3))
        fast(torch.ones(4))
        fast(torch.ones(3))
        scaled.factor = 3
        assert fast(torch.ones(3)).tolist() == [4, 4, 4]
        compiled(torch.sin)(torch.ones(5))  # other code
    told = report()
    assert told["graphs"] == 5 and told["guard_failures"] == 3
    reasons = told["guard_failure_reasons"]
    assert sum(reasons.values()) == 3
    assert sum("size mismatch at index 0. expected" in reason for reason in reasons) == 2
    assert any("factor" in reason for reason in reasons), reasons
    assert not any(reason.startswith("0/") or "\n" in reason for reason in reasons)


def test_the_setting_eager_builds_nothing() -> None:
    x = torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, runtime="eager")(x), model(x))
    assert report()["engines_built"] == 0


def test_a_failure_while_lowering_leaves_the_model_to_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr("trt_dynamo.backend.partition", fail)
    x = torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, strict=False)(x), model(x))
    assert any("injected" in record.getMessage() for record in caplog.records)


def test_eager_ops_stay_in_eager_and_small_segments_too() -> None:
    told = trt_dynamo.explain(model, torch.randn(3), options={"eager_ops": "aten.sin", "min_segment_nodes": 2})
    assert {(v.target, v.reason) for v in told.eager} == {
        ("aten.sin.default", "the setting eager_ops"),
        ("aten.mul.Tensor", "in a run of fewer than min_segment_nodes=2 compute nodes"),
    }
    assert told.converted == 2
    assert len(told.segments) == 1
    assert "aten.sin.default: the setting eager_ops" in str(told)


def test_a_build_can_show_its_progress(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_dynamo.progress.PATIENCE", -1)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    (network,) = check(model, torch.randn(3, 4)).networks
    for setting, shown in (("on", True), ("off", False)):
        settings = Settings().merge({"progress": setting})
        assert len(build(network, profile_of(network, {}), settings, label="a segment")) > 1000
        assert ("a segment: " in capfd.readouterr().err) == shown


def test_plans_are_built_for_chosen_gpus_ahead_of_time() -> None:
    settings = Settings(targets=("8.6", "8.9"), min_segment_nodes=1, strict=True)
    check(model, torch.randn(3, 4), settings=settings)
    with pytest.raises(trt_dynamo.BuildError, match=r"cannot build for compute capability 9\.0"):
        check(model, torch.randn(3, 4), settings=Settings(targets=("9.0",), min_segment_nodes=1, strict=True))
