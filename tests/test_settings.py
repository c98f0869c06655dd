"""Settings: what parses, what is refused and in which words, what beats what, and that the docs tell the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_dynamo.errors import SettingsError, TrtDynamoError
from trt_dynamo.settings import FIELDS, Settings, read_env, rule_of, variable_of

GOOD: list[tuple[str, Any, Any]] = [
    ("runtime", "Reference", "reference"),
    ("runtime", " eager ", "eager"),
    ("min_segment_nodes", "7", 7),
    ("min_segment_nodes", " 0 ", 0),
    ("min_segment_nodes", 3.0, 3),
    ("eager_ops", "aten.gelu, aten.addmm.default", ("aten.gelu", "aten.addmm.default")),
    ("eager_ops", "aten.gelu aten.gelu", ("aten.gelu",)),
    ("eager_ops", ["aten::gelu", "torch.ops.aten.mm.default"], ("aten.gelu", "aten.mm.default")),
    ("eager_ops", {"b.y", "a.x", "c.z"}, ("a.x", "b.y", "c.z")),
    ("eager_ops", "", ()),
    ("eager_ops", (), ()),
    ("strict", "Yes", True),
    ("strict", "0", False),
    ("strict", 1, True),
    ("strict", True, True),
    ("cache", "OFF", "off"),
    ("cache", False, "off"),
    ("cache", True, "on"),
    ("cache", "0", "off"),
    ("cache", "readonly", "readonly"),
    ("progress", False, "off"),
    ("cache_dir", None, None),
    ("cache_dir", "none", None),
    ("cache_dir", "/data/engines", Path("/data/engines")),
    ("cache_dir", Path("/data"), Path("/data")),
    ("cache_dir", "engines", Path.cwd() / "engines"),
    ("cache_dir", "~/engines", Path.home() / "engines"),
    ("cache_size", "500MB", 500 * 2**20),
    ("cache_size", "1.5 GiB", 3 * 2**29),
    ("cache_size", "20g", 20 * 2**30),
    ("cache_size", "2T", 2**41),
    ("cache_size", "9007199254740993", 9007199254740993),
    ("cache_size", 20e9, 20_000_000_000),
    ("cache_size", 0, 0),
    ("targets", "8.6,12.0", ("8.6", "12.0")),
    ("targets", [8.6, "8.9"], ("8.6", "8.9")),
    ("optimization_level", "5", 5),
    ("optimization_level", None, None),
    ("optimization_level", "default", None),
    ("workspace", "1K", 1024),
    ("max_weight_sets", "1", 1),
    ("profiles", "2", 2),
    ("profiles", 3, 3),
    ("profiles", " sizes.json ", Path.cwd() / "sizes.json"),
    ("profiles", Path("/data/sizes.JSON"), Path("/data/sizes.JSON")),
    ("profiles", "~/sizes.json", Path.home() / "sizes.json"),
    ("max_tensor_bytes", "512MB", 2**29),
    ("max_tensor_bytes", "none", None),
]

BAD: list[tuple[str, Any, str]] = [
    ("runtime", "tensort", "Did you mean 'tensorrt'?"),
    ("runtime", "gpu", "Expected one of auto, tensorrt, reference, eager."),
    ("runtime", True, "Expected one of auto"),
    ("runtime", None, "Expected one of auto"),
    ("runtime", ["auto"], "Expected one of auto"),
    ("min_segment_nodes", True, "Expected a whole number."),
    ("min_segment_nodes", -1, "Expected a whole number."),
    ("min_segment_nodes", "3.0", "Expected a whole number."),
    ("min_segment_nodes", 2.5, "Expected a whole number."),
    ("min_segment_nodes", "", "Expected a whole number."),
    ("min_segment_nodes", "1_000", "Expected a whole number."),
    ("min_segment_nodes", "٣", "Expected a whole number."),
    ("min_segment_nodes", "3K", "Expected a whole number."),
    ("min_segment_nodes", None, "Expected a whole number."),
    ("min_segment_nodes", [3], "Expected a whole number."),
    ("eager_ops", "gelu", "'gelu' is not of the form aten.gelu or aten.gelu.default."),
    ("eager_ops", 5, "Expected a list of texts such as aten.gelu"),
    ("eager_ops", [5], "Expected texts in the list, not 5."),
    ("eager_ops", {"aten.gelu": 1}, "Expected a list of texts"),
    ("eager_ops", b"aten.gelu", "Expected a list of texts"),
    ("strict", "maybe", "Expected one of 1, true, yes, on, 0, false, no, off."),
    ("strict", 2, "Expected one of 1"),
    ("strict", 1.0, "Expected one of 1"),
    ("strict", None, "Expected one of 1"),
    ("cache", "readnoly", "Did you mean 'readonly'?"),
    ("cache", 2, "Expected one of on, readonly, refresh, off."),
    ("cache_dir", 5, "Expected a folder's path."),
    ("cache_dir", b"/data", "Expected a folder's path."),
    ("cache_dir", "~no-such-user/x", "home"),
    ("cache_size", "20 apples", "Expected a size such as 500MB or 20GB, or a number of bytes."),
    ("cache_size", "-5GB", "Expected a size"),
    ("cache_size", -5, "Expected a size"),
    ("cache_size", False, "Expected a size"),
    ("cache_size", "inf", "Expected a size"),
    ("cache_size", float("nan"), "Expected a size"),
    ("cache_size", 0.5, "Expected a size"),
    ("targets", "86", "'86' is not of the form 8.6 or 12.0."),
    ("targets", [(8, 6)], "Expected texts in the list, not (8, 6)."),
    ("optimization_level", 6, "Expected a whole number from 0 to 5."),
    ("optimization_level", "high", "Expected a whole number from 0 to 5."),
    ("optimization_level", False, "Expected a whole number from 0 to 5."),
    ("workspace", 0, "or a number of bytes, 1 or more."),
    ("max_weight_sets", 0, "Expected a whole number, 1 or more."),
    ("profiles", 0, "Expected a whole number, 1 or more, or the path of a .json file."),
    ("profiles", "two", "or the path of a .json file."),
    ("profiles", "sizes.yaml", "or the path of a .json file."),
    ("profiles", True, "or the path of a .json file."),
    ("profiles", None, "or the path of a .json file."),
    ("profiles", b"sizes.json", "or the path of a .json file."),
    ("max_tensor_bytes", 0, "or a number of bytes, 1 or more."),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_a_good_value_parses_as_option_and_as_argument(name: str, value: Any, expected: Any) -> None:
    for settings in (Settings().merge({name: value}), Settings(**{name: value})):
        got = getattr(settings, name)
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_bad_value_is_refused_with_the_reason(name: str, value: Any, words: str) -> None:
    makers: tuple[Callable[..., Settings], ...] = (Settings, lambda **options: Settings().merge(options))
    for make in makers:
        with pytest.raises(SettingsError) as caught:
            make(**{name: value})
        text = str(caught.value)
        assert f"{name!r} cannot be {value!r}. " in text
        assert words in text
        assert text.endswith((".", "?"))
        assert ".." not in text


@pytest.mark.parametrize(("name", "value", "expected"), [case for case in GOOD if isinstance(case[1], str)])
def test_the_environment_takes_what_an_option_takes(name: str, value: str, expected: Any) -> None:
    environ = {variable_of(name): value}
    assert getattr(Settings.from_env(environ), name) == expected
    assert read_env(environ)[1] == []


@pytest.mark.parametrize(
    ("name", "value", "words"), [case for case in BAD if isinstance(case[1], str) and case[1].strip()]
)
def test_a_bad_variable_warns_once_and_is_ignored(
    name: str, value: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    environ = {variable_of(name): value, "TRT_DYNAMO_REBUILD_AFTER": "5"}
    for _ in range(3):
        settings = Settings.from_env(environ)
    assert getattr(settings, name) == FIELDS[name].default
    assert settings.rebuild_after == 5, "the good variables still count"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{variable_of(name)} cannot be {value!r}. ")
    assert words in record.getMessage()
    assert record.getMessage().endswith(". The variable is ignored.") or "? The variable" in record.getMessage()


def test_a_second_mistake_is_warned_about_as_well(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_env({"TRT_DYNAMO_CACHE": "onn"})
    Settings.from_env({"TRT_DYNAMO_CACHE": "offf"})
    assert [record.getMessage().split(".")[0] for record in caplog.records] == [
        "TRT_DYNAMO_CACHE cannot be 'onn'",
        "TRT_DYNAMO_CACHE cannot be 'offf'",
    ]


def test_a_percent_sign_in_a_variable_does_not_break_the_log(caplog: pytest.LogCaptureFixture) -> None:
    Settings.from_env({"TRT_DYNAMO_CACHE": "100%s%d"})
    assert "100%s%d" in caplog.text


def test_an_unknown_option_names_the_nearest_and_all() -> None:
    for wrong, near in (("cache_drr", "cache_dir"), ("Cache-Dir", "cache_dir"), ("eager_op", "eager_ops")):
        with pytest.raises(SettingsError) as caught:
            Settings().merge({wrong: 1})
        text = str(caught.value)
        assert text.startswith(
            f"option {wrong!r} is not a setting of trt_dynamo. Did you mean {near!r}? The settings are "
        )
        assert all(name in text for name in FIELDS)
        assert text.endswith(".")


@pytest.mark.parametrize("wrong", ["zzz", "", 5, None, ("a",)])
def test_an_unknown_option_that_is_near_to_nothing(wrong: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings().merge({wrong: 1})
    assert str(caught.value).startswith(f"option {wrong!r} is not a setting of trt_dynamo. The settings are runtime, ")


def test_an_unknown_variable_names_the_nearest_variable(caplog: pytest.LogCaptureFixture) -> None:
    assert Settings.from_env({"TRT_DYNAMO_CACHEDIR": "/x"}) == Settings()
    assert (
        caplog.records[0]
        .getMessage()
        .startswith("TRT_DYNAMO_CACHEDIR is not a setting of trt_dynamo. Did you mean 'TRT_DYNAMO_CACHE_DIR'? ")
    )
    assert "TRT_DYNAMO_MIN_SEGMENT_NODES" in caplog.text


def test_variables_are_told_apart_by_case() -> None:
    values, problems = read_env({"TRT_DYNAMO_Cache": "off", "trt_dynamo_strict": "1"})
    assert values == {}
    assert "'TRT_DYNAMO_CACHE'?" in problems[0]
    assert "'TRT_DYNAMO_STRICT'?" in problems[1]


def test_an_empty_variable_is_not_set() -> None:
    environ = {variable_of(name): " " for name in FIELDS}
    assert read_env(environ) == ({}, [])


def test_other_variables_are_not_ours() -> None:
    assert read_env({"TRT_CACHE": "x", "TORCH_LOGS": "x", "MY_TRT_DYNAMO_CACHE": "x"}) == ({}, [])


def test_options_beat_variables_beat_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRT_DYNAMO_MIN_SEGMENT_NODES", "5")
    monkeypatch.setenv("TRT_DYNAMO_CACHE", "off")
    settings = Settings.from_env().merge({"cache": "refresh"})
    assert (settings.min_segment_nodes, settings.cache, settings.rebuild_after) == (5, "refresh", 8)
    assert Settings.from_env().merge(None) == Settings.from_env().merge({}) == Settings.from_env()


def test_a_setting_of_the_process_is_no_option() -> None:
    with pytest.raises(SettingsError, match="set TRT_DYNAMO_FLAVOR instead"):
        Settings().merge({"flavor": "tensorrt"})
    assert Settings.from_env({"TRT_DYNAMO_FLAVOR": "tensorrt_rtx"}).flavor == "tensorrt_rtx"


@pytest.mark.parametrize("options", [["cache"], "cache=off", 5, ()])
def test_options_that_are_no_dict(options: Any) -> None:
    with pytest.raises(SettingsError, match="options must be a dict"):
        Settings().merge(options)


def test_a_mistake_is_a_ValueError_and_one_of_ours() -> None:
    assert issubclass(SettingsError, ValueError)
    assert issubclass(SettingsError, TrtDynamoError)


def test_ops_may_be_given_as_torch_objects() -> None:
    import torch

    gelu = torch.ops.aten.gelu
    assert Settings().merge({"eager_ops": [gelu, gelu.default]}).eager_ops == ("aten.gelu", "aten.gelu.default")


def test_settings_are_frozen_hashable_and_equal_by_value() -> None:
    settings = Settings(eager_ops=["aten.gelu"])  # type: ignore[arg-type]
    assert {settings: 1}[Settings(eager_ops=("aten.gelu",))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.strict = True  # type: ignore[misc]


def test_what_changes_an_engine_is_told_to_the_cache() -> None:
    fields = Settings(targets=("8.6",), precision="fp16").engine_fields()
    precision = {"precision": "fp16", "precision_keep": (), "fp16_accumulate": "default"}
    others = {"optimization_level": None, "workspace": None, "sparse_weights": False}
    assert fields == {"targets": ("8.6",), **others, **precision}


def test_every_setting_has_its_words_and_defaults_that_parse() -> None:
    for name, field in FIELDS.items():
        assert rule_of(name).help
        assert getattr(Settings().merge({} if rule_of(name).env_only else {name: field.default}), name) == field.default


@given(st.text())
def test_no_text_makes_a_variable_raise(text: str) -> None:
    for name in FIELDS:
        values, problems = read_env({variable_of(name): text})
        assert len(values) + len(problems) <= 1
        assert (not text.strip()) == (not values and not problems)


@given(st.integers(min_value=0, max_value=2**80))
def test_sizes_are_exact(number: int) -> None:
    assert Settings(cache_size=number).cache_size == number
    assert Settings.from_env({"TRT_DYNAMO_CACHE_SIZE": str(number)}).cache_size == number
