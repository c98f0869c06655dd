"""Runs cases in a child process, and goes on with a new one where a case ends it or does not end.

Comes in: names of cases. Goes out: a result for every one of them, in order: what the child said, or `crashed` or
`timeout` with the child's last words.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

# To import torch and TensorRT on a cold disk takes this long at most.
START_SECONDS = 300.0
LAST_WORDS = 3000

# What a crash is called that comes after the last case, when the process ends.
AT_THE_END = "end of the process"


class Child:
    """One process that runs cases. Its stderr, and what libraries print on its stdout, go to a file."""

    def __init__(self, names: Sequence[str], runtime: str, files: Sequence[str], words: Path) -> None:
        self.words = words
        self.lines: list[bytes] = []
        self.rest = b""
        self.channel, theirs = os.pipe()
        command = [sys.executable, "-m", "trt_dynamo.selftest.worker", str(theirs), runtime, *files]
        with words.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=[theirs],
                env=environment(),
                start_new_session=True,  # so that what it started ends with it
            )
        os.close(theirs)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(list(names)).encode() + b"\n")
            self.process.stdin.flush()

    def read(self, seconds: float) -> dict[str, Any] | None:
        """Its next line; None when it has ended. TimeoutError after so many seconds without one."""
        deadline = time.monotonic() + seconds
        while not self.lines:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.channel], [], [], left)[0]:
                raise TimeoutError
            found = os.read(self.channel, 65536)
            if not found:
                return None
            *self.lines, self.rest = (self.rest + found).split(b"\n")
        line: dict[str, Any] = json.loads(self.lines.pop(0))
        return line

    def end(self) -> int:
        """Its exit status, negative for a signal; killed if it has not ended by itself soon after its last line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """Ends it, and what it started."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def say_where(self) -> None:
        """Has it write down where its threads are."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)

    def last_words(self) -> str:
        return self.words.read_text(errors="replace")[-LAST_WORDS:].strip()


def environment() -> dict[str, str]:
    """Ours, without the settings that would change what a case means."""
    kept = {"TRT_DYNAMO_FLAVOR"}
    return {name: v for name, v in os.environ.items() if not name.startswith("TRT_DYNAMO_") or name in kept}


def run_cases(
    names: Sequence[str],
    runtime: str,
    *,
    limit: float,
    files: Sequence[str] = (),
    starting: Callable[[str], None] = lambda name: None,
) -> Iterator[Result]:
    """The results, in the order of the names. `limit`: seconds for a case; `starting` is told of each as it begins."""
    left = list(names)
    with tempfile.TemporaryDirectory() as folder:
        while left:
            child = Child(left, runtime, files, Path(folder) / "words")
            try:
                for result in one_child(child, list(left), limit, starting):
                    left = [name for name in left if name != result["name"]]
                    yield result
            finally:
                child.kill()
                os.close(child.channel)


def one_child(child: Child, names: Sequence[str], limit: float, starting: Callable[[str], None]) -> Iterator[Result]:
    """What one child gives: it may end before it has come to all cases, but not before it has come to one."""
    try:
        ready = child.read(START_SECONDS)
    except TimeoutError:
        ready = None
        child.kill()
    if ready is None:
        words = f"the process for the cases did not start ({ended(child.end())}): {child.last_words()}"
        yield from (failure(name, "crashed", words) for name in names)
        return
    # It does not end between two cases, but at the end of the list; if it does all the same, the next one is to blame.
    left, current, started = [*names, AT_THE_END], "", time.monotonic()
    while True:
        try:
            line = child.read(limit)
        except TimeoutError:
            child.say_where()
            child.kill()
            words = f"no answer after {limit:g} s. Where it was:\n{child.last_words()}".strip()
            yield failure(current or left[0], "timeout", words, limit)
            return
        if line is None:
            status = child.end()
            if status or left != [AT_THE_END]:
                words = f"the process ended ({ended(status)}): {child.last_words()}"
                yield failure(current or left[0], "crashed", words, time.monotonic() - started)
            return
        if "start" in line:
            current, started = line["start"], time.monotonic()
            starting(current)
            continue
        current = ""
        left.remove(line["name"])
        yield line
        if line["lost"]:
            return


def failure(name: str, status: str, words: str, seconds: float = 0.0) -> Result:
    return {"name": name, "status": status, "error": words, "seconds": seconds}


def ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
