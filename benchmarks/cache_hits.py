"""What a hit in the engine cache costs, by tier: the folder, a folder that is shared, and S3 (moto's server, in here).

python -m benchmarks.cache_hits
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trt_dynamo.cache import Plan, get_or_build
from trt_dynamo.cache.remote import open_remote
from trt_dynamo.settings import Settings

KEY = "a" * 64
SECRET = "k" * 32
SIZES = {0.1: 20, 10: 20, 100: 5}  # megabytes of a plan, and how often each is measured
COLUMNS = ("MB", "store", "local hit", "signed", "folder hit", "folder, not kept", "S3 hit", "S3 miss")


def milliseconds(run: Callable[[int], object], times: int) -> float:
    """The median of `times` runs after a first one, which connects."""
    taken = []
    for turn in range(times + 1):
        began = time.perf_counter()
        run(turn)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[1:])


def never() -> Plan:
    raise AssertionError("this was to be a hit")


def costs(folder: Path, megabytes: float, times: int) -> list[float]:
    """One line of the table, in milliseconds."""
    plan = Plan(os.urandom(int(megabytes * 2**20)), {"inputs": [{"name": "x", "shape": [None, 3]}] * 10})
    row = [
        milliseconds(lambda turn: get_or_build(f"{turn:064x}", lambda: plan, Settings(cache_dir=folder / "w")), times)
    ]
    for secret in ("", SECRET):
        settings = Settings(cache_dir=folder / f"local{len(secret)}", cache_key=secret)
        get_or_build(KEY, lambda: plan, settings)
        row.append(milliseconds(lambda _, settings=settings: get_or_build(KEY, never, settings), times))  # type: ignore[misc]
    shared, bucket = str(folder / "shared"), "s3://bucket/engines"
    for url in (shared, bucket):
        settings = Settings(cache_dir=folder / "first", cache_remote=url, cache_remote_seconds=600, cache="refresh")
        get_or_build(KEY, lambda: plan, settings)
        remote = open_remote(settings)
        assert remote is not None
        assert remote.finish()

        def hit(turn: int, url: str = url) -> object:
            machine = folder / f"{'s3' if url == bucket else 'folder'}{turn}"
            settings = Settings(cache_dir=machine, cache_remote=url, cache_remote_seconds=600)
            return get_or_build(KEY, never, settings)

        row.append(milliseconds(hit, times))
        # Once without keeping it in the folder, once without finding it.
        look = Settings(cache_dir=folder / "none", cache_remote=url, cache_remote_seconds=600, cache="readonly")
        key, build = (KEY, never) if url == shared else ("b" * 64, lambda: Plan(b"", {}))
        row.append(milliseconds(lambda _, key=key, build=build, look=look: get_or_build(key, build, look), times))  # type: ignore[misc]
    return row


def main() -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="user",
        AWS_SECRET_ACCESS_KEY="password",
        AWS_DEFAULT_REGION="us-east-1",
    )
    boto3.client("s3").create_bucket(Bucket="bucket")
    print("medians in milliseconds")
    print("".join(f"{column:>18}" for column in COLUMNS))
    for megabytes, times in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            row = costs(Path(folder), megabytes, times)
        print("".join(f"{value:>18.1f}" for value in [megabytes, *row]))
    server.stop()


if __name__ == "__main__":
    main()
