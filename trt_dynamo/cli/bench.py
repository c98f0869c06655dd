"""`bench`: eager, Inductor and TensorRT side by side, in one process.

A model is FILE:FUNCTION (as for `explain`), torchvision:NAME, timm:NAME or hf:CONFIG.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trt_dynamo.cli.explain import Dynamic, Options, load_model, parse_option
from trt_dynamo.cli.output import AsJson, fail, write_json, write_table

if TYPE_CHECKING:
    import torch

    from trt_dynamo.benchmarking import Case, Result
    from trt_dynamo.benchmarking.columns import Column

Specs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...", help="FILE:FUNCTION, torchvision:NAME, timm:NAME, hf:CONFIG; several make a table."
    ),
]
Table = Annotated[
    str, typer.Option("--table", help="A table that others published, at batch 1 in fp16: torch2trt, efficientnet.")
]
Columns = Annotated[
    str, typer.Option("--columns", help="Some of eager, inductor, reduce-overhead, max-autotune, tensorrt.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="The batch of models that are named.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Cast model and inputs first: float32, fp16 or bf16.")]
Precision = Annotated[str, typer.Option("--precision", help="TensorRT's setting precision: fp16, bf16 or auto.")]
Calls = Annotated[int | None, typer.Option("--calls", min=1, help="Calls of each column, instead of --seconds.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.01, help="How long each column is timed.")]
Device = Annotated[str, typer.Option("--device", help="cuda, cuda:1, cpu; the GPU where there is one.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="The size of images, instead of the model's own.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="The length of texts.")]
Png = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a bar chart too (needs matplotlib).")]

DTYPES = {"float32": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def bench(
    specs: Specs = None,
    table: Table = "",
    columns: Columns = "",
    batch: Batch = 1,
    dtype: Dtype = "",
    precision: Precision = "",
    dynamic: Dynamic = None,
    calls: Calls = None,
    seconds: Seconds = 4.0,
    device: Device = "",
    size: Size = None,
    tokens: Tokens = 128,
    options: Options = None,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Time a model in eager, by Inductor and on TensorRT, with accuracy and memory beside."""
    from trt_dynamo.benchmarking.chart import check_matplotlib
    from trt_dynamo.benchmarking.measuring import Request, measure

    names = [*models_of(table), *(specs or ())]
    if not names:
        raise fail("name a model, for example torchvision:resnet50, or a table", 2)
    if png:
        check_matplotlib()
    settings = dict(parse_option(text) for text in options or ())
    settings.update({"precision": precision} if precision else {})
    request = Request(
        columns_of(columns),
        device_of(device),
        dtype_of(dtype or ("fp16" if table else "")),
        dynamic,
        settings,
        calls,
        seconds,
    )
    results = []
    for name in names:
        case = load(name, 1 if table and name not in (specs or ()) else batch, size, tokens)
        results.append(measure(case, request, functools.partial(say, name)))
        if not as_json:
            show(results[-1])
    if as_json:
        write_json([result.as_dict() for result in results])
    elif len(results) > 1:
        show_all(results)
    if png:
        from trt_dynamo.benchmarking.chart import save

        save(results, png)
    if any(result.baseline is None for result in results):
        raise typer.Exit(1)


def say(name: str, step: str) -> None:
    """What is being done, for who watches."""
    typer.echo(f"{name}: {step}", err=True)


def models_of(table: str) -> tuple[str, ...]:
    from trt_dynamo.benchmarking.sources import TABLES

    if table and table not in TABLES:
        raise fail(f"there is no table {table!r}; there are {', '.join(TABLES)}", 2)
    return TABLES[table] if table else ()


def columns_of(text: str) -> tuple[Column, ...]:
    from trt_dynamo.benchmarking.columns import chosen
    from trt_dynamo.errors import SettingsError

    try:
        return chosen(text)
    except SettingsError as error:
        raise fail(str(error), 2) from None


def device_of(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise fail(f"--device {text}: {str(error).splitlines()[0]}", 2) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise fail("torch sees no CUDA GPU; --device cpu times what runs there", 2)
    return device


def dtype_of(text: str) -> torch.dtype | None:
    import torch

    if text and text not in DTYPES:
        raise fail(f"--dtype {text!r}: it is one of {', '.join(DTYPES)}", 2)
    return getattr(torch, DTYPES[text]) if text else None


def load(spec: str, batch: int, size: int | None, tokens: int) -> Case:
    """The model that is named, or the user's own, whose batch its function makes."""
    from trt_dynamo.benchmarking.sources import case_of, named
    from trt_dynamo.errors import SettingsError

    try:
        case = named(spec, batch, size=size, tokens=tokens)
    except SettingsError as error:
        raise fail(str(error), 2) from None
    return case_of(spec, *load_model(spec)) if case is None else case


def show(result: Result) -> None:
    """The table of one model, with bars below."""
    from trt_dynamo.benchmarking.results import bars, rows

    typer.echo(f"\n{result.heading}")
    write_table(*rows(result))
    write_bars(bars(result))
    for cell in result.cells:
        if cell.note:
            typer.echo(f"{cell.title}: {cell.note}")


def show_all(results: Sequence[Result]) -> None:
    from trt_dynamo.benchmarking.results import notes, summary

    typer.echo()
    write_table(*summary(results))
    for note in notes(results):
        typer.echo(note)


def write_bars(bars: Sequence[tuple[str, int, str]]) -> None:
    """Bars, in color on a terminal."""
    from rich.console import Console
    from rich.text import Text

    width = max(len(title) for title, _, _ in bars)
    console = Console(soft_wrap=True)
    for title, length, text in bars:
        console.print(
            Text.assemble(f"{title:<{width}}  ", ("\u2588" * length, "green"), f"  {text}" if length else text)
        )
