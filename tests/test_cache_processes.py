"""The cache under several processes, under `kill -9` and under another user's rights: real processes, no stand-ins.

The functions below the tests run in an interpreter of their own, which forks before it has threads.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped, unused-ignore]
import pytest

from trt_dynamo.cache import Plan, Store, entry, get_or_build, open_store
from trt_dynamo.cache.packing import unpacked
from trt_dynamo.settings import Settings, warn_once

TESTS = Path(__file__).parent
# Every way in which the store changes the disk.
CALLS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "utime", "fchmod")


def start(function: str, *arguments: Any, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Runs a function of this file in a new interpreter; it prints its result."""
    code = f"import sys, test_cache_processes as t; t.{function}(*sys.argv[1:])"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
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
    outcome = result(start("die_at_random", tmp_path, 50))
    print("kill -9 during writes:", outcome)  # noqa: T201
    assert outcome["kills"] == 50
    assert outcome["killed at work"] > 10
    assert outcome["looks"] == 50 * 5
    assert 0 < outcome["hits"] <= outcome["looks"]


def test_uploaders_killed_at_random_moments(tmp_path: Path) -> None:
    outcome = result(start("die_while_uploading", tmp_path, 30))
    print("kill -9 during uploads:", outcome)  # noqa: T201
    assert outcome["kills"] == 30
    assert outcome["looks"] >= 30


def test_eight_processes_that_start_at_once_build_each_engine_once(tmp_path: Path) -> None:
    outcome = result(start("rush", tmp_path, 8, 3))
    print("started at once:", outcome)  # noqa: T201
    assert outcome == {"processes": 8, "engines": 3, "builds": 3, "hits": 21, "damaged": 0, "warnings": 0}


@pytest.mark.parametrize("fault", ["full", "failing", "vanishing"])
def test_a_disk_that_fails_at_any_step_of_a_write(tmp_path: Path, fault: str) -> None:
    steps = result(start("fail_at_every_step", tmp_path, fault))
    print(f"{fault} disk, steps tried:", steps)  # noqa: T201
    assert steps.keys() == {"new", "replacing", "evicting", "damaged"}
    assert min(steps.values()) >= 8, steps


def test_a_disk_that_is_full() -> None:
    """A disk of 64 KB where this user may mount one, else a limit of the kernel on the size of files."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = result(start("fill", folder, prefix=PRIVATE_MOUNTS if can_mount() else ()))
    print("full disk:", outcome)  # noqa: T201
    assert outcome["answers"] == 30
    assert outcome["stored"] >= 1
    assert outcome["warnings"] == 1


def test_entries_of_another_user_inside_of_the_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        assert result(start("meet_strangers_entries", folder)) == "fine"


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
        assert store.get(key(2)) in (None, plan(11))
        del warnings.texts[:]
    assert store.verify() == []
    assert store.put(key(1), plan(12))
    assert store.get(key(1)) == plan(12)
    assert store.size() <= store.max_bytes
    assert list((store.folder / ".tmp").iterdir()) == []
    assert warnings.texts == []


def failing(step: int, fault: str, folder: Path, run: Callable[[], Any]) -> bool:
    """Runs something while its `step`-th change of the disk, and those behind it, meet a fault. Whether one did."""
    honest = {name: getattr(os, name) for name in CALLS}
    left, met = step, False

    def faulty(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left, met
            left -= 1
            met = met or left == 0
            if left == 0 and fault == "vanishing":
                for other in CALLS:
                    setattr(os, other, honest[other])
                shutil.rmtree(folder)
            writes = name in ("fsync", "rename", "mkdir") or (name == "open" and arguments[1] & os.O_CREAT)
            if left <= 0 and fault == "full" and writes:
                raise OSError(errno.ENOSPC, "No space left on device")
            if left == 0 and fault == "failing":
                raise OSError(errno.EIO, "Input/output error")
            return honest[name](*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, faulty(name))
    try:
        run()
    finally:
        for name in CALLS:
            setattr(os, name, honest[name])
    return met


def fail_at_every_step(base: str, fault: str) -> None:
    """Each write goes wrong once at each of its steps: the model gets its plan, with one warning at most."""
    warnings = Warnings()
    steps = {}
    for scenario in ("new", "replacing", "evicting", "damaged"):
        step, met = 0, True
        while met:
            step += 1
            store = prepared(Path(base, f"{scenario} {step}"), scenario)
            settings = Settings(
                cache_dir=store.folder, cache_size=store.max_bytes, cache="refresh" if scenario == "replacing" else "on"
            )
            wanted = 2 if scenario == "damaged" else 1
            del warnings.texts[:]
            warn_once.cache_clear()
            run = functools.partial(get_or_build, key(wanted), lambda: plan(11), settings)
            met = failing(step, fault, store.folder, run)
            assert len(warnings.texts) <= 1 + (scenario == "damaged"), warnings.texts
            assert all(str(store.folder) in text for text in warnings.texts)
            check_after_death(store, scenario, warnings)
        steps[scenario] = step
    print(json.dumps(steps))  # noqa: T201


def die_at_random(base: str, rounds: str) -> None:
    warnings = Warnings()
    store = Store(Path(base, "cache"), 7_000_000)
    store.put(key(0), plan(0))
    random.seed(int(rounds))

    def write() -> None:
        for turn in range(10**6):
            store.put(key(turn % 5), plan(turn, 2_000_000))

    counts = dict.fromkeys(("kills", "killed at work", "looks", "hits"), 0)
    for _ in range(int(rounds)):
        children = [forked(write) for _ in range(2)]
        time.sleep(random.uniform(0, 0.08))
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        counts["kills"] += [os.WTERMSIG(status) for status in statuses] == [signal.SIGKILL] * 2
        counts["killed at work"] += any((store.folder / ".tmp").iterdir())
        for number in range(5):
            found = store.get(key(number))
            counts["looks"] += 1
            counts["hits"] += found is not None
            if found is not None and found != plan(0):
                turn = found.manifest["number"]
                assert turn % 5 == number
                assert found == plan(turn, 2_000_000), "whole, and this key's own"
        assert store.verify() == []
        assert store.size() <= store.max_bytes
    assert store.put(key(9), plan(9))
    assert list((store.folder / ".tmp").iterdir()) == []
    assert warnings.texts == []
    print(json.dumps(counts))  # noqa: T201


def die_while_uploading(base: str, rounds: str) -> None:
    """What lies in a shared folder is whole whenever its writers are killed."""
    warnings = Warnings()
    shared = Path(base, "shared")
    random.seed(int(rounds))
    fsspec.filesystem("file")  # loaded here, so that the forks come to their work

    def write(process: int) -> None:
        settings = Settings(cache_dir=Path(base, f"cache {process}"), cache_remote=str(shared), cache="refresh")
        for turn in range(10**6):
            get_or_build(key(turn % 3), functools.partial(plan, turn, 2_000_000), settings)

    counts = dict.fromkeys(("kills", "looks", "left behind"), 0)
    for _ in range(int(rounds)):
        children = [forked(functools.partial(write, process)) for process in range(2)]
        time.sleep(random.uniform(0.05, 0.2))
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        counts["kills"] += [os.WTERMSIG(status) for status in statuses] == [signal.SIGKILL] * 2
        for path in shared.glob("*.engine"):
            found = unpacked(path.read_bytes(), path.stem, entry.UNSIGNED).plan
            assert found == plan(found.manifest["number"], 2_000_000)
            counts["looks"] += 1
    counts["left behind"] = len(list(shared.glob("*.tmp")))
    settings = Settings(cache_dir=Path(base, "another"), cache_remote=str(shared))
    there = [path.stem for path in shared.glob("*.engine")]
    assert [get_or_build(name, lambda: plan(0), settings)[1] for name in there] == [True] * len(there)
    assert warnings.texts == []
    print(json.dumps(counts))  # noqa: T201


def rush(base: str, processes: str, engines: str) -> None:
    """Many processes want the same engines at the same moment, each in another order."""
    settings = Settings(cache_dir=Path(base, "cache"))
    start_at = time.monotonic() + 0.5

    def work(process: int) -> None:
        warnings = Warnings()
        time.sleep(max(0.0, start_at - time.monotonic()))
        hits = 0
        for turn in range(int(engines)):
            number = (turn + process) % int(engines)

            def build(number: int = number) -> Plan:
                os.close(os.open(Path(base, f"built {number} by {process}"), os.O_CREAT | os.O_EXCL))
                time.sleep(0.3)
                return plan(number)

            found, hit = get_or_build(key(number), build, settings)
            assert found == plan(number)
            hits += hit
        Path(base, f"done {process}").write_text(json.dumps([hits, len(warnings.texts)]))

    for child in [forked(functools.partial(work, process)) for process in range(int(processes))]:
        assert os.waitpid(child, 0)[1] == 0
    done = [json.loads(path.read_text()) for path in Path(base).glob("done *")]
    outcome = {
        "processes": len(done),
        "engines": len(open_store(settings).entries()),
        "builds": len(list(Path(base).glob("built *"))),
        "hits": sum(hits for hits, _ in done),
        "damaged": len(open_store(settings).verify()),
        "warnings": sum(count for _, count in done),
    }
    print(json.dumps(outcome))  # noqa: T201


PRIVATE_MOUNTS = ("unshare", "--map-root-user", "--mount")


def can_mount() -> bool:
    """Whether this user may mount a small disk that nobody else sees."""
    if shutil.which("unshare") is None:
        return False
    test = 'd=$(mktemp -d) && mount -t tmpfs -o size=64k none "$d"; e=$?; umount "$d"; rmdir "$d"; exit $e'
    return subprocess.run([*PRIVATE_MOUNTS, "sh", "-c", test], capture_output=True).returncode == 0


def fill(base: str) -> None:
    """Ten engines where one or a few have room: each is answered, whether it can be kept or not."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", base], capture_output=True)
    if mounted.returncode:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    warnings = Warnings()
    settings = Settings(cache_dir=Path(base, "cache"))
    answers = 0
    for _ in range(3):
        for number in range(10):
            found, _ = get_or_build(key(number), functools.partial(plan, number, 12_000 + 100 * number), settings)
            answers += found == plan(number, 12_000 + 100 * number)
    store = open_store(settings)
    assert store.verify() == []
    stored = len(store.entries())
    assert list((store.folder / ".tmp").iterdir()) == []
    # With room again, all is as ever.
    assert len(store.clear()) == stored
    assert store.put(key(1), plan(1))
    assert store.get(key(1)) == plan(1)
    outcome = {"disk": "a limit" if mounted.returncode else "of 64 KB", "answers": answers, "stored": stored}
    print(json.dumps({**outcome, "warnings": len(warnings.texts)}))  # noqa: T201


def meet_strangers_entries(base: str) -> None:
    """In a folder of ours, an entry that we may neither read nor remove."""
    folder = Path(base, "cache")
    settings = Settings(cache_dir=folder)
    for number in (1, 2):
        assert get_or_build(key(number), functools.partial(plan, number), settings)[1] is False
    strange = folder / key(1)[:2] / key(1)
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            if strange not in (path, path.parent):
                os.chown(path, 65534, 65534)
        os.setuid(65534)
    (strange / "plan").chmod(0) if os.access(strange, os.W_OK) else None
    strange.chmod(0o500) if os.stat(strange).st_uid == os.geteuid() else None
    warnings = Warnings()
    for _ in range(2):
        assert get_or_build(key(1), lambda: plan(1), settings) == (plan(1), False)
        assert get_or_build(key(2), lambda: plan(2), settings) == (plan(2), True)
    assert 1 <= len(warnings.texts) <= 2, warnings.texts
    assert all(key(1) in text or "cannot be written" in text for text in warnings.texts), warnings.texts
    assert get_or_build(key(3), lambda: plan(3), settings)[1] is False
    assert get_or_build(key(3), lambda: plan(3), settings)[1] is True
    if os.stat(strange).st_uid == os.geteuid():
        strange.chmod(0o700)
    print(json.dumps("fine"))  # noqa: T201


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
