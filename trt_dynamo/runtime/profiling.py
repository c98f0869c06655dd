"""Names for profilers: which segment runs, and where eager answers in its place, why.

Comes in: a segment's name, at each call. Goes out: a record of torch's profiler, which is an NVTX range inside of
`torch.autograd.profiler.emit_nvtx()`; an NVTX range where the setting `nvtx` asks for one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.autograd import profiler

from trt_dynamo.errors import cut
from trt_dynamo.runtime import layer_times
from trt_dynamo.settings import Settings, warn_once

# A reason may be a whole page of TensorRT's; a name in a timeline is a line.
LONGEST_REASON = 120


def wanted() -> bool:
    """Whether anybody looks: torch's flag, which is what Inductor asks too; a record that none reads costs more than
    this by far.
    """
    return profiler._is_profiler_enabled or layer_times.collecting is not None


@contextlib.contextmanager
def marked(name: str, nvtx: bool = False) -> Iterator[None]:
    """The block under a name, for whoever looks."""
    before, layer_times.RUNNING.name = layer_times.RUNNING.name, name
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        layer_times.RUNNING.name = before


NOTHING = contextlib.nullcontext()


def named(name: str) -> contextlib.AbstractContextManager[None]:
    """The block under a name, if anybody looks."""
    return marked(name) if wanted() else NOTHING


def in_eager(name: str, reason: str) -> str:
    """What a segment is called while eager answers in its place."""
    return f"{name} in eager: {cut(' '.join(reason.split()), LONGEST_REASON)}"


def nvtx_wanted(settings: Settings) -> bool:
    """Whether ranges go to NVTX at each call; a warning where this torch has no NVTX."""
    if not settings.nvtx:
        return False
    why_not = why_no_nvtx()
    if why_not is not None:
        warn_once(f"nvtx=1, but no ranges can be made: {why_not}")
    return why_not is None


@functools.cache
def why_no_nvtx() -> str | None:
    try:
        torch.cuda.nvtx.mark("trt_dynamo")
    except RuntimeError as error:
        return str(error)
    return None
