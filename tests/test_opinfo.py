"""torch's own databases of operators and modules, through lowering, conversion, a real plan, and evaluation, against
eager. `make test` runs a fixed part; `make test-all` runs every sample, in every dtype, with static and dynamic sizes.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks.op_coverage import MODES, readme_table
from tests.op_cases import DTYPES, Outcome, case_at, cases, expectations, names, run

# torch warns of much in its own samples.
quiet = pytest.mark.filterwarnings("ignore")

# The table was written with one torch; another has samples that it has not seen.
SAME_TORCH = torch.__version__.startswith(expectations()["torch"] + ".")

# How many samples passed when this was last looked at.
LEAST = {
    "float32 static": 11822, "float32 dynamic": 11671, "float16 static": 4571, "float16 dynamic": 4462,
    "bfloat16 static": 4554, "bfloat16 dynamic": 4448, "int32 static": 3148, "int32 dynamic": 3096,
    "int64 static": 3152, "int64 dynamic": 3100, "bool static": 2161, "bool dynamic": 2161,
}  # fmt: skip


def draw(name: str, about: str, count: int) -> int:
    """A number below `count` that is always the same for the name."""
    return zlib.crc32(f"{name} {about}".encode()) % count


def known(name: str, dtype: str, mode: str, kind: str) -> str:
    """Of how many of the samples an outcome of this kind is known: `all`, `some` or `none`."""
    entry = expectations()[kind].get(name, {})
    return next((extent for extent in ("all", "some") if f"{dtype} {mode}" in entry.get(extent, ())), "none")


def judge(name: str, dtype: str, mode: str, outcome: Outcome) -> None:
    """Fails on a wrong result, on a sample that is no longer converted, and on one that is against what is known."""
    if outcome.kind in ("wrong", "error"):
        assert known(name, dtype, mode, "failures") == "some", f"{outcome.kind}: {outcome.detail}"
        return
    expected = {kind: known(name, dtype, mode, kind) for kind in ("unsupported", "untraceable")}
    if outcome.kind == "passed":
        whole = [kind for kind, extent in expected.items() if extent == "all"]
        assert not whole, f"passes now, though listed as {whole[0]}: write tests/op_expectations.json anew"
    else:
        assert expected[outcome.kind] != "none", f"{outcome.kind}: {outcome.detail}"


@quiet
@pytest.mark.parametrize("name", names())
def test_a_sample(name: str) -> None:
    """A static one and a dynamic one in float32, and one in another dtype."""
    other = DTYPES[1 + draw(name, "dtype", len(DTYPES) - 1)]
    for dtype, mode in (("float32", "static"), ("float32", "dynamic"), (other, MODES[draw(name, "mode", 2)])):
        case = case_at(name, getattr(torch, dtype), draw(name, f"{dtype} {mode}", 12))
        if case is not None:
            build = (dtype, mode) == ("float32", "static")
            judge(name, dtype, mode, run(case, getattr(torch, dtype), dynamic=mode == "dynamic", build=build))


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_every_sample(name: str, dtype: str) -> None:
    for mode in MODES:
        outcomes = []
        for case in cases(name, getattr(torch, dtype)):
            outcomes.append(run(case, getattr(torch, dtype), dynamic=mode == "dynamic", build=True))
            judge(name, dtype, mode, outcomes[-1])
        kinds = {"unsupported": ("unsupported",), "untraceable": ("untraceable",), "failures": ("wrong", "error")}
        for kind, which in kinds.items() if outcomes and SAME_TORCH else ():
            if known(name, dtype, mode, kind) == "some":
                assert any(outcome.kind in which for outcome in outcomes), f"no sample is among the {kind} any more"


def test_nothing_is_wrong_and_little_is_left() -> None:
    """What the last whole run counted; it may only get better."""
    counts, failures = expectations()["counts"], expectations()["failures"]
    assert set(counts) == {f"{dtype} {mode}" for dtype in DTYPES for mode in MODES}
    for which, found in counts.items():
        expected = sum(which in entry["some"] for entry in failures.values())
        assert found["wrong"] + found["error"] <= 2 * expected, which
        assert found["passed"] >= LEAST[which], which
    for dtype in DTYPES:
        static, dynamic = counts[f"{dtype} static"], counts[f"{dtype} dynamic"]
        assert dynamic["passed"] >= 0.94 * static["passed"], dtype


def test_every_exception_has_its_reason() -> None:
    for kind in ("unsupported", "untraceable", "failures"):
        entries = expectations()[kind]
        assert [name for name, entry in entries.items() if not entry["reason"]] == []
        runs = [run for entry in entries.values() for run in (*entry.get("all", ()), *entry["some"])]
        assert set(runs) <= set(expectations()["counts"])


def test_the_readme_has_the_counts() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    found = re.search(r"<!-- op_coverage -->\n(.*?)<!-- /op_coverage -->", text, re.DOTALL)
    assert found is not None and found.group(1) == readme_table(expectations())
