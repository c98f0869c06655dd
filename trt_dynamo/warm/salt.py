"""What AOTAutograd's cache does not see. In: a graph that Dynamo hands over, and all that shapes its lowering beside.
Out: a text for the cache's key, or the reason why this graph takes no part.

The key of that cache has Dynamo's graph, what the inputs are like, torch's version and settings for compilation. It has
neither our decompositions nor our settings, versions and code, nor torch's global switches. What no key could hold,
such as what a user's op does while it is traced, is a reason to take no part.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.aten_converters.registry import CONVERTERS
from trt_dynamo.settings import FIELDS, Settings
from trt_dynamo.warm.graphs import NAMESPACES

# Raise it when the meaning of an entry changes.
FORMAT = 1

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
# The modules whose functions are as old as torch, Python or this package.
KNOWN = ("torch", "builtins", "_operator", "operator", "math", "trt_dynamo")

Table = Mapping[OpOverload, Callable[..., Any]]


def why_not(module: GraphModule, inputs: Sequence[Any], settings: Settings, table: Table) -> str | None:
    """Why this graph is traced anew in each process, or None."""
    if settings.fallback == "inductor":
        return "fallback=inductor"
    if _get_current_function_mode_stack() or _get_current_dispatch_mode_stack():
        return "a mode is active that may change what is traced"
    if any(type(value) not in PLAIN for value in inputs):
        return "an input is not a plain tensor"
    if any(not is_static(node.meta.get("example_value")) for node in module.graph.find_nodes(op="placeholder")):
        return "a size varies"
    storages = [tensor.untyped_storage()._cdata for tensor in inputs if tensor.layout is torch.strided]
    if len({*storages}) != len(inputs):
        return "inputs share memory"
    if any(tensor.requires_grad for tensor in inputs) and any(map(turns_gradients_on, module.graph.nodes)):
        return "a backward pass may follow"
    if foreign := next((op for op, function in relevant(table) if not is_known(function)), None):
        return f"the decomposition of {foreign} is not torch's"
    return next((reason for node in module.graph.nodes if (reason := why_not_node(node)) is not None), None)


def relevant(table: Table) -> Iterator[tuple[OpOverload, Any]]:
    """The decompositions of the ops that a graph which takes part can come to."""
    for op, function in table.items():
        if op.namespace in NAMESPACES:
            yield op, function.func if isinstance(function, functools.partial) else function


def is_static(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(type(size) is int for size in (*value.shape, *value.stride()))


def turns_gradients_on(node: Node) -> bool:
    return node.target is torch._C._set_grad_enabled and bool(node.args[0])


def why_not_node(node: Node) -> str | None:
    """Why what the node does may be another thing in another process, or None."""
    if node.op in ("placeholder", "output", "call_method"):
        return None
    target = node.target
    if node.op != "call_function" or isinstance(target, str):
        return f"the graph has a {node.op}"
    if isinstance(target, HigherOrderOperator):
        return f"{target} has graphs of its own"
    if isinstance(target, OpOverload | OpOverloadPacket):
        name = target.namespace if isinstance(target, OpOverload) else target._qualified_op_name.split("::")[0]
        return None if name in NAMESPACES else f"{target} may have been changed by the user"
    return None if is_known(target) else f"{target} is not torch's"


def is_known(function: Any) -> bool:
    module = getattr(function, "__module__", None)
    owner = getattr(function, "__self__", None)  # a builtin's module, or torch's table of C functions
    if module is None and owner is not None:
        module = getattr(owner, "__module__", None) or getattr(owner, "__name__", None)
    if module is None:
        module = getattr(getattr(function, "__objclass__", None), "__module__", None)
    return str(module).partition(".")[0] in KNOWN


def salt_of(module: GraphModule, inputs: Sequence[Any], names: Sequence[str], settings: Settings, table: Table) -> str:
    """A text that differs wherever the lowered graph may, beyond what AOTAutograd's own key has."""
    parts = [
        ("format", FORMAT),
        ("source", source_digest()),
        ("python", sys.version_info[:3]),
        ("torch", torch.__version__),
        ("tensorrt", (tensorrt_module.flavor(), tensorrt_module.version())),
        ("settings", [(name, str(getattr(settings, name))) for name in FIELDS if not name.startswith("cache")]),
        ("decompositions", sorted((str(op), name_of(function)) for op, function in relevant(table))),
        ("converters", sorted((str(op), code_of(each.function)) for op, each in CONVERTERS.items())),
        ("aten", sorted(name for name in torch.library._impls if name.startswith(("aten/", "prims/")))),
        ("inputs", [facts_of(value) for value in inputs]),
        ("names", list(names)),
        ("static", [mark_of(node) for node in module.graph.find_nodes(op="placeholder")]),
        ("devices", sorted({device_of(value) for value in inputs})),
        ("switches", switches()),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def mark_of(node: Node) -> str:
    """How Dynamo marks an input that is the same at each call."""
    return str(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def facts_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What the cache's key may lack of a tensor."""
    size = (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
    flags = (tensor.requires_grad, tensor.is_inference(), tensor.is_conj(), tensor.is_neg(), tensor._is_view())
    return (type(tensor).__name__, str(tensor.dtype), str(tensor.device), *size, *flags)


def device_of(tensor: torch.Tensor) -> str:
    if not tensor.is_cuda:
        return tensor.device.type
    return f"{torch.cuda.get_device_name(tensor.device)} {torch.cuda.get_device_capability(tensor.device)}"


def switches() -> list[tuple[str, Any]]:
    """torch's switches that decide which ops a trace is made of, or which kernels they stand for."""
    backends, cuda = torch.backends, torch.backends.cuda
    found = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.deterministic, backends.cudnn.benchmark),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.is_available()),
        "fast path": backends.mha.get_fastpath_enabled(),
        "einsum": (backends.opt_einsum.enabled, backends.opt_einsum.strategy, backends.opt_einsum.is_available()),
        "sdp": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
    }
    return [(name, str(value)) for name, value in found.items()]


@functools.cache
def source_digest() -> str:
    """The code of this package: a graph never outlives what made it."""
    folder = Path(__file__).parent.parent
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        data = file.read_bytes()
        sha.update(f"{file.relative_to(folder)} {len(data)}:".encode() + data)
    return sha.hexdigest()


def name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', None)} {getattr(function, '__qualname__', None)}"


def code_of(function: Any) -> str:
    """Which function it is: by name where it is ours, else by its code too."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return name_of(function) if is_known(function) or code is None else f"{name_of(function)} {spelled(code)}"


def spelled(code: Any) -> str:
    """A code object, with those inside it; none of it is an address."""
    constants = [spelled(each) if hasattr(each, "co_code") else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"
