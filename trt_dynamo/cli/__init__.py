"""The commands, one file each; this one names them. What they print goes to stdout, what went wrong to stderr.

A command imports torch, TensorRT and the converters when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

from trt_dynamo.cli import bench, build, cache, cache_archive, debug, demo, explain, export, info, ops, selftest

app = typer.Typer(
    help="TensorRT as a backend of torch.compile: what can run here, what would, and what is cached.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("info")(info.info)
app.command("demo")(demo.demo)
app.command("explain")(explain.explain)
app.command("bench")(bench.bench)
app.command("build")(build.build)
app.command("debug")(debug.debug)
app.command("export")(export.export)
app.command("ops")(ops.ops)
app.command("selftest")(selftest.selftest)
cache.app.command("export")(cache_archive.export)
cache.app.command("import")(cache_archive.import_)
app.add_typer(cache.app, name="cache")
