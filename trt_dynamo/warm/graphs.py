"""A lowered graph as plain data. In: a graph of static shapes. Out: JSON; and from JSON an equal graph of fake tensors.

Equal for all that comes after lowering: nodes, names and arguments, the values' types, strides and shared memory, the
user's lines and modules, constants. No object of Python's is in it, so reading it runs nothing.
"""

from __future__ import annotations

import base64
import json
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node

from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER, STAYS_FLOAT32

# Other ops are made of what a user may have changed since.
NAMESPACES = ("aten", "prims", "trt_dynamo")
FUNCTIONS = {"getitem": operator.getitem}
# What the later stages read of a node beside its value.
TEXTS = ("stack_trace", STAYS_EAGER, STAYS_FLOAT32)
STACK = "nn_module_stack"
# Bytes of the constants in a graph: more of them belong into parameters.
MOST_CONSTANTS = 2**20

ENUMS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


class NotPlain(Exception):
    """A graph that cannot be written so; the text is the reason."""


def written(module: GraphModule) -> bytes:
    """
    Raises:
        NotPlain: a size is symbolic, or something in the graph is more than plain data.
    """
    writer = Writer(module)
    nodes = [writer.node(node) for node in module.graph.nodes]
    body = {"nodes": nodes, "constants": writer.constants, "storages": writer.storages, "texts": list(writer.texts)}
    return json.dumps(body, separators=(",", ":")).encode()


class Writer:
    """Numbers nodes, storages and texts in the order of first use."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.nodes: dict[Node, int] = {}
        self.storage_numbers: dict[int, int] = {}
        self.storages: list[tuple[int, str]] = []
        self.texts: dict[str, int] = {}
        self.constants: dict[str, dict[str, Any]] = {}

    def node(self, node: Node) -> list[Any]:
        if node.op == "get_attr":
            self.constant(str(node.target))
        elif node.op not in ("placeholder", "call_function", "output"):
            raise NotPlain(f"the graph has a {node.op}")
        target = str(node.target) if node.op != "call_function" else name_of(node.target)
        meta: dict[str, Any] = {key: self.text(str(node.meta[key])) for key in TEXTS if node.meta.get(key)}
        if node.meta.get(STACK):
            meta[STACK] = [[self.text(str(part)) for part in (key, *pair)] for key, pair in stack_of(node).items()]
        if "val" in node.meta:
            meta["val"] = self.like(node.meta["val"])
        found = [node.op, node.name, target, self.value(node.args), self.value(dict(node.kwargs)), meta]
        self.nodes[node] = len(self.nodes)
        return found

    def text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def constant(self, name: str) -> None:
        tensor: Any = getattr(self.module, name, None)
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not is_plain(tensor):
            raise NotPlain(f"the graph has a constant of type {type(tensor).__name__}")
        with unset_fake_temporarily(), torch.no_grad():
            dense = tensor.detach().cpu().contiguous()
            data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        if tensor.stride() != dense.stride() or len(data) > MOST_CONSTANTS:
            raise NotPlain("the graph has a large or strided constant")
        self.constants[name] = {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "device": str(tensor.device),
            "data": base64.b64encode(data).decode(),
        }

    def value(self, value: Any) -> Any:
        """An argument: numbers, texts and None as they are, all else as a list that begins with its kind."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return ["float", value.hex()]
        if isinstance(value, Node):
            return ["node", self.nodes[value]]
        if kind in ENUMS:
            return [ENUMS[kind], str(value)]
        if kind is torch.device:
            return ["device", str(value)]
        if isinstance(value, slice):
            return ["slice", *map(self.value, (value.start, value.stop, value.step))]
        if isinstance(value, list):
            return ["list", *map(self.value, value)]
        if isinstance(value, tuple):
            return ["tuple", *map(self.value, value)]
        if isinstance(value, Mapping):
            return ["dict", *([self.value(key), self.value(each)] for key, each in value.items())]
        raise NotPlain(f"the graph has an argument of type {kind.__name__}")

    def like(self, value: Any) -> Any:
        """The value of a node, without content."""
        if isinstance(value, list | tuple):
            return ["tuple" if isinstance(value, tuple) else "list", *map(self.like, value)]
        if not isinstance(value, torch.Tensor):
            return self.value(value)
        if type(value) is not FakeTensor or not is_plain(value):
            raise NotPlain(f"a value is a {type(value).__name__} of layout {value.layout}")
        sizes = [*value.shape, *value.stride(), value.storage_offset(), value.untyped_storage().nbytes()]
        if not all(type(size) is int for size in sizes):
            raise NotPlain("a size is symbolic")
        storage = value.untyped_storage()
        number = self.storage_numbers.setdefault(storage._cdata, len(self.storage_numbers))
        if number == len(self.storages):
            self.storages.append((storage.nbytes(), str(value.device)))
        place = [number, value.storage_offset(), list(value.shape), list(value.stride())]
        return ["tensor", str(value.dtype), str(value.device), *place]


def is_plain(tensor: torch.Tensor) -> bool:
    special = tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.layout is not torch.strided
    return not special


def stack_of(node: Node) -> dict[str, tuple[str, str]]:
    """The modules around a node: their paths, and the names of their classes."""
    return {
        key: (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for key, (path, kind) in node.meta[STACK].items()
    }


def name_of(target: Any) -> str:
    """
    Raises:
        NotPlain: not an op that torch or we ourselves have defined.
    """
    if isinstance(target, OpOverload) and target.namespace in NAMESPACES:
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    for name, function in FUNCTIONS.items():
        if target is function:
            return name
    raise NotPlain(f"the graph calls {target}")


def read(data: bytes, mode: FakeTensorMode) -> GraphModule:
    """The graph that was written, with values of this mode."""
    body = json.loads(data)
    reader = Reader(body, mode)
    for line in body["nodes"]:
        reader.node(*line)
    constants = {name: constant_of(**each) for name, each in body["constants"].items()}
    return GraphModule(constants, reader.graph)


class Reader:
    def __init__(self, body: dict[str, Any], mode: FakeTensorMode) -> None:
        self.mode = mode
        self.graph = Graph()
        self.nodes: list[Node] = []
        self.texts: list[str] = body["texts"]
        self.storages = [torch.UntypedStorage(size, device="meta") for size, _ in body["storages"]]

    def node(self, op: str, name: str, target: str, args: Any, kwargs: Any, meta: dict[str, Any]) -> None:
        called = target_of(target) if op == "call_function" else target
        node = self.graph.create_node(op, called, self.value(args), self.value(kwargs), name)
        for key, value in meta.items():
            if key == "val":
                node.meta[key] = self.like(value)
            elif key == STACK:
                texts = [[self.texts[part] for part in entry] for entry in value]
                node.meta[key] = {entry: (path, kind) for entry, path, kind in texts}
            else:
                node.meta[key] = self.texts[value]
        self.nodes.append(node)

    def value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        match kind:
            case "float":
                return float.fromhex(rest[0])
            case "node":
                return self.nodes[rest[0]]
            case "device":
                return torch.device(rest[0])
            case "slice":
                return slice(*map(self.value, rest))
            case "list":
                return [*map(self.value, rest)]
            case "tuple":
                return tuple(map(self.value, rest))
            case "dict":
                return {self.value(key): self.value(each) for key, each in rest}
        return torch_constant(rest[0])

    def like(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind in ("list", "tuple"):
            found = [*map(self.like, rest)]
            return tuple(found) if kind == "tuple" else found
        if kind != "tensor":
            return self.value(value)
        dtype, device, storage, offset, shape, strides = rest
        with unset_fake_temporarily(), torch.no_grad():
            bare = torch.empty(0, dtype=torch_constant(dtype), device="meta")
            bare.set_(self.storages[storage], offset, shape, strides)
        return FakeTensor(self.mode, bare, torch.device(device))


def target_of(name: str) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, op = name.split("::")
    op, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")


def torch_constant(name: str) -> Any:
    """`torch.float32` and its like."""
    return getattr(torch, name.removeprefix("torch."))


def constant_of(dtype: str, shape: list[int], device: str, data: str) -> torch.Tensor:
    with unset_fake_temporarily(), torch.no_grad():
        raw = bytearray(base64.b64decode(data))
        if not raw:
            return torch.empty(shape, dtype=torch_constant(dtype), device=device)
        return torch.frombuffer(raw, dtype=torch.uint8).view(torch_constant(dtype)).reshape(shape).to(device)
