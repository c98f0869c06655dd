"""The cache under several processes, under `kill -9` and under another user's rights: real processes, no stand-ins.

The functions below the tests run in an interpreter of their own, which forks before it has threads.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_dynamo.cache import Plan, Store, get_or_build
from trt_dynamo.settings import Settings

TESTS = Path(__file__).parent
# Every way in which the store changes the disk.
CALLS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "utime", "fchmod")


def start(function: str, *arguments: Any) -> subprocess.Popen[str]:
    """Runs a function of this file in a new interpreter; it prints its result."""
    code = f"import sys, test_cache_processes as t; t.{function}(*sys.argv[1:])"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def result(run: subprocess.Popen[str]) -> Any:
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0
    return json.loads(output)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_writer_killed_at_any_of_its_steps(tmp_path: Path) -> None:
    steps = result(start("die_at_every_step", tmp_path))
    assert steps.keys() == {"new", "replacing", "evicting", "damaged"}
    assert min(steps.values()) >= 8, steps


def test_a_writer_killed_at_random_moments(tmp_path: Path) -> None:
    outcome = result(start("die_at_random", tmp_path, 20))
    assert outcome["kills"] == 20
    assert outcome["entries"] > 0


def test_many_processes_in_a_small_cache(tmp_path: Path) -> None:
    assert result(start("crowd", tmp_path)) == "fine"


def test_two_processes_that_want_one_engine_build_it_once(tmp_path: Path) -> None:
    runs = [start("want", tmp_path, number, 0.5) for number in (1, 2)]
    for number in (1, 2):
        wait_for(tmp_path / f"ready {number}")
    (tmp_path / "go").touch()
    hits = sorted(result(run) for run in runs)
    assert hits == [False, True]
    assert len(list(tmp_path.glob("built *"))) == 1


def test_a_killed_builder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    run = start("want", tmp_path, 1, 100)
    wait_for(tmp_path / "built 1")
    run.kill()
    run.communicate()
    assert (tmp_path / "cache" / ".builds" / key(1)).exists()
    began = time.monotonic()
    assert get_or_build(key(1), lambda: plan(1), Settings(cache_dir=tmp_path / "cache")) == (plan(1), False)
    assert time.monotonic() - began < 30
    assert list((tmp_path / "cache" / ".builds").iterdir()) == []


def test_a_folder_that_can_only_be_read_still_serves() -> None:
    # Not below pytest's folder, which a user without rights cannot enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        assert result(start("read_without_rights", folder)) == "fine"


def key(number: int) -> str:
    return f"{number:02x}" + f"{number:062x}"


def plan(number: int, size: int = 1000) -> Plan:
    return Plan(bytes([number % 256]) * size, {"number": number})


class Warnings(logging.Handler):
    """Collects the package's warnings, of which most of these functions want none."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("trt_dynamo").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def forked(run: Callable[[], Any]) -> int:
    """Runs something in a fork of this process. Returns the fork's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def dying(step: int, run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, in a process that kills itself just before its `step`-th change of the disk."""

    def armed() -> None:
        left = step

        def deadly(honest: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return honest(*arguments, **keywords)

            return call

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))
        run()

    return armed


def die_at_every_step(base: str) -> None:
    warnings = Warnings()
    steps = {}
    for scenario in ("new", "replacing", "evicting", "damaged"):
        step, alive = 0, False
        while not alive:
            step += 1
            store = prepared(Path(base, f"{scenario} {step}"), scenario)
            _, status = os.waitpid(forked(dying(step, functools.partial(disturb, store, scenario))), 0)
            alive = status == 0
            assert alive or os.WTERMSIG(status) == signal.SIGKILL
            check_after_death(store, scenario, warnings)
        steps[scenario] = step
    print(json.dumps(steps))  # noqa: T201


def prepared(folder: Path, scenario: str) -> Store:
    store = Store(folder, 10**9)
    if scenario != "new":
        for number in (1, 2, 3):
            assert store.put(key(number), plan(number))
    if scenario == "evicting":
        store.max_bytes = store.size()
        (store.path(key(1)) / "plan").unlink()
        assert store.verify()
        assert store.put(key(4), plan(4))
    if scenario == "damaged":
        (store.path(key(2)) / "plan").write_bytes(b"")
    return store


def disturb(store: Store, scenario: str) -> None:
    if scenario == "damaged":
        store.get(key(2))
    else:
        store.put(key(1), plan(11))


def check_after_death(store: Store, scenario: str, warnings: Warnings) -> None:
    """Whole entries or none; the next process writes as if nothing had been."""
    del warnings.texts[:]
    assert store.get(key(1)) in (None, plan(1), plan(11))
    assert store.get(key(3)) in (None, plan(3))
    if scenario == "damaged":
        assert store.get(key(2)) is None
        del warnings.texts[:]
    assert store.verify() == []
    assert store.put(key(1), plan(12))
    assert store.get(key(1)) == plan(12)
    assert store.size() <= store.max_bytes
    assert list((store.folder / ".tmp").iterdir()) == []
    assert warnings.texts == []


def die_at_random(base: str, rounds: str) -> None:
    warnings = Warnings()
    store = Store(Path(base, "cache"), 7_000_000)
    store.put(key(0), plan(0))
    random.seed(int(rounds))

    def write() -> None:
        for turn in range(10**6):
            store.put(key(turn % 5), plan(turn, 2_000_000))

    kills = 0
    for _ in range(int(rounds)):
        child = forked(write)
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WTERMSIG(status) == signal.SIGKILL
        assert store.verify() == []
        assert store.size() <= store.max_bytes
    assert store.put(key(9), plan(9))
    assert list((store.folder / ".tmp").iterdir()) == []
    assert warnings.texts == []
    print(json.dumps({"kills": kills, "entries": len(store.entries())}))  # noqa: T201


def crowd(base: str) -> None:
    """Four processes put, get, list and evict in a cache that holds three of eight plans."""
    store = Store(Path(base, "cache"), 3 * 4000)

    def work() -> None:
        warnings = Warnings()
        random.seed(os.getpid())
        for _ in range(40):
            number = random.randrange(8)
            found = store.get(key(number))
            assert found is None or found == plan(number, 3500)
            if found is None:
                assert store.put(key(number), plan(number, 3500))
            store.entries()
        assert warnings.texts == [], warnings.texts

    for child in [forked(work) for _ in range(4)]:
        assert os.waitpid(child, 0)[1] == 0
    assert 1 <= len(store.entries()) <= 3
    assert store.size() <= store.max_bytes
    assert store.verify() == []
    print(json.dumps("fine"))  # noqa: T201


def want(base: str, number: str, seconds: str) -> None:
    """Waits for the start, then asks for an engine that takes `seconds` to build; prints whether it was a hit."""

    def build() -> Plan:
        Path(base, f"built {number}").touch()
        time.sleep(float(seconds))
        return plan(1)

    Path(base, f"ready {number}").touch()
    wait_for(Path(base, "go"))
    found, hit = get_or_build(key(1), build, Settings(cache_dir=Path(base, "cache")))
    assert found == plan(1)
    print(json.dumps(hit))  # noqa: T201


def read_without_rights(base: str) -> None:
    """As a user who may read the cache and change nothing in it: hits are served, a miss is one warning."""
    folder = Path(base, "cache")
    settings = Settings(cache_dir=folder)
    assert get_or_build(key(1), lambda: plan(1), settings) == (plan(1), False)
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
        path.chmod(0o500 if path.is_dir() else 0o400)
    if os.geteuid() == 0:
        os.setuid(65534)
    warnings = Warnings()
    assert get_or_build(key(1), lambda: plan(2), settings) == (plan(1), True)
    assert warnings.texts == []
    assert get_or_build(key(2), lambda: plan(2), settings) == (plan(2), False)
    assert get_or_build(key(3), lambda: plan(3), settings) == (plan(3), False)
    assert len(warnings.texts) == 1, warnings.texts
    assert str(folder) in warnings.texts[0]
    assert sorted(everything) == sorted([folder, *folder.rglob("*")])
    for path in everything:
        path.chmod(0o700)
    print(json.dumps("fine"))  # noqa: T201
