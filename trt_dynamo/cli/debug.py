"""`debug FILE:FUNCTION`: each engine of a model beside eager, and of those that differ the first bad node.

FUNCTION is as for `explain`. Exit code 1: an engine differs.
"""

from __future__ import annotations

import typer

from trt_dynamo.cli.explain import Dynamic, Options, Spec, load_model, parse_option
from trt_dynamo.cli.output import AsJson, fail, write_json


def debug(spec: Spec, as_json: AsJson = False, options: Options = None, dynamic: Dynamic = None) -> None:
    """Build a model's engines, compare each with eager, and find the first node that is wrong."""
    from trt_dynamo.debugging import STAND_IN, compare_with_eager
    from trt_dynamo.errors import TrtDynamoError

    model, args, kwargs = load_model(spec)
    settings = dict(parse_option(text) for text in options or ())
    try:
        found = compare_with_eager(model, args, kwargs, options=settings, dynamic=dynamic)
    except TrtDynamoError as error:
        raise fail(str(error)) from None
    if as_json:
        write_json(found.as_dict())
    else:
        typer.echo(str(found))
        if found.runtime == "reference":
            typer.echo(f"\nrun by the reference evaluator, which {STAND_IN}")
    if found.wrong:
        raise typer.Exit(1)
