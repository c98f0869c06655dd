"""`explain FILE:FUNCTION`: what of a model would run in TensorRT, and why the rest would not. Builds nothing, but with
`--profile`, which builds, runs and times the engines.

FUNCTION takes no arguments and returns `(model, args)` or `(model, args, kwargs)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_dynamo import model_spec
from trt_dynamo.cli.output import AsJson, fail, plural, write, write_json, write_table

if TYPE_CHECKING:
    from trt_dynamo.explanation import Explanation
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
Page = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page for a browser too, all in one file.")
]
Profile = Annotated[bool, typer.Option("--profile", help="Build and run the engines too, and time each layer.")]

# Of a segment's layers so many are shown; JSON has all.
SHOWN = 20


def explain(
    spec: Spec,
    as_json: AsJson = False,
    options: Options = None,
    dynamic: Dynamic = None,
    profile: Profile = False,
    page: Page = None,
) -> None:
    """Which nodes of a model go to TensorRT, in how many engines, and why the others do not."""
    import trt_dynamo

    model, args, kwargs = load_model(spec)
    settings = dict(parse_option(text) for text in options or ())
    explanation = trt_dynamo.explain(model, *args, options=settings, dynamic=dynamic, **kwargs)
    if page is not None:
        write_page(explanation, page, spec)
    if not as_json:
        write(explanation, str(explanation))
    measured = profiled(model, args, kwargs, settings, dynamic) if profile else None
    if as_json:
        write_json({**explanation.as_dict(), **({"profile": measured.as_dict()} if measured else {})})
    elif measured:
        show_profile(measured)


def write_page(explanation: Explanation, path: Path, spec: str) -> None:
    try:
        explanation.html(path, Path(spec).name)
    except OSError as error:
        raise fail(f"the page cannot be written: {error}") from None
    typer.echo(f"wrote {path}", err=True)


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
    """What the function returns; exits where it names none, or gives no model."""
    try:
        return model_spec.load_model(spec)
    except model_spec.SpecError as error:
        raise fail(str(error), 2) from None
