"""TensorRT's log, bridged to `logging` (logger `trt_dynamo.tensorrt`), which remembers the errors of each thread."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trt_dynamo.trt import trt

log = logging.getLogger("trt_dynamo.tensorrt")

# Without a driver every API error is followed by this one, which says nothing about the network.
NOISE = re.compile(
    r"CUDA (initialization failure|error 35)|Cuda Runtime.*error 35|cudaError(35|InsufficientDriver)|no CUDA-capable"
)

LEVELS = {
    "INTERNAL_ERROR": logging.WARNING,
    "ERROR": logging.WARNING,
    "WARNING": logging.INFO,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG - 5,
}


class Messages(threading.local):
    """TensorRT's errors, as each thread saw them; TensorRT logs in the calling thread."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.quiet = 0


MESSAGES = Messages()


def record(severity: str, text: str) -> None:
    """One message of TensorRT: remembered if it is an error, logged in any case."""
    error = severity in ("INTERNAL_ERROR", "ERROR")
    if error and NOISE.search(text):
        log.debug("%s", text)
        return
    if error:
        MESSAGES.errors.append(text.strip())
        del MESSAGES.errors[:-50]
    # An error of the network's API becomes an exception of ours, with its text, so it is not shouted twice.
    log.log(logging.DEBUG if error and MESSAGES.quiet else LEVELS[severity], "%s", text)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collects the errors that TensorRT logs in this thread inside the block, which are logged at DEBUG only."""
    before, MESSAGES.errors = MESSAGES.errors, []
    MESSAGES.quiet += 1
    try:
        yield MESSAGES.errors
    finally:
        MESSAGES.errors = before
        MESSAGES.quiet -= 1


def last_errors() -> list[str]:
    """The errors that TensorRT logged in this thread since this was asked last, for those who ask only after a failure:
    they are logged as any other.
    """
    errors, MESSAGES.errors = MESSAGES.errors, []
    return errors


@functools.cache
def logger() -> Any:
    """The process's one `ILogger`: TensorRT keeps the first that it is given."""

    class Bridge(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            record(severity.name, msg)

    return Bridge()


def first_line(text: str, shorten: Callable[[str], str] = str.strip) -> str:
    """The part of a TensorRT error that a person wants to read: without source locations, on one line."""
    text = re.sub(r"^\[[\w:.]+\]\s*|Error Code \d+:\s*", "", text.strip())
    text = re.sub(r"\s*\(?\[?[\w/]+\.(cpp|h)::?[\w:~]*::?\d+\]?\)?", "", text)
    return shorten(" ".join(text.split()))[:300]
