"""Many builds ahead of time: models by precisions by targets. In: what a user asks for. Out: a `Result` for each.

One function, `run`, does one of them, in this process or in another on another machine: what it takes and gives is
plain data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trt_dynamo.ahead_of_time import Ahead, build_ahead, settings_for, told
from trt_dynamo.cache import open_store
from trt_dynamo.cache.remote import open_remote
from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.model_spec import load_model
from trt_dynamo.settings import PREFIX, Settings

Outcome = Literal["built", "found", "failed"]
Loaded = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One model (`FILE:FUNCTION`) in one precision for one target. `folder` is where the user asked for it, `options`
    are all other settings, `dynamic` is that of `torch.compile`."""

    spec: str
    precision: str
    target: str
    folder: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dynamic: bool | None = None

    def __str__(self) -> str:
        return f"{self.spec}, {self.precision}, {self.target}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a job: `built` (at least one engine is new), `found` (all were there) or `failed` (`reason` says
    why, and what else was built stays). `keys` are the engines' in the cache, `bytes` the size of their plans."""

    job: Job
    outcome: Outcome
    reason: str = ""
    keys: tuple[str, ...] = ()
    new: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "job"}
        asked = {"model": self.job.spec, "precision": self.job.precision, "target": self.job.target}
        return {**asked, **rest, "engines": len(self.keys)}


def planned(
    specs: Sequence[str],
    precisions: Sequence[str],
    targets: Sequence[str],
    options: Mapping[str, Any],
    dynamic: bool | None = None,
) -> list[Job]:
    """Every combination once; those of a model follow one another."""
    folder, every = os.getcwd(), itertools.product(specs, precisions, targets)
    return [Job(*each, folder, dict(options), dynamic) for each in dict.fromkeys(every)]


def run(job: Job, environ: Mapping[str, str] | None = None, loaded: Loaded | None = None) -> Result:
    """Does the job. Whatever goes wrong is in the result.

    Args:
        environ: the variables of trt_dynamo that hold for the job, by default those of this process.
        loaded: the model and its arguments, where they are at hand.
    """
    started = time.perf_counter()
    found, problems = Ahead(), []
    try:
        with variables(environ):
            settings = Settings.from_env().merge({**job.options, "precision": job.precision})
            settings = settings_for(job.target, settings)
            found = build_ahead(*(loaded or load_model(located(job))), settings, dynamic=job.dynamic)
            problems = [*found.problems, *not_kept(found.keys, settings)]
    except TrtDynamoError as error:
        problems.append(str(error))
    except Exception as error:  # noqa: BLE001  the user's file may raise anything, and the other jobs are to be done
        problems.append(told(error))
    engines = {engine.key: engine for engine in found.engines}
    new = len({engine.key for engine in found.engines if not engine.hit})
    return Result(
        job,
        "failed" if problems else "built" if new else "found",
        "; ".join(dict.fromkeys(problems)),
        tuple(engines),
        new,
        sum(engine.size for engine in engines.values()),
        round(time.perf_counter() - started, 3),
    )


def run_all(jobs: Sequence[Job]) -> Iterator[Result]:
    """Does the jobs here, one after another. A model is loaded once, however many jobs are for it."""
    for _, group in itertools.groupby(jobs, key=lambda job: job.spec):
        loaded: Loaded | None = None
        for job in group:
            if loaded is None:
                # Where this fails, each of the jobs fails so and says why.
                with contextlib.suppress(Exception):
                    loaded = load_model(located(job))
            yield run(job, loaded=loaded)


def located(job: Job) -> str:
    """The spec with a path that is right here: as it was given, where it leads to a file, else from the user's
    folder."""
    name, colon, function = job.spec.rpartition(":")
    return job.spec if not colon or Path(name).is_file() else f"{Path(job.folder, name)}:{function}"


@contextlib.contextmanager
def variables(environ: Mapping[str, str] | None) -> Iterator[None]:
    """Inside, exactly these variables of trt_dynamo are set."""
    if environ is None:
        yield
        return
    before = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    try:
        replace_variables(environ)
        yield
    finally:
        replace_variables(before)


def replace_variables(values: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update(values)


def not_kept(keys: Sequence[str], settings: Settings) -> list[str]:
    """Why engines that were made are not where other machines shall find them: in the remote cache if there is one,
    which gets those that were found here too; else in the folder.
    """
    store, remote = open_store(settings), open_remote(settings)
    if remote is None:
        lost = [key for key in keys if not store.path(key).is_dir()]
        words = f"the cache {store.folder} did not keep {len(lost)} of {len(keys)} engines"
        return [f"{words}: is its disk full, or cache_size too small?"] if lost else []
    remote.finish()
    try:
        for key in keys:
            files, root = remote.file_system()
            if files.exists(f"{root}/{key}.engine"):
                continue
            record = store.record(key)
            if record is None:
                return [f"the cache {store.folder} did not keep an engine, so it is not in {remote.shown}"]
            remote.writing.closed_until = 0.0  # whatever failed before, this one is tried, and its error is told
            remote.upload(record)
    except Exception as error:  # noqa: BLE001  each file system has errors of its own
        words = f"{type(error).__name__}: {error}".replace(remote.url, remote.shown)
        return [f"the remote cache {remote.shown} does not have all of the engines ({words})"]
    return []
