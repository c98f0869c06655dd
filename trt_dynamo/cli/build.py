"""`build FILE:FUNCTION... --targets 8.6,8.9`: fills the cache with engines for machines with other GPUs, or from a
machine without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_dynamo.cli.explain import Dynamic, Options, parse_option
from trt_dynamo.cli.output import AsJson, fail, plural, size, write_json, write_table

if TYPE_CHECKING:
    from trt_dynamo.build_jobs import Job, Result

Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE:FUNCTION...",
        help="A Python file, and a function in it that takes nothing and returns (model, args[, kwargs]), on the CPU. "
        "The model, and the tensors among its arguments, are taken to be on the GPU later.",
    ),
]
Targets = Annotated[
    str,
    typer.Option(
        "--targets",
        help="Compute capabilities, such as 8.6,8.9,12.0, each with engines of its own; `portable` for engines of "
        "TensorRT for RTX that run on all of them.",
    ),
]
Precisions = Annotated[
    str | None, typer.Option("--precision", help="One or more of native, fp16, bf16, auto, separated by commas.")
]
Profiles = Annotated[
    str | None,
    typer.Option("--profiles", help="The sizes to build for: a .json file, as record_shapes saves it (or a number)."),
]
RemoteUrl = Annotated[
    str | None,
    typer.Option("--remote", metavar="URL", help="The cache that the machines share: the setting cache_remote."),
]
OnRay = Annotated[bool, typer.Option("--ray", help="Do each model, precision and target as a task of a Ray cluster.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="ADDRESS", help="The cluster; by default the one that Ray finds or starts."),
]

COLUMNS = ("model", "precision", "target", "outcome", "engines", "new", "size", "seconds", "reason")


def build(
    specs: Specs,
    targets: Targets = "portable",
    precision: Precisions = None,
    profiles: Profiles = None,
    options: Options = None,
    dynamic: Dynamic = None,
    remote: RemoteUrl = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Build engines ahead of time for other machines (TensorRT for RTX), without a GPU.

    An engine that the cache has is not built again. The exit code is 1 if a model failed; all others are built all the
    same.
    """
    given: dict[str, Any] = dict(parse_option(text) for text in options or ())
    if profiles is not None:
        given["profiles"] = str(Path(profiles).absolute()) if profiles.endswith(".json") else profiles
    if remote is not None:
        given["cache_remote"] = remote
    jobs = asked(specs, targets, precision, given, dynamic)
    results = []
    for result in on_cluster(jobs, ray_address) if ray or ray_address else here(jobs):
        results.append(result)
        typer.echo(f"[{len(results)}/{len(jobs)}] {result.job}: {told(result)}", err=True)
    order = {job_key(job): place for place, job in enumerate(jobs)}
    results.sort(key=lambda result: order[job_key(result.job)])
    if as_json:
        write_json([result.as_dict() for result in results])
    else:
        write_table(COLUMNS, [row(result) for result in results])
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


def asked(
    specs: Sequence[str], targets: str, precision: str | None, options: dict[str, Any], dynamic: bool | None
) -> list[Job]:
    """The jobs; exits where a setting is none."""
    from trt_dynamo.build_jobs import planned
    from trt_dynamo.errors import SettingsError
    from trt_dynamo.settings import Settings

    for name in ("targets", "precision"):
        if name in options:
            raise fail(f"--set {name}=... is --{name} here", 2)
    try:
        settings = Settings.from_env().merge(options)
        precisions = items(precision) if precision is not None else [settings.precision]
        chosen = items(targets)
        for each in precisions:
            settings.merge({"precision": each})
        for target in chosen:
            if target != "portable":
                settings.merge({"targets": target})
    except SettingsError as error:
        raise fail(str(error), 2) from None
    if not precisions or not chosen:
        raise fail("--targets and --precision want at least one value", 2)
    return planned(specs, precisions, chosen, options, dynamic)


def items(text: str) -> list[str]:
    return [item.lower() for item in text.replace(",", " ").split()]


def here(jobs: Sequence[Job]) -> Iterator[Result]:
    from trt_dynamo.build_jobs import run_all

    return run_all(jobs)


def on_cluster(jobs: Sequence[Job], address: str | None) -> Iterator[Result]:
    """The same on a cluster, whose nodes have no cache in common but the remote one."""
    from trt_dynamo.ray_builds import run_on_cluster
    from trt_dynamo.settings import Settings

    if Settings.from_env().merge(jobs[0].options).cache_remote is None:
        raise fail("with --ray the engines need a place that all nodes reach: --remote URL, or a shared folder", 2)
    return run_on_cluster(jobs, address)


def job_key(job: Job) -> tuple[str, str, str]:
    return job.spec, job.precision, job.target


def told(result: Result) -> str:
    """What came of it, in a few words."""
    if result.outcome == "failed":
        return f"failed: {result.reason}"
    return f"{result.outcome}, {plural(len(result.keys), 'engine')}, {size(result.bytes)} in {result.seconds:.1f} s"


def row(result: Result) -> tuple[str, ...]:
    job = result.job
    counts = (str(len(result.keys)), str(result.new), size(result.bytes), f"{result.seconds:.1f}")
    return (job.spec, job.precision, job.target, result.outcome, *counts, result.reason)
