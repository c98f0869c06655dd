"""Makes typed stubs of TensorRT's Python API, several versions of it, from NVIDIA's own bindings wheels.

Comes in: the wheels, from the package index. Goes out: `.stubs/<version>/tensorrt/__init__.pyi`, never committed, which
check_api.py hands to mypy. Needs Linux; no GPU, no compiler, and none of TensorRT's libraries (hollow_library.py).

    python -m scripts.make_stubs
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.fix_stub import fix
from scripts.hollow_library import hollow_library

ROOT = Path(__file__).parent.parent
STUBS = ROOT / ".stubs"


@dataclasses.dataclass(frozen=True)
class Version:
    """One TensorRT: the folder of its stub, what pip installs, and the extension module in it."""

    name: str
    requirement: str
    extension: str


VERSIONS = (
    Version("10.13", "tensorrt-cu13-bindings==10.13.*", "tensorrt_bindings.tensorrt"),
    Version("11.4", "tensorrt-cu13-bindings==11.4.*", "tensorrt_bindings.tensorrt"),
    Version("rtx-1.7", "tensorrt-rtx-cu13-bindings==1.7.*", "tensorrt_rtx_bindings.tensorrt_rtx"),
)

# All that the bindings call by name; the rest they reach through the objects that these give.
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARY = re.compile(rb"\0(lib(?:nvinfer|nvonnxparser|tensorrt)\w*\.so\.\d+)(?=\0)")

# The package would load TensorRT's real libraries if they are installed.
INSPECT = """
import sys
sys.modules.update(tensorrt_libs=None, tensorrt_rtx_libs=None)
from pybind11_stubgen import main
main()
"""


def main() -> int:
    """Makes the stubs that are missing or made by other sources than these."""
    for version in VERSIONS:
        try:
            made = make(version)
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"{error.stdout}{error.stderr}\nno stub of TensorRT {version.name}: {error}\n")
            return 1
        except (OSError, ValueError, SyntaxError) as error:
            sys.stderr.write(f"no stub of TensorRT {version.name}: {error}\n")
            return 1
        print(f"TensorRT {version.name}: {made.relative_to(ROOT)}")
    return 0


def make(version: Version) -> Path:
    """The stub of the version, made unless it is there already.

    Raises:
        CalledProcessError: pip finds no wheel, or its module cannot be inspected; with what the program printed.
    """
    folder = STUBS / version.name
    stub, stamp, digest = folder / "tensorrt" / "__init__.pyi", folder / "made-from", digest_of(version)
    if stub.is_file() and stamp.is_file() and stamp.read_text() == digest:
        return stub
    shutil.rmtree(folder, ignore_errors=True)
    stub.parent.mkdir(parents=True)
    generated = inspect(version, unpack(version, folder / "wheel"), folder / "generated")
    stub.write_text(fix(generated))
    shutil.rmtree(folder / "wheel")
    stamp.write_text(digest)
    return stub


def digest_of(version: Version) -> str:
    """What the stub depends on, as a hash."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("fix_stub.py", "make_stubs.py")]
    return hashlib.sha256(b"".join([repr(version).encode(), sys.version.encode(), *sources])).hexdigest()


def unpack(version: Version, folder: Path) -> Path:
    """The wheel's contents in `folder`, with hollow libraries beside them."""
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--dest", str(folder), version.requirement),
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    package, module = version.extension.split(".")
    needed = LIBRARY.findall((folder / package / f"{module}.so").read_bytes())
    for soname in {name.decode() for name in needed}:
        (folder / soname).write_bytes(hollow_library(soname, FUNCTIONS))
    return folder


def inspect(version: Version, wheel: Path, out: Path) -> str:
    """What pybind11-stubgen writes about the extension module."""
    paths = {"PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(wheel)}
    run(sys.executable, "-c", INSPECT, version.extension, "--output-dir", str(out), env={**os.environ, **paths})
    return out.joinpath(*version.extension.split(".")).with_suffix(".pyi").read_text()


def run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, env=env)


if __name__ == "__main__":
    sys.exit(main())
