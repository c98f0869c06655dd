"""The walk over a graph: arguments are looked up and bound, the converter runs, its result is checked against FX."""

from __future__ import annotations

import abc
import functools
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from trt_dynamo.aten_converters.left_to_eager import why_none
from trt_dynamo.aten_converters.network import CARRIED, MAX_RANK, Network, Tensor
from trt_dynamo.aten_converters.registry import Converter, lookup
from trt_dynamo.aten_converters.size_floats import size_float
from trt_dynamo.errors import ConversionError, TrtDynamoError, Unsupported
from trt_dynamo.profiles import dim_of
from trt_dynamo.trt import TYPES


class Walker(abc.ABC):
    """Converts the nodes of a graph one by one into a `Network`."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.values: dict[Node, Any] = {}

    @abc.abstractmethod
    def place(self, node: Node) -> Any:
        """The value of a node that no converter makes: an input, a constant."""

    def value(self, node: Node) -> Any:
        if node not in self.values:
            self.values[node] = self.place(node)
        return self.values[node]

    def argument(self, argument: Any) -> Any:
        """An FX argument as a converter gets it."""
        if isinstance(argument, Node):
            value = argument.meta.get("val")
            if isinstance(value, torch.SymInt):
                return dim_of(value)
            if isinstance(value, torch.SymFloat):
                return size_float(self.net, value)
            if isinstance(value, torch.Tensor | tuple | list):
                return self.value(argument)
            if isinstance(value, int | float | bool):
                return value
            raise Unsupported(f"an argument of type {type(value).__name__}")
        if isinstance(argument, list | tuple):
            return [self.argument(item) for item in argument]
        if isinstance(argument, torch.SymInt):
            return dim_of(argument)
        return argument

    def run(self, node: Node) -> None:
        """Converts one `call_function` node.

        Raises:
            Unsupported: it cannot be converted; the reason is for the user.
            ConversionError: its converter is wrong.
        """
        if node.target is operator.getitem:
            self.values[node] = self.argument(node.args[0])[node.args[1]]
            return
        converter = lookup(node.target)
        if converter is None:
            reason = why_none(node.target)
            raise Unsupported(f"no converter: {reason}" if reason else "no converter")
        stated = node.meta["val"]
        values = (stated,) if isinstance(stated, torch.Tensor) else tuple(stated)
        used = used_results(node, len(values))
        for value, is_used in zip(values, used, strict=True):
            if is_used:
                refuse_type(value)
        net = self.net
        net.scope, net.source, net.expected, net.used, net.node = node.name, source_line(node), values, used, node
        checked = self.checked(node, self.results(node, converter), values, used)
        self.values[node] = checked[0] if isinstance(stated, torch.Tensor) else checked

    def results(self, node: Node, converter: Converter) -> tuple[Any, ...]:
        """What the converter makes of the node.

        Raises:
            Unsupported, ConversionError: as for `run`.
        """
        try:
            bound = converter.bind(self.argument(node.args), {k: self.argument(v) for k, v in node.kwargs.items()})
            result = converter.function(self.net, **bound)
        except TrtDynamoError:
            raise
        except Exception as error:
            if any(isinstance(n.meta.get("val"), torch.SymFloat) for n in node.all_input_nodes):
                raise Unsupported(
                    f"a float that was made of a symbolic size, where a number must be known ({error})"
                ) from error
            raise ConversionError(
                f"the converter of {node.target} failed at {node.format_node()}: {type(error).__name__}: {error}"
            ) from error
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    def checked(
        self, node: Node, results: Sequence[Any], values: Sequence[Any], used: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The results that anybody reads, with the shapes that FX states.

        Raises:
            ConversionError: they are not what FX states.
        """
        if len(results) != len(values):
            raise ConversionError(f"{node.target} has {len(values)} results, its converter made {len(results)}")
        wrong = [r for r, is_used in zip(results, used, strict=True) if is_used and not isinstance(r, Tensor)]
        if wrong:
            raise ConversionError(f"the converter of {node.target} made no tensor but {wrong[0]!r}")
        return tuple(
            self.net.check(r, v, tuple(dim_of(d) for d in v.shape)) if u else None
            for r, v, u in zip(results, values, used, strict=True)
        )


def used_results(node: Node, count: int) -> tuple[bool, ...]:
    """Which results of a node anybody reads."""
    if isinstance(node.meta["val"], torch.Tensor):
        return (True,)
    if any(user.target is not operator.getitem for user in node.users):
        return (True,) * count
    read = {user.args[1] for user in node.users}
    return tuple(index in read for index in range(count))


def refuse_type(value: Any) -> None:
    """Raises `Unsupported` for a value that no network can hold."""
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"a result of type {type(value).__name__}")
    if value.dtype not in TYPES and value.dtype not in CARRIED:
        raise Unsupported(f"TensorRT has no {str(value.dtype).removeprefix('torch.')}")
    if value.ndim > MAX_RANK:
        raise Unsupported(f"rank {value.ndim}: TensorRT's largest is {MAX_RANK}")
    if value.layout is not torch.strided:
        raise Unsupported(f"layout {value.layout}")


def source_line(node: Node) -> str:
    """The user's line that made the node, as `file:line, code`."""
    return last_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=64)
def last_line(trace: str) -> str:
    """Where a stack trace ends. The nodes that come of one line follow one another."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    return f"{found[-1][0]}:{found[-1][1]}, {found[-1][2].strip()}" if found else ""


def getattr_path(module: Any, path: str) -> Any:
    return operator.attrgetter(path)(module)
