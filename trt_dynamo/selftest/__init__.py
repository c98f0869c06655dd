"""`python -m trt_dynamo selftest`: a fixed list of cases, built, run and compared with eager on this very machine.

Comes in: which cases, and what answers them. Goes out: a `Result` for each, whatever becomes of the process that runs
it, and one document to attach to an issue.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_dynamo.selftest.trial import Case

TABLES = ("operators", "models", "features", "execution")


def load_cases(files: Iterable[str] = ()) -> Mapping[str, Case]:
    """All cases by name: the tables of this package, then what the files register."""
    for name in TABLES:
        importlib.import_module(f"trt_dynamo.selftest.{name}")
    from trt_dynamo.selftest.trial import CASES

    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"selftest_file_{number}", file)
        if spec is None or spec.loader is None:
            raise ValueError(f"{file} is not a Python file")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return CASES


def chosen(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that contain, or as `*` and `?` say are like, one of the patterns; all where there is none."""
    patterns = list(patterns)
    return [name for name in names if not patterns or any(each in name or fnmatchcase(name, each) for each in patterns)]
