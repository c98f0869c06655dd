"""Long texts for people who look closely: `TORCH_TRACE` (read by tlparse), and the log at DEBUG.

Comes in: a name and a function that makes the text, which is called only where somebody asked for it. Goes out: an
artifact of torch's structured trace, and a record of the module's logger (`TORCH_LOGS=+trt_dynamo`).

torch reads TORCH_LOGS before this package exists, so names of artifacts of ours cannot be registered there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from torch._logging._internal import trace_structured
from torch.fx import GraphModule


def trace(log: logging.Logger, name: str, make: Callable[[], str]) -> None:
    """A text for the trace, as `trt_dynamo.<name>`, and for the log at DEBUG."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s:\n%s", name, make(), stacklevel=2)
    artifact(name, "string", make)


def trace_data(name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Plain data for the trace, as `trt_dynamo.<name>`."""
    artifact(name, "json", lambda: json.dumps(make(), indent=2, default=str))


def artifact(name: str, encoding: str, make: Callable[[], str]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"trt_dynamo.{name}", "encoding": encoding},
        payload_fn=make,
        expect_trace_id=False,  # an engine may be built in a thread of its own, long after the compilation
        record_logging_overhead=False,
    )


def readable(module: GraphModule) -> str:
    """The graph as code, with shapes and dtypes, and the graphs inside of it."""
    return str(module.print_readable(print_output=False))
