"""The examples with pretrained weights: they run offline, on engines, and answer as eager does.

They need packages of their own, so that they run by `make test-examples` alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.examples

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "pretrained"

# Each example in a process where nothing can open a connection.
OFFLINE = """\
import runpy, socket, sys

def refuse(*_):
    raise AssertionError("the example opened a connection")

socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# The argument of an example, and what it must say.
EXAMPLES = {
    "sentences": ("", ["How do I get my money back? You may return whatever you bought"]),
    "pitch": ("tiny", ["a sweep over three octaves: from 139 to 855 Hz", "silence:", "a click:", "a slow fall:"]),
    "speakers": ("", ["'high, 15 s'", "'high, 0.2 s'", "'silence'"]),
    "speech": ("", ["from the package's: 0.0e+00", "speech: -------------------------------###"]),
    "faces": ("whole", ["one face, 160 x 160: 1", "two faces, 243 x 161: 2", "no face, 90 x 120: 0"]),
    "faces, networks": ("networks", ["two faces, 243 x 161: 2", "a small one, 131 x 97: 1"]),
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split(",")[0] for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_with_pretrained_weights(name: str, tmp_path: Path) -> None:
    argument, said = EXAMPLES[name]
    script = FOLDER / f"{name.split(',')[0]}.py"
    environment = {
        **os.environ,
        "TRT_DYNAMO_RUNTIME": "reference",
        "TRT_DYNAMO_REBUILD": "sync",  # a size beyond the first range waits for its engine
        "TRT_DYNAMO_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", OFFLINE, str(script), *argument.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Please report this" not in done.stderr
    for words in said:
        assert words in done.stdout
    (difference,) = re.findall(r"largest difference from eager: (\S+)", done.stdout)
    assert float(difference) < 1e-4
    counts = {key: int(value) for key, value in re.findall(r"^(\w+): (\d+)$", done.stdout, re.MULTILINE)}
    assert counts["engine_calls"] > 0
    assert counts["eager_calls"] == 0
