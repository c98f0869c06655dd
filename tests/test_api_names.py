"""The API check's own parts, and the names of TensorRT's members that our code holds as strings.

`make api-check` compares with the stubs of every version; here, without a download, the installed TensorRT judges.
"""

from __future__ import annotations

import ast
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_api
from scripts.check_api import NAMING, PACKAGE, PLANTED, enum_members, names_in_calls, planted_lines
from scripts.fix_stub import fix, split_parameters
from scripts.hollow_library import hollow_library
from scripts.make_stubs import VERSIONS
from trt_dynamo.trt import load

GENERATED = '''
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['INetworkDefinition', 'bool']
class DataType:
    """
    Members:
      FLOAT : of 32 bits
    """
    FLOAT: typing.ClassVar[DataType]
    BOOL: typing.ClassVar[DataType]
    def __eq__(self, other: typing.Any) -> bool:
        ...
    @property
    def name(self) -> str:
        ...
class Dims:
    def __len__(self) -> int:
        ...
class Weights:
    @typing.overload
    def __init__(self, a: typing.SupportsInt) -> None:
        ...
    @typing.overload
    def __init__(self, a: typing.SupportsInt) -> None:
        ...
class IShuffleLayer:
    reshape_dims: Dims
    recorder: ...
class INetworkDefinition:
    def add_shuffle(self, input: ITensor) -> IShuffleLayer:
        """
            :arg input: The input.

            :returns: The new shuffle layer, or :class:`None` if it could not be created.
        """
    def get_input(self, index: typing.SupportsInt) -> ITensor:
        """
            :returns: The tensor, or :class:`None` if it is out of range.
        """
    def add_input(self, name: str, dtype: DataType, shape: Dims) -> ITensor:
        ...
    def add_scale(self, input: ITensor, shift: Weights = None, axis: dict[str, int], flag: bool) -> IShuffleLayer:
        """
            A word, with a: colon.
        """
    def add_concatenation(self, inputs: list[ITensor]) -> IShuffleLayer:
        ...
    @staticmethod
    def __enter__(this):
        ...
class IProgressMonitor:
    def phase_start(self, name: str, steps: typing.SupportsInt) -> None:
        ...
class ITensor:
    def size(self: ITensor, in: list[int], out: ...) -> bool:
        ...
bool: DataType
def get_plugin_registry(index: typing.SupportsInt) -> ...:
    ...
'''


def members(stub: str, name: str) -> dict[str, str]:
    """The functions of a class in the stub, without their bodies, and its properties' setters."""
    (found,) = [node for node in ast.parse(stub).body if isinstance(node, ast.ClassDef) and node.name == name]
    functions = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(node).splitlines()[-2 if len(node.body) else -1] for node in functions}


def test_a_stub_says_what_the_bindings_take_and_give() -> None:
    stub = fix(GENERATED)
    network = members(stub, "INetworkDefinition")
    assert network["add_shuffle"] == "def add_shuffle(self, input: ITensor) -> IShuffleLayer | None:"
    assert network["get_input"] == "def get_input(self, index: typing.SupportsInt) -> ITensor:"
    assert network["add_input"] == (
        "def add_input(self, name: str, dtype: DataType, "
        "shape: Dims | collections.abc.Sequence[int]) -> ITensor | None:"
    )
    assert network["add_scale"] == (
        "def add_scale(self, input: ITensor, shift: Weights | numpy.ndarray[typing.Any, typing.Any] | None=None, "
        "axis: dict[str, int]=..., flag: builtins.bool=...) -> IShuffleLayer:"
    )
    assert "collections.abc.Sequence[ITensor]" in network["add_concatenation"]
    assert network["__enter__"] == "def __enter__(this: typing.Any) -> typing.Any:"
    assert members(stub, "ITensor")["size"] == (
        "def size(self, in_: collections.abc.Sequence[int], out: typing.Any) -> builtins.bool:"
    )
    assert members(stub, "IProgressMonitor")["phase_start"] == "def phase_start(self, name: str, steps: int) -> None:"
    assert members(stub, "IShuffleLayer")["reshape_dims"] == (
        "def reshape_dims(self, value: Dims | collections.abc.Sequence[int]) -> None:"
    )
    assert members(stub, "DataType")["__eq__"] == "def __eq__(self, other: object, /) -> builtins.bool:"
    assert "__iter__" in members(stub, "Dims")
    assert "overload" not in stub.partition("import builtins")[2], "overloads alike become one function"
    assert "32 bits" not in stub, "NVIDIA's documentation is not copied"
    assert "out of range" not in stub


def test_something_new_that_does_not_parse_is_an_error() -> None:
    with pytest.raises(SyntaxError):
        fix("class A:\n    def f(self, lambda: int) -> None:\n        ...\n")


def test_parameters_are_split_outside_of_brackets() -> None:
    assert split_parameters("self, a: dict[str, int], b: f(1, 2) = (3, 4), *") == [
        "self",
        "a: dict[str, int]",
        "b: f(1, 2) = (3, 4)",
        "*",
    ]
    assert split_parameters("") == []


@pytest.mark.parametrize("functions", [[], ["alpha"], ["alpha", "beta", "gamma"]])
def test_a_hollow_library_can_be_loaded_and_has_its_names(functions: list[str], tmp_path: Path) -> None:
    file = tmp_path / "libhollow.so.3"
    file.write_bytes(hollow_library("libhollow.so.3", functions))
    # A process of its own: the loader keeps a library that it once loaded under its name.
    source = (
        f"import ctypes; lib = ctypes.CDLL({str(file)!r}); print([hasattr(lib, n) for n in {[*functions, 'zeta']!r}])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * len(functions) + [False]), done.stderr


def test_a_hollow_library_answers_to_its_soname(tmp_path: Path) -> None:
    file = tmp_path / "another-file-name"
    file.write_bytes(hollow_library("libhollow-soname.so.7", ["alpha"]))
    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL("libhollow-soname.so.7").alpha is not None


def test_a_hollow_library_for_a_machine_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="no ELF library can be made for sparc"):
        hollow_library("libhollow.so", [], "sparc")


def test_enum_members_are_read_off_a_stub() -> None:
    assert enum_members(fix(GENERATED))["DataType"] == {"FLOAT", "BOOL"}


def test_the_planted_mistakes_cover_every_version() -> None:
    for version in VERSIONS:
        lines = [PLANTED.splitlines()[number - 1] for number in planted_lines(version.name)]
        assert len(lines) >= 6
        assert ("FP16" in "".join(lines)) == (version.name != "10.13")


def test_names_in_calls_are_found_with_their_place() -> None:
    found = list(
        names_in_calls([PACKAGE / "aten_converters" / "arithmetic.py", PACKAGE / "aten_converters" / "shapes.py"])
    )
    assert ("UnaryOperation", "NOT") in {(enum, name) for _, enum, name in found}
    assert all(where.startswith("trt_dynamo/aten_converters/") for where, _, _ in found)


def test_a_wrong_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aten_converters").mkdir()
    calls = [
        'net.unary("EXPONENT", x)',
        'net.unary("EXP", x)',
        'net.reduce("EXP", x)',
        'other("RELU")',
        'other("Relu")',
    ]
    (tmp_path / "calls.py").write_text("\n".join(calls))
    table = ['__all__ = ["TABLE"]', 'TABLE = {1: "RELU",', '2: "GELU", 3: "EXP"}']
    (tmp_path / "aten_converters" / "table.py").write_text("\n".join(table))
    monkeypatch.setattr(check_api, "PACKAGE", tmp_path)
    monkeypatch.setattr(check_api, "ROOT", tmp_path)
    known = {"UnaryOperation": frozenset({"EXP"}), "ActivationType": frozenset({"RELU"})}
    assert check_api.wrong_names(known) == [
        "calls.py:1: UnaryOperation has no member EXPONENT",
        "calls.py:3: ReduceOperation has no member EXP",
        "aten_converters/table.py:3: no enum has a member GELU",
    ]


def test_no_name_that_we_use_is_wrong_here() -> None:
    installed = vars(load())
    enums = {name: value for name, value in installed.items() if hasattr(value, "__members__")}
    assert set(NAMING.values()) <= set(enums)
    assert check_api.wrong_names({name: frozenset(enum.__members__) for name, enum in enums.items()}) == []
