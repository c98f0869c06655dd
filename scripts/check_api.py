"""Checks our use of TensorRT's Python API against every version that we support, without any TensorRT.

Comes in: the stubs of make_stubs.py and our sources. Goes out: exit code 0, or the mistakes, each with file and line.
Three checks: that the check itself finds planted mistakes; mypy over the package per version; enum members named by
strings.

    python -m scripts.check_api
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from scripts.make_stubs import ROOT, STUBS, VERSIONS
from scripts.make_stubs import main as make_stubs

PACKAGE = ROOT / "trt_dynamo"

# Mistakes that mypy must find; after `#!` the versions where the line is one (all, where none is named).
PLANTED = """\
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt


def plant(net: trt.INetworkDefinition, x: trt.ITensor, config: trt.IBuilderConfig) -> Any:
    config.set_flag(trt.BuilderFlag.FP16)  #! 11.4 rtx-1.7
    config.set_flag(trt.BuilderFlag.REFIT)
    net.add_attention(x, x, x, trt.AttentionNormalizationOp.SOFTMAX, False)  #! 10.13
    print(net.add_plugin_v3)  #! rtx-1.7
    net.add_softmax_v7(x)  #!
    net.add_softmax(x).axes = 1  #! a layer may be None
    net.add_unary(x, trt.UnaryOperation.EXPONENT)  #!
    net.add_reduce(x, trt.ReduceOperation.SUM, [0], True)  #!
    net.add_constant((2, 3), trt.Weights(trt.DataType.BF16, 4096, 6))
    x.shape = (1, 2)
    x.shape = "12"  #!
    shuffle = net.add_shuffle(x)
    if shuffle is not None:
        shuffle.first_transpose = [1, 0]
        shuffle.second_transpse = [1, 0]  #!
    return tuple(x.shape)
"""

# Our functions that take the name of an enum's member, and of which enum.
NAMING = {
    "unary": "UnaryOperation",
    "elementwise": "ElementWiseOperation",
    "binary": "ElementWiseOperation",
    "activation": "ActivationType",
    "reduce": "ReduceOperation",
}

# Where every word in capitals (of 3 letters or more) is the name of an enum's member, as in `{aten.exp: "EXP"}`.
NAMED_BY_STRINGS = ("aten_converters/*.py", "build.py", "trt.py")
CAPITALS = re.compile(r"[A-Z][A-Z0-9_]{2,}")

# Members that only some versions have, and that the package asks for (`hasattr`, `getattr`) before it uses them.
PROBED: Mapping[str, frozenset[str]] = {"BuilderFlag": frozenset({"REQUIRE_USER_ALLOCATION"})}


def main() -> int:
    """Runs the three checks; 1 when one of them finds something."""
    if make_stubs() != 0:
        return 1
    failures = 0
    for version in VERSIONS:
        stubs = STUBS / version.name
        mistakes = [*self_check(stubs), *mypy_errors(stubs, PACKAGE)]
        mistakes += wrong_names(enum_members((stubs / "tensorrt" / "__init__.pyi").read_text()))
        print(f"TensorRT {version.name}: {len(mistakes) or 'no'} mistakes" + "".join(f"\n  {m}" for m in mistakes))
        failures += len(mistakes)
    return 1 if failures else 0


def self_check(stubs: Path) -> list[str]:
    """Whether the stubs parse without a complaint, and mypy finds the planted mistakes and no others."""
    planted = stubs / "planted.py"
    planted.write_text(PLANTED)
    found = {int(line.split(":")[1]) for line in mypy_errors(stubs, planted)}
    wanted = set(planted_lines(stubs.name))
    reports = [f"planted mistake not found: {PLANTED.splitlines()[n - 1].strip()}" for n in sorted(wanted - found)]
    reports += [f"false alarm: {PLANTED.splitlines()[n - 1].strip()}" for n in sorted(found - wanted)]
    return [*mypy_errors(stubs, stubs / "tensorrt" / "__init__.pyi"), *reports]


def planted_lines(version: str) -> Iterator[int]:
    """The lines of PLANTED that are a mistake in the version."""
    known = {v.name for v in VERSIONS}
    for number, line in enumerate(PLANTED.splitlines(), 1):
        _, mark, words = line.partition("#!")
        named = known.intersection(words.split())
        if mark and (not named or version in named):
            yield number


def mypy_errors(stubs: Path, target: Path) -> list[str]:
    """The errors, `file:line: error: ...`, that mypy finds in `target` with the stubs of one version."""
    cache = ROOT / ".mypy_cache" / "api"  # one for all versions: what they share, torch above all, is read once
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(cache), str(target)]
    environment = {**os.environ, "MYPYPATH": str(stubs)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    errors = [line for line in done.stdout.splitlines() if re.search(r":\d+: error: ", line)]
    if done.returncode and not errors:
        raise RuntimeError(f"mypy could not run: {done.stdout}{done.stderr}")
    return errors


def enum_members(stub: str) -> dict[str, frozenset[str]]:
    """The classes of a stub, each with the names that it holds as class variables."""
    classes = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ClassDef):
            names = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            classes[node.name] = frozenset(name.id for name in names if isinstance(name, ast.Name))
    return classes


def wrong_names(members: Mapping[str, frozenset[str]]) -> list[str]:
    """The names of enum members, in our calls and our tables, that are not among `members`."""
    known = {enum: members.get(enum, frozenset()) | PROBED.get(enum, frozenset()) for enum in {*members, *PROBED}}
    some = frozenset().union(*known.values())
    mistakes = [
        f"{where}: {enum} has no member {name}"
        for where, enum, name in names_in_calls(PACKAGE.rglob("*.py"))
        if name not in known.get(enum, frozenset())
    ]
    files = [file for pattern in NAMED_BY_STRINGS for file in PACKAGE.glob(pattern)]
    return mistakes + [f"{where}: no enum has a member {name}" for where, name in names(files) if name not in some]


def names(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Where and which: each string in capitals, but for a module's list of what it exports."""
    for file in sorted(files):
        tree = ast.parse(file.read_text())
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("__all__")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CAPITALS.fullmatch(node.value):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value


def names_in_calls(files: Iterable[Path]) -> Iterator[tuple[str, str, str]]:
    """Where, enum and member of each name that is written out in a call such as `net.unary("EXP", x)`."""
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            first = node.args[0]
            if node.func.attr in NAMING and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", NAMING[node.func.attr], first.value


if __name__ == "__main__":
    sys.exit(main())
