"""Build jobs on a Ray cluster: each is one of Ray's tasks, in a worker process of some node. In: jobs. Out: their
results, as they come.

A worker that dies is Ray's to replace: the task is tried again, and finds the engines that it had stored. A node reads
FILE under the path that it has here (a shared folder, or Ray's `working_dir`), and the results are what the remote
cache has afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trt_dynamo.build_jobs import Job, Result, run
from trt_dynamo.errors import SettingsError, typed_in_a_line
from trt_dynamo.settings import PREFIX

# How often a task is tried again whose worker died.
RETRIES = 3

MISSING = "builds on a cluster need Ray: pip install 'trt-dynamo[ray]'"


class RayMissing(SettingsError):
    """Ray cannot be imported."""


def connected(address: str | None) -> tuple[Any, bool]:
    """Ray, connected to the cluster at `address`; else to the one that Ray finds (RAY_ADDRESS, or one on this machine);
    else to one that it starts on this machine. And whether this connected it.

    Raises:
        RayMissing: Ray is not installed.
        SettingsError: there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise RayMissing(f"{MISSING} ({error})") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(f"there is no Ray cluster to connect to: {error}") from None
    return ray, mine


def run_on_cluster(jobs: Sequence[Job], address: str | None = None, processors: float = 1) -> Iterator[Result]:
    """Does the jobs on the cluster, the results in the order in which they are ready. Each gets the variables of
    trt_dynamo of this process by value, and reserves so many `processors`.

    Raises:
        RayMissing, SettingsError: as `connected` says.
    """
    # Ray prints what happens to workers, on stdout, which is the caller's.
    with contextlib.redirect_stdout(sys.stderr):
        ray, mine = connected(address)
        try:
            yield from results_of(ray, jobs, processors)
        finally:
            if mine:
                ray.shutdown()


def results_of(ray: Any, jobs: Sequence[Job], processors: float) -> Iterator[Result]:
    environ = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    task = ray.remote(run_in_worker)
    reserved = {"max_retries": RETRIES, "num_cpus": processors}
    waiting = {task.options(name=str(job), **reserved).remote(job, environ): job for job in jobs}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                yield ray.get(ready)
            except Exception as error:  # noqa: BLE001  what Ray says of a task is the job's result
                yield Result(job, "failed", lost(error))
    finally:
        for each in waiting:
            ray.cancel(each, force=True)


def run_in_worker(job: Job, environ: Mapping[str, str]) -> Result:
    """What a worker does."""
    return run(job, environ)


def lost(error: Exception) -> str:
    return f"the task was lost: {typed_in_a_line(error, 300)}"
