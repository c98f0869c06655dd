"""`demo`: a real pretrained transformer, compiled, compared with eager and searched."""

from __future__ import annotations

import typer


def demo() -> None:
    """Compiles a real pretrained transformer through the backend and compares it with eager."""
    from trt_dynamo.demo import main

    code = main()
    if code:
        raise typer.Exit(code)
