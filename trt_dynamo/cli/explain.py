"""`explain FILE:FUNCTION`: what of a model would run in TensorRT, and why the rest would not. Builds nothing, but with
`--profile`, which builds, runs and times the engines.

FUNCTION takes no arguments and returns `(model, args)` or `(model, args, kwargs)`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_dynamo.cli.output import AsJson, fail, plural, write_json, write_table
from trt_dynamo.settings import nearest

if TYPE_CHECKING:
    from trt_dynamo.layer_profile import LayerProfile

Spec = Annotated[
    str,
    typer.Argument(
        metavar="FILE:FUNCTION", help="A Python file, and a function in it that returns (model, args[, kwargs])."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, as in options={...}; may be repeated."),
]
Dynamic = Annotated[
    bool | None,
    typer.Option("--dynamic/--static", help="Make every size symbolic, or none; torch's own way by default."),
]
Profile = Annotated[bool, typer.Option("--profile", help="Build and run the engines too, and time each layer.")]

# Of a segment's layers so many are shown; JSON has all.
SHOWN = 20


def explain(
    spec: Spec, as_json: AsJson = False, options: Options = None, dynamic: Dynamic = None, profile: Profile = False
) -> None:
    """Which nodes of a model go to TensorRT, in how many engines, and why the others do not."""
    import trt_dynamo

    model, args, kwargs = load_model(spec)
    settings = dict(parse_option(text) for text in options or ())
    explanation = trt_dynamo.explain(model, *args, options=settings, dynamic=dynamic, **kwargs)
    if not as_json:
        typer.echo(str(explanation))
    measured = profiled(model, args, kwargs, settings, dynamic) if profile else None
    if as_json:
        write_json({**explanation.as_dict(), **({"profile": measured.as_dict()} if measured else {})})
    elif measured:
        show_profile(measured)


def profiled(
    model: Callable[..., Any], args: Any, kwargs: dict[str, Any], settings: dict[str, str], dynamic: bool | None
) -> LayerProfile:
    """The layers' times of the model; exits with the reason where there are none."""
    import torch

    from trt_dynamo.errors import TrtDynamoError
    from trt_dynamo.layer_profile import profile_layers

    torch._dynamo.reset()  # what was only explained is to be compiled
    try:
        return profile_layers(model, args, kwargs, options=settings, dynamic=dynamic)
    except TrtDynamoError as error:
        raise fail(str(error)) from None


def show_profile(measured: LayerProfile) -> None:
    """A table for each segment, the slowest layers first."""
    from trt_dynamo.layer_profile import NO_SPEED

    for segment, layers in measured.segments.items():
        total = sum(layers.values())
        slowest = sorted(layers.items(), key=lambda item: -item[1])
        typer.echo(f"\n{segment}: {total:.3f} ms in {plural(len(layers), 'layer')}, a mean of {measured.calls} calls")
        write_table(
            ("ms", "share", "layer"),
            [(f"{spent:.3f}", f"{100 * spent / max(total, 1e-9):.0f} %", name) for name, spent in slowest[:SHOWN]],
        )
        if len(slowest) > SHOWN:
            rest = sum(spent for _, spent in slowest[SHOWN:])
            typer.echo(f"{rest:.3f} ms in {plural(len(slowest) - SHOWN, 'further layer')}; --json has all")
    for reason, count in measured.eager.items():
        typer.echo(f"\n{plural(count, 'call')} answered in eager: {reason}")
    if measured.runtime == "reference":
        typer.echo(f"\nThese are {NO_SPEED}.")


def parse_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise fail(f"--set wants NAME=VALUE, not {text!r}", 2)
    return name.strip(), value


def load_model(spec: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What the function returns, checked. An error inside the user's own code comes out as it is."""
    function = load_function(spec)
    try:
        result = function()
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is None:  # not raised inside, but by the call
            raise fail(f"{spec} must take no arguments: {error}", 2) from None
        raise
    wanted = f"{spec} must return (model, args) or (model, args, kwargs)"
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise fail(f"{wanted}, not {describe(result)}", 2)
    model, args, kwargs = result if len(result) == 3 else (*result, {})
    if not callable(model):
        raise fail(f"{wanted}; its model, {describe(model)}, cannot be called", 2)
    if not isinstance(args, tuple | list):
        raise fail(f"{wanted}; its args must be a tuple, not {describe(args)}", 2)
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise fail(f"{wanted}; its kwargs must be a dict with names as keys, not {describe(kwargs)}", 2)
    return model, tuple(args), kwargs


def load_function(spec: str) -> Callable[[], Any]:
    """The function that the spec names, its file run as a module."""
    name, colon, function_name = spec.rpartition(":")
    if not colon or not name or not function_name:
        raise fail(f"{spec!r} is not FILE:FUNCTION, for example model.py:make", 2)
    file = Path(name)
    if not file.is_file():
        raise fail(f"there is no file {name}", 2)
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    if module_spec is None or module_spec.loader is None:
        raise fail(f"{name} is not a Python file", 2)
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: the modules beside it can be imported, and it can be found by its classes.
    sys.path.insert(0, str(file.parent.absolute()))
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    function: Callable[[], Any] | None = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(function_name, names)
        raise fail(f"{name} has no function {function_name!r}" + (f"; {hint}" if hint else ""), 2)
    return function


def describe(value: Any) -> str:
    """The kind of a value, with its length where that is what matters."""
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
