"""A verdict per node: can TensorRT take it, and if not, why. The judge is the node's own converter, run dry."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import mmap
import operator
from collections.abc import Collection, Mapping, Sequence

import sympy
import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from trt_dynamo import log as tensorrt_log
from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.walker import Walker, getattr_path, source_line
from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.host_scalars import host_scalars
from trt_dynamo.partition.sizes import is_float
from trt_dynamo.profiles import dim_of, symbols_of
from trt_dynamo.trt import trt

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a node can be converted. `reason` says why not; `source` is the user's line."""

    node: str
    target: str
    ok: bool
    reason: str = ""
    source: str = ""

    def __str__(self) -> str:
        line = f"{self.node} ({self.target}): {'TensorRT' if self.ok else self.reason}"
        return f"{line}  [{self.source}]" if self.source else line


class DryRun(Walker):
    """Runs converters in a scratch network that is never built. A refused layer spoils its network, so the next node
    gets a fresh one, in which the values it needs come in as inputs."""

    def __init__(self, module: GraphModule, weights: Collection[Node]) -> None:
        super().__init__(Network())
        self.module = module
        self.weights = weights
        self.pages: mmap.mmap | bytes = b""
        self.symbols: dict[Node, list[sympy.Symbol]] = {}  # in the value of each node so far
        self.known: set[sympy.Symbol] = set()  # all of these

    def place(self, node: Node) -> Tensor | tuple[Tensor | None, ...]:
        if node.op == "get_attr":
            return self.net.constant(getattr_path(self.module, str(node.target)))
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return tuple(
                self.input(f"{node.name}_{i}", v) if isinstance(v, torch.Tensor) else None for i, v in enumerate(value)
            )
        if node in self.weights:
            return dataclasses.replace(self.net.constant(self.zeros(value), name=node.name), value=None)
        return self.input(node.name, value)

    def input(self, name: str, value: torch.Tensor) -> Tensor:
        return self.net.input(name, value.dtype, [dim_of(d) for d in value.shape])

    def zeros(self, value: torch.Tensor) -> torch.Tensor:
        """Stands for a weight of this shape: pages of zeros that nobody touches cost neither memory nor time."""
        shape = tuple(int(d) for d in value.shape)
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=value.dtype)
        if len(self.pages) < count * value.itemsize:
            self.pages = mmap.mmap(-1, count * value.itemsize)
        return torch.frombuffer(self.pages, dtype=value.dtype, count=count).view(shape)

    def verdict(self, node: Node, *, strict: bool) -> Verdict:
        """The verdict on one `call_function` node. With `strict`, a converter's bug is raised instead."""
        reason = ""
        try:
            self.declare_sizes(node)
            self.run(node)
        except Unsupported as error:
            reason = str(error)
        except ConversionError as error:
            if strict:
                raise
            log.warning("%s; the node stays in eager. Please report this.", error)
            reason = f"a bug in its converter: {error}"
        if reason:
            self.net, self.values = Network(), {}
        return Verdict(node.name, str(node.target), not reason, reason, source_line(node))

    def note(self, node: Node) -> None:
        """Remembers the symbols in the node's value, for the nodes to come."""
        self.symbols[node] = node_symbols(node)
        self.known.update(self.symbols[node])

    def declare_sizes(self, node: Node) -> None:
        """A size that no tensor tells comes in as a host shape tensor; in the dry run all of them may, and what only a
        tensor tells that a fresh network has not seen.
        """
        net = self.net
        own = node_symbols(node)
        for symbol in {
            s: None for symbols in (own, *map(self.symbols.get, node.all_input_nodes)) for s in symbols or ()
        }:
            if symbol in self.known:
                net.sizes.declare_value(symbol, functools.partial(size_input, net, f"value_of_{symbol}"))
        for argument in node.all_input_nodes:
            value = argument.meta.get("val")
            if isinstance(value, torch.SymInt):
                net.sizes.declare_value(dim_of(value), functools.partial(size_input, net, argument.name))
            if isinstance(value, torch.SymFloat) and is_float(argument):
                for symbol in value.node.expr.free_symbols:
                    net.sizes.declare_value(symbol, functools.partial(size_input, net, f"value_of_{symbol}"))


def node_symbols(node: Node) -> list[sympy.Symbol]:
    """The symbols in the value of a node."""
    return symbols_of(pytree.tree_leaves(node.meta.get("val")))


def size_input(net: Network, name: str) -> trt.ITensor:
    return net.reshape(net.input(name, torch.int64, ()), (1,)).raw


def judge(
    module: GraphModule, weights: Collection[Node], *, eager_ops: Sequence[str] = (), strict: bool = False
) -> dict[Node, Verdict]:
    """The verdicts on all `call_function` nodes whose results are tensors, in order. Nothing is built."""
    verdicts: dict[Node, Verdict] = {}
    device = main_device(module)
    with tensorrt_log.collected():
        dry_run = DryRun(module, weights)
        away = made_elsewhere(module, device)
        scalars = host_scalars(module.graph, weights)
        for node in module.graph.nodes:
            if node.op != "call_function" or not makes_tensors(node) or node in scalars:
                dry_run.note(node)
                continue
            if chosen_eager(node, eager_ops):
                verdicts[node] = Verdict(node.name, str(node.target), False, "the setting eager_ops", source_line(node))
            elif STAYS_EAGER in node.meta:
                reason = node.meta[STAYS_EAGER]
                verdicts[node] = Verdict(node.name, str(node.target), False, reason, source_line(node))
            elif node in away:
                reason = f"its result is on {away[node]}, the engines' are on {device}"
                verdicts[node] = Verdict(node.name, str(node.target), False, reason, source_line(node))
            else:
                verdicts[node] = dry_run.verdict(node, strict=strict)
            dry_run.note(node)
    return verdicts


def refuse(verdicts: dict[Node, Verdict], reasons: Mapping[Node, str]) -> None:
    """Leaves to eager those of the nodes that were TensorRT's."""
    for node, reason in reasons.items():
        if node in verdicts and verdicts[node].ok:
            verdicts[node] = dataclasses.replace(verdicts[node], ok=False, reason=reason)


def keep_tuples_whole(verdicts: dict[Node, Verdict]) -> None:
    """An op with several results and the `getitem`s that take them apart run on the same side."""
    for node, verdict in list(verdicts.items()):
        if node.target is operator.getitem:
            (parent,) = node.all_input_nodes
            above = verdicts.get(parent)
            if above is not None and above.ok != verdict.ok:
                verdicts[node] = dataclasses.replace(verdict, ok=above.ok, reason=above.reason)
    for node, verdict in verdicts.items():
        value = node.meta["val"]
        whole = isinstance(value, torch.Tensor)
        if not whole and verdict.ok and any(user.target is not operator.getitem for user in node.users):
            verdicts[node] = dataclasses.replace(verdict, ok=False, reason="its results leave the graph as a tuple")


def main_device(module: GraphModule) -> torch.device:
    """The device that the engines of a graph work on: the first CUDA device among its inputs, else the CPU."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    return next((v.device for v in values if isinstance(v, torch.Tensor) and v.is_cuda), torch.device("cpu"))


def made_elsewhere(module: GraphModule, device: torch.device) -> dict[Node, torch.device]:
    """The nodes with a result on another device. A tensor of rank 0 on the CPU is as good as a number for all who read
    it on the device, and so may be made there.
    """
    found: dict[Node, torch.device] = {}
    numbers: set[Node] = set()
    for node in reversed(module.graph.nodes):
        others = [value for value in tensors_of(node) if value.device != device]
        if not others or node.op != "call_function":
            continue
        plain = all(v.ndim == 0 and v.device.type == "cpu" for v in others)
        if plain and node.users and all(user in numbers or is_on(user, device) for user in node.users):
            numbers.add(node)
        else:
            found[node] = others[0].device
    return found


def is_on(node: Node, device: torch.device) -> bool:
    """Whether the node makes tensors, all of them on the device."""
    values = tensors_of(node)
    return node.op == "call_function" and bool(values) and all(v.device == device for v in values)


def makes_tensors(node: Node) -> bool:
    """Whether the node's value is a tensor, or a tuple with tensors in it; sizes are computed by Python, for free."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value)
    )


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors in the node's value."""
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]


def chosen_eager(node: Node, eager_ops: Sequence[str]) -> bool:
    name = str(node.target)
    return any(name == op or name.startswith(f"{op}.") for op in eager_ops)
