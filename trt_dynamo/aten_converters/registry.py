"""The table of converters: `@converter(aten.x.overload, ...)` puts a plain function in, binding by ATen schema gets
its arguments.

A converter is `def x(net, a, b, dim=0, *, dtype=None)`. Parameters after `net` are filled by position from the schema,
keyword-only ones by their ATen name. A schema argument that the converter does not name must hold its default, else the
node is `Unsupported`: a short converter is a safe one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

from trt_dynamo.errors import Unsupported

# What these say does not change the values that an engine computes.
HARMLESS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Converter:
    """One converter as it serves one ATen overload: `parameters` maps schema names to the function's own names."""

    target: OpOverload
    function: Callable[..., Any]
    parameters: Mapping[str, str]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The function's keyword arguments for a call of the target.

        Raises:
            Unsupported: an argument that the converter does not name holds something else than its default.
        """
        bound: dict[str, Any] = {}
        for position, argument in enumerate(self.target._schema.arguments):
            if position < len(args):
                value = args[position]
            elif argument.name in kwargs:
                value = kwargs[argument.name]
            elif argument.has_default_value():
                value = argument.default_value
            else:
                raise TypeError(f"{self.target} is called without its argument {argument.name!r}")
            if argument.name in self.parameters:
                bound[self.parameters[argument.name]] = value
            elif argument.name not in HARMLESS and not is_default(argument, value):
                raise Unsupported(f"argument {argument.name}={value!r}")
        return bound


def is_default(argument: torch.Argument, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return default is value or (type(default) is type(value) and default == value)


CONVERTERS: dict[OpOverload, Converter] = {}

# Converters of ops whose library may not be loaded yet, by the op's name.
FOREIGN: dict[str, Callable[..., Any]] = {}


def foreign(*names: str) -> Callable[[F], F]:
    """Registers a function as the converter of ops of other libraries, such as `torchao.quantize_affine.default`, as
    soon as one is met: their libraries are not loaded for it.
    """

    def register(function: F) -> F:
        FOREIGN.update(dict.fromkeys(names, function))
        return function

    return register


def converter(*targets: OpOverload, override: bool = False) -> Callable[[F], F]:
    """Registers a function as the converter of ATen overloads (or of a custom op's).

    The function gets the `Network`, then the call's arguments by name: tensors as `Tensor`, sizes as `int` or a sympy
    expression over the graph's symbols, everything else as Python gave it. It returns a `Tensor`, or a tuple of them.
    To say no for some arguments, raise `Unsupported(reason)`: the node stays in eager.

    Raises:
        ValueError: a target has a converter already and `override` is False, or the parameters do not fit its schema.
    """

    def register(function: F) -> F:
        for target in targets:
            if not isinstance(target, OpOverload):
                raise ValueError(f"{target} is not an overload: write aten.name.overload, for example aten.add.Tensor")
            if target in CONVERTERS and not override:
                raise ValueError(f"{target} has a converter already: pass override=True to replace it")
            CONVERTERS[target] = Converter(target, function, match_parameters(target, function))
        return function

    return register


def match_parameters(target: OpOverload, function: Callable[..., Any]) -> dict[str, str]:
    """Schema name to parameter name: positional ones by position, keyword-only ones by name."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    schema = [argument.name for argument in target._schema.arguments]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    open_names = [a.name for a in target._schema.arguments if not a.kwarg_only]
    names: dict[str, str] = {}
    for position, parameter in enumerate(positional):
        if position < len(open_names):
            names[open_names[position]] = parameter.name
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{target} has {len(open_names)} positional arguments, its converter wants {len(positional)}"
            )
    for parameter in parameters:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.name in schema:
            names[parameter.name] = parameter.name
        elif parameter.default is parameter.empty:
            raise ValueError(f"{target} has no argument {parameter.name!r}")
    return names


def lookup(target: object) -> Converter | None:
    """The converter of what an FX node calls, if it has one."""
    if not isinstance(target, OpOverload):
        return None
    if target not in CONVERTERS and (function := FOREIGN.get(str(target))) is not None:
        converter(target)(function)
    return CONVERTERS.get(target)
