"""`export FILE:FUNCTION --output m.plan`: a model as one TensorRT plan, for C++, trtexec and Triton.

FUNCTION takes no arguments and returns `(model, args)` or `(model, args, kwargs)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from trt_dynamo.cli.explain import Options, Spec, load_model, parse_option
from trt_dynamo.cli.output import fail

Output = Annotated[Path, typer.Option("--output", "-o", help="The plan to write.")]
Triton = Annotated[
    Path | None, typer.Option("--triton", metavar="REPOSITORY", help="Write a model into this Triton repository too.")
]
Batch = Annotated[
    int | None, typer.Option("--batch", min=2, help="Dim 0 of all tensor arguments is a batch of 1 to so many.")
]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="Every size may vary that the model lets vary.")]


def export(
    spec: Spec,
    output: Output,
    triton: Triton = None,
    batch: Batch = None,
    dynamic: Dynamic = False,
    options: Options = None,
) -> None:
    """Write a model as one TensorRT plan, for C++, trtexec and Triton Inference Server."""
    import torch

    import trt_dynamo

    if batch is not None and dynamic:
        raise fail("--batch and --dynamic exclude one another", 2)
    model, args, kwargs = load_model(spec)
    if not isinstance(model, torch.nn.Module):
        raise fail(f"the model must be a torch.nn.Module, not {type(model).__name__}", 2)
    settings: dict[str, Any] = dict(parse_option(text) for text in options or ())
    shapes = sizes_that_vary(model, args, kwargs, batch) if batch is not None or dynamic else None
    made = trt_dynamo.export_engine(model, args, output, kwargs, shapes, triton, **settings)
    typer.echo(str(made))


def sizes_that_vary(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None) -> Any:
    """What `torch.export` shall be told of the arguments' dims."""
    import torch
    import torch.utils._pytree as pytree
    from torch.export import Dim, ShapesCollection

    first = Dim("batch", min=1, max=batch) if batch is not None else None
    shapes = ShapesCollection()
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and value.ndim:
            shapes[value] = {0: first} if first is not None else dict.fromkeys(range(value.ndim), Dim.AUTO)
    return shapes.dynamic_shapes(model, args, kwargs)
