"""What makes an engine this engine and no other. In: a segment's graph and all that shapes its engine. Out: a SHA-256.

Everything is encoded as nested, tagged, length-prefixed bytes, so that two different things are never spelled alike:
1, 1.0, True, "1" and the symbol s1 differ, and so do ((a, b), c) and (a, (b, c)). Nothing that changes between two
processes takes part: names of nodes and symbols, source lines, object ids, hash seeds, the integers behind enums, and
the number of the GPU (each rank of a distributed job compiles for its own and shares the cache).
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import sympy  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from trt_dynamo.cache import entry
from trt_dynamo.errors import Unsupported
from trt_dynamo.settings import Settings
from trt_dynamo.side_threads import shared

# Raise it when the encoding changes its meaning.
FORMAT = 2

# In these the order of the arguments says nothing; sympy sorts them by the symbols' names.
COMMUTATIVE = {"Add", "Mul", "Max", "Min", "And", "Or", "Equality", "Unequality"}


class Range(Protocol):
    """The sizes an engine takes: `trt_dynamo.profiles.Range`."""

    @property
    def min(self) -> int: ...
    @property
    def opt(self) -> int: ...
    @property
    def max(self) -> int: ...


def segment_key(
    graph: fx.GraphModule,
    *,
    ranges: Mapping[sympy.Symbol, Range],
    hot: Sequence[Mapping[sympy.Symbol, Range]] = (),
    weights: Mapping[str, str],
    settings: Settings,
    platform: Mapping[str, str],
    converters: str,
) -> str:
    """The key of the engine for a segment, 64 hexadecimal digits; equal in every process.

    Two graphs that differ in names alone have one key: what is stored with the plan must tell inputs, outputs and
    weights by position.

    Args:
        graph: the segment; placeholders bear `meta["val"]` (a fake tensor, a SymInt or an int).
        ranges: the sizes the engine is built for, by symbol. Symbols that the segment does not use take no part.
        hot: narrower ranges that get profiles of their own.
        weights: the content (`digest`) of each placeholder that is baked in, by the placeholder's name.
        settings: those that change engines take part.
        platform: TensorRT's flavor and version, the GPU or the targets, and whatever else of the machine counts.
        converters: the version of our converters.

    Raises:
        Unsupported: an argument, target or constant has no content that a key could hold.
    """
    encoder = Encoder(weights)
    body = encoder.graph(graph)
    # After the body, which numbers the symbols.
    sizes = [
        [None if each is None else (each.min, each.opt, each.max) for each in map(spans.get, encoder.symbols)]
        for spans in (ranges, *hot)
    ]
    whole = frame(
        "segment",
        encoder.value((FORMAT, entry.FORMAT)),
        body,
        encoder.value(sizes),
        encoder.value(dict(encoder.weights)),
        encoder.value(settings.engine_fields()),
        encoder.value(dict(platform)),
        encoder.value(converters),
    )
    return hashlib.sha256(whole).hexdigest()


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and elements in order, whatever its strides and device.

    A contiguous CPU tensor is hashed where it lies, and without marking a copy-on-write tensor as written. Works while
    fake tensors are traced.

    Raises:
        Unsupported: a fake, meta, sparse, quantized, wrapper or emptied tensor, whose bytes are not to be had.
    """
    if isinstance(tensor, FakeTensor) or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        raise Unsupported(f"a {type(tensor).__name__} on {tensor.device} has no bytes to make a cache key of")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unsupported(f"a tensor of layout {tensor.layout} and type {tensor.dtype} cannot be part of a cache key")
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise Unsupported("a tensor whose memory was given back (sharded, offloaded) cannot be part of a cache key")
    with _disable_current_modes(), torch.no_grad():
        host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        sha = hashlib.sha256(frame("tensor", text(str(host.dtype)), text(str(tuple(host.shape)))))
        if host.numel():
            # `data_ptr` would make a copy of a tensor that is copy-on-write; this is the address for reading.
            start = torch._C._data_address(host)  # type: ignore[attr-defined]
            address = start + host.storage_offset() * host.element_size()
            sha.update((ctypes.c_char * host.nbytes).from_address(address))
    return sha.hexdigest()


def digests(tensors: Sequence[torch.Tensor]) -> list[str]:
    """`digest` of each. Those on the CPU are hashed by several threads at once.

    Raises:
        Unsupported: as `digest`.
    """
    here = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    found = iter(shared(digest, here, [tensor.nbytes for tensor in here]))
    # Copies from elsewhere stay in the caller's stream.
    return [next(found) if tensor.device.type == "cpu" else digest(tensor) for tensor in tensors]


def frame(tag: str, *parts: bytes) -> bytes:
    """Tagged and length-prefixed, so that frames in a row can be told apart. `tag` is a word."""
    body = b"".join(parts)
    return f"{tag} {len(body)}:".encode() + body


def text(value: str) -> bytes:
    return frame("str", value.encode("utf-8", "surrogatepass"))


class Encoder:
    """Encodes one segment; numbers nodes, symbols and devices in order of first use."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.weights = dict(weights)
        self.nodes: dict[fx.Node, int] = {}
        self.symbols: dict[sympy.Symbol, int] = {}
        self.devices: dict[torch.device, int] = {}
        self.expressions: dict[sympy.Basic, bytes] = {}
        self.targets: dict[Any, bytes] = {}

    def graph(self, module: fx.GraphModule) -> bytes:
        return frame("graph", *(self.node(module, node) for node in module.graph.nodes))

    def node(self, module: fx.GraphModule, node: fx.Node) -> bytes:
        if node.op in ("get_attr", "call_module"):
            what = self.value(attribute(module, str(node.target)))
        elif node.op == "placeholder":
            # Once: a placeholder of a nested graph may bear the same name.
            what = self.value(self.weights.pop(node.name, None))
        elif node.op == "output":
            what = b""
        else:
            what = self.target(node.target)
        arguments = self.value(node.args) + self.value(node.kwargs)
        result = frame("node", text(node.op), what, arguments, self.meta(results_used(node)))
        self.nodes[node] = len(self.nodes)
        return result

    def target(self, target: Any) -> bytes:
        known = self.targets.get(target)
        if known is None:
            known = self.targets[target] = text(describe(target))
        return known

    def meta(self, value: Any) -> bytes:
        """What a node's value is like, without its content."""
        if isinstance(value, torch.Tensor):
            strided = value.layout == torch.strided
            strides = tuple(value.stride()) if strided else None
            return frame(
                "like",
                self.value(value.dtype),
                self.value(tuple(value.shape)),
                self.value(strides),
                self.value(value.device),
                self.value(value.layout),
            )
        if isinstance(value, list | tuple):
            return frame("likes", *map(self.meta, value))
        return self.value(value)

    def value(self, value: Any) -> bytes:
        """Any argument. The order of the cases matters: a bool is an int, and so are some enums."""
        match value:
            case None:
                return frame("none")
            case enum.Enum():
                return frame("enum", text(type(value).__qualname__), text(value.name))
            case bool() | int() | complex():
                return frame(type(value).__name__, repr(value).encode())
            case float():
                return frame("float", value.hex().encode())
            case str():
                return text(value)
            case bytes():
                return frame("bytes", value)
            case fx.Node():
                return frame("edge", str(self.nodes[value]).encode())
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return self.symbolic(value)
            case sympy.Basic():
                return self.expression(value)
            case torch.Tensor():
                return frame("constant", text(digest(value)))
            case fx.GraphModule():
                return self.graph(value)
            case list():
                return frame("list", *map(self.value, value))
            case tuple():
                return frame("tuple", *map(self.value, value))
            case slice():
                return frame("slice", *map(self.value, (value.start, value.stop, value.step)))
            case Mapping():
                return frame("dict", *sorted(frame("item", self.value(k), self.value(v)) for k, v in value.items()))
            case torch.device():
                return self.device(value)
            case types.EllipsisType() | torch.dtype() | torch.layout() | torch.memory_format():
                return frame("torch", str(value).encode())
        return frame("target", text(describe(value)))

    def device(self, device: torch.device) -> bytes:
        """The kind of device, and which of those in this graph (not in this machine), or the current one."""
        number = "current" if device.index is None else self.devices.setdefault(device, len(self.devices))
        return frame("device", text(device.type), str(number).encode())

    def symbolic(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> bytes:
        expression = getattr(value.node, "expr", None)
        if expression is None:
            raise Unsupported(f"a symbolic value without an expression ({value}) cannot be part of a cache key")
        return self.expression(expression)

    def expression(self, expression: sympy.Basic) -> bytes:
        """A sympy expression with its symbols numbered by first use. A number is encoded like Python's."""
        known = self.expressions.get(expression)
        if known is not None:
            return known
        if isinstance(expression, sympy.Integer):
            return self.value(int(expression))
        new = expression.free_symbols - self.symbols.keys()
        # Two that come at once are told apart by their places, and by their names only where the places are alike.
        for symbol in sorted(new, key=lambda each: (tree(expression, self.placed(each)), str(each))):
            self.symbols[symbol] = len(self.symbols)
        self.expressions[expression] = frame("symbolic", tree(expression, lambda each: str(self.symbols[each])))
        return self.expressions[expression]

    def placed(self, mine: sympy.Basic) -> Callable[[sympy.Basic], str]:
        """Names for the symbols of an expression, seen from one that has no number yet."""
        return lambda each: "this" if each == mine else str(self.symbols.get(each, "other"))


def tree(expression: sympy.Basic, name: Callable[[Any], str]) -> bytes:
    """An expression as bytes that do not depend on the order in which sympy keeps commuting arguments."""
    if isinstance(expression, sympy.Symbol):
        return frame("symbol", text(name(expression)))
    kind = type(expression).__name__
    if not expression.args:
        return frame("atom", text(kind), text(sympy.srepr(expression)))
    arguments = [tree(each, name) for each in expression.args]
    return frame("apply", text(kind), *(sorted(arguments) if kind in COMMUTATIVE else arguments))


def results_used(node: fx.Node) -> Any:
    """What a node's value is like; None in the place of each of several results that nobody uses, of which kernels of
    different devices give different ones.
    """
    value = node.meta.get("val")
    if not isinstance(value, list | tuple) or any(user.target is not operator.getitem for user in node.users):
        return value
    used = [place for user in node.users for place in user.args[1:2]]
    return [each if place in used else None for place, each in enumerate(value)]


def attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def describe(target: Any) -> str:
    """A callable by name; an ATen overload by its whole schema, since what is left out means the schema's default."""
    match target:
        case OpOverload():
            return f"{target} {target._schema}"
        case HigherOrderOperator():
            return f"higher order {target}"
        case OpOverloadPacket() | str():
            return f"{type(target).__name__} {target}"
    name, owner = getattr(target, "__qualname__", None), getattr(target, "__self__", None)
    # A method bound to an object, a lambda and an inner function hold more than their names say.
    bound = not (owner is None or isinstance(owner, types.ModuleType | type))
    if not callable(target) or bound or name is None or "<" in name:
        raise Unsupported(f"a {type(target).__name__} cannot be part of a cache key")
    return f"function {getattr(target, '__module__', None)} {getattr(owner, '__qualname__', None)} {name}"
