"""The direction of the package: which of its parts may import which, and what every module is held to."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trt_dynamo"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "settings", "log", "trt", "tracing"}

# What each part may import besides itself; a part is a module or folder of the package, or a module named in full.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "setting_values": set(),
    "settings": {"errors", "setting_values"},
    "trt": {"errors", "settings"},
    "log": {"trt"},
    "processes": {"shutdown"},
    "tracing": set(),
    "reports": {"processes", "tracing"},
    "host_scalars": set(),
    # engines that are stored and not loaded
    "unloaded": set(),
    "as_if_on_cuda": {"errors"},
    "model_spec": {"errors", "setting_values"},
    "module_paths": set(),
    "explanation_page": set(),
    "registration": {"settings"},
    # ops of ours that lowering puts into a graph and converters know
    "operators": set(),
    "profiles": BASE,
    # what is known of sizes before a graph is made
    "recorded_shapes": BASE | {"profiles"},
    "known_ranges": BASE | {"profiles", "recorded_shapes"},
    "shutdown": set(),
    "progress": BASE | {"shutdown"},
    "graph_breaks": {"reports", "settings"},
    # threads of a moment
    "side_threads": set(),
    "cuda_driver": {"errors"},
    "fingerprints": {"cuda_driver", "errors", "side_threads"},
    "weights": BASE | {"fingerprints"},
    "fallback": BASE | {"aten_converters", "graph_breaks", "partition", "profiles", "reports", "runtime"},
    "training": BASE | {"fallback"},
    "wrappers": set(),
    "stated_types": set(),
    "triton_repository": set(),
    "aten_converters": BASE | {"profiles", "operators"},
    "lowering": BASE | {"profiles", "operators", "host_scalars", "warm"},
    "lowering.decompositions": BASE | {"profiles", "operators", "aten_converters"},
    "lowering.rewriting": BASE | {"aten_converters"},
    "lowering.recording": BASE | {"profiles", "aten_converters"},
    # which converters there are decides what is taken apart
    "warm": BASE | {"aten_converters"},
    # a node's verdict is its converter's own dry run
    "partition": BASE | {"profiles", "aten_converters", "host_scalars"},
    # a node that is to compute in a half type is judged by its converter too; what was recorded lies in the cache
    "precision": BASE | {"aten_converters", "module_paths", "partition", "cache", "processes", "reports"},
    # before a model is compiled: torch's and torchao's own tools
    "quantization": {"errors"},
    # before a model is compiled, and for explain
    "sparsity": {"aten_converters"},
    "tf32": set(),
    # what makes an engine this one
    "identity": BASE | {"aten_converters", "cache", "origins", "partition", "precision", "profiles", "weights"},
    # from there to an engine
    "engine_making": BASE
    | {"aten_converters", "build", "cache", "identity", "profiles", "reference", "reports", "runtime", "unloaded"},
    # the content of weights, read for a set and a key that are made later
    "early_look": {"cache", "errors", "fingerprints", "runtime", "settings", "side_threads", "weights"},
    # why the cache lacks an engine
    "origins": {"cache", "settings"},
    "cache": BASE | {"profiles", "side_threads"},
    # it takes a ConvertedNetwork
    "build": BASE | {"processes", "profiles", "progress", "shutdown", "aten_converters"},
    # what an export takes for granted of its inputs
    "exported_inputs": {"aten_converters", "profiles"},
    "hot_ranges": BASE | {"profiles"},
    # it makes engines of parts of a segment, when one of it is wrong
    "bisection": BASE | {"aten_converters", "module_paths", "partition", "precision", "profiles", "runtime"},
    "runtime": BASE
    | {"cuda_driver", "processes", "hot_ranges", "profiles", "reports", "weights", "fingerprints", "shutdown"},
    # it judges the converters, so it must not know them
    "reference": {"errors", "trt", "log"},
    # the package's front door
    "__init__": {
        "errors",
        "settings",
        "aten_converters",
        "backend",
        "cache",
        "calibration",
        "engine_file",
        "explanation",
        "exported",
        "model_file",
        "program_with_engines",
        "quantization",
        "recorded_shapes",
        "registration",
        "reports",
        "sparsity",
        "weights",
    },
}

# These put the stages together, and nothing but one another may import them.
COMPOSE = {
    "ahead_of_time", "backend", "benchmarking", "build_jobs", "calibration", "carried_runner", "carried_segment", "cli",
    "debugging", "demo", "engine_file", "engine_op", "explained", "explanation", "explanation_tables", "exported",
    "layer_profile", "__main__", "model_file", "program_with_engines", "ray_builds", "selftest", "testing",
    "watched_runs",
}  # fmt: skip


def name_of(file: Path) -> str:
    """`trt_dynamo/cache/key.py` is `cache.key`, `trt_dynamo/cache/__init__.py` is `cache`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(file) for file in FILES}


def imports(source: str) -> Iterator[str]:
    """The full name of each module that the source imports, wherever it does so; `from a import b` gives `a.b` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def parts_imported(source: str) -> set[str]:
    """The parts of the package that the source imports."""
    inner = [name.removeprefix("trt_dynamo.") for name in imports(source) if name.startswith("trt_dynamo.")]
    return {name.split(".")[0] for name in inner if name in MODULES or name.rpartition(".")[0] in MODULES}


def violations(name: str, source: str) -> set[str]:
    """The parts that the module `name` imports and must not."""
    part = name.split(".")[0]
    found = parts_imported(source) - {part}
    if part in COMPOSE:
        return set()
    return found - ALLOWED.get(name, ALLOWED.get(part, set()))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_what_its_layer_may(file: Path) -> None:
    assert violations(name_of(file), file.read_text()) == set()


def test_every_part_is_on_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    stages = {"aten_converters", "cache", "lowering", "partition", "precision", "reference", "runtime", "warm"}
    rows = re.search(r"## Where things are\n.*?\n(\|.*?)\n\n", text, re.DOTALL)
    assert rows is not None
    named = re.findall(r"`(\w+)`", "".join(line.rpartition("|")[0].rpartition("|")[2] for line in rows[1].splitlines()))
    parts = {name.split(".")[0] for name in MODULES} - stages
    assert sorted(named) == sorted(parts), "say in docs/architecture.md what the new part is for"
    assert all(f"`{stage}" in text for stage in stages)


def test_every_part_has_its_place() -> None:
    parts = {name.split(".")[0] for name in MODULES}
    assert parts - COMPOSE - set(ALLOWED) == set(), "say in ALLOWED what the new part may import"


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("reference.views", "from trt_dynamo.aten_converters.network import Network", {"aten_converters"}),
        ("reference.views", "def f():\n    import trt_dynamo.settings", {"settings"}),
        ("partition", "from trt_dynamo import lowering", {"lowering"}),
        ("partition.support", "from trt_dynamo.aten_converters import convert", set()),
        ("lowering.passes", "from trt_dynamo.aten_converters import convert", {"aten_converters"}),
        ("lowering.decompositions", "from trt_dynamo.aten_converters.registry import CONVERTERS", set()),
        ("cache.key", "import trt_dynamo.runtime.engine as engine", {"runtime"}),
        ("runtime", "if TYPE_CHECKING:\n    from trt_dynamo.build import build", {"build"}),
        ("settings", "from trt_dynamo import trt", {"trt"}),
        ("build", 'importlib.import_module("trt_dynamo.backend")', {"backend"}),
        ("backend", "from trt_dynamo import cache, runtime, lowering", set()),
    ],
)
def test_the_rule_sees_what_breaks_it(name: str, source: str, wrong: set[str]) -> None:
    assert violations(name, source) == wrong


def test_no_part_imports_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        part = name_of(file).split(".")[0]
        if part not in COMPOSE:
            graph.setdefault(part, set()).update(parts_imported(file.read_text()) - {part, "__init__", *COMPOSE})
    order: list[str] = []
    while ready := [part for part, needs in graph.items() if part not in order and needs <= set(order)]:
        order += ready
    assert set(graph) == set(order), f"a circle among {sorted(set(graph) - set(order))}"


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file) != "trt"], ids=name_of)
def test_only_one_module_imports_tensorrt(file: Path) -> None:
    assert [name for name in imports(file.read_text()) if name.split(".")[0].startswith("tensorrt")] == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_is_named_for_what_it_does(file: Path) -> None:
    vague = {"utils", "util", "helpers", "helper", "manager", "base", "impl", "common", "misc"}
    assert not vague & set(name_of(file).split("."))
    assert file.stem in ("__init__", "__main__") or not file.stem.startswith("_")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text())), "its first statement must be a docstring"


SIDE_EFFECTS = """
import importlib, logging, os, sys, threading, warnings
import torch, torch._dynamo, torch._inductor.config
import torch._functorch.config
from torch._dynamo.backends import registry

def state():
    configs = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
    return {
        "configuration": [config.get_hash() for config in configs],
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "handlers": list(logging.getLogger().handlers),
        "threads": threading.active_count(),
        "backends": sorted(name for name, fn in registry._COMPILER_FNS.items() if fn is not None),
        "working folder": os.getcwd(),
        "path": list(sys.path),
    }

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
print([key for key in before if before[key] != after[key]])
print([name for name in ("tensorrt", "tensorrt_rtx", "transformers", "onnx") if name in sys.modules])
"""


def test_importing_the_package_changes_nothing_and_loads_no_tensorrt() -> None:
    names = [f"trt_dynamo.{name}" for name in sorted(MODULES) if name not in ("__init__", "__main__")]
    done = subprocess.run([sys.executable, "-c", SIDE_EFFECTS, *names], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr
    assert done.stderr == ""
