"""Compilations that other threads' calls do not fall over.

While AOTAutograd traces in one thread, a flag of torch.fx says so for the whole process, and what `torch.compile` made
raises when another thread calls it, unless `torch.compiler.is_compiling()`. From torch 2.13 on Dynamo sees to that for
each compilation; torch 2.11 does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compile_session() -> Iterator[None]:
    """`torch.compiler.is_compiling()` holds inside, as newer versions of Dynamo have it. Dynamo compiles one graph at a
    time, so the sessions of two threads never overlap.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
