"""The name `tensorrt` among torch's backends: ours through an entry point, another package's if it took it first.

torch keeps a looked-up entry point as a registered function, and a package that then registers the same name fails to
import. So ours goes back to being an entry point as soon as it has been called; `trt_dynamo` is ours in any case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

from trt_dynamo.settings import warn_once

GROUP = "torch_dynamo_backends"
SHARED, OWN = "tensorrt", "trt_dynamo"


def release_shared_name(backend: Callable[..., Any]) -> None:
    """Lets another package register `tensorrt` after ours was used under that name, without an error."""
    from torch._dynamo.backends import registry

    if registry._COMPILER_FNS.get(SHARED) is backend:
        del registry._COMPILER_FNS[SHARED]
        registry._BACKENDS[SHARED] = EntryPoint(SHARED, "trt_dynamo.backend:tensorrt", GROUP)
    # torch treats functions that stand in its table better than others.
    registry._COMPILER_FNS.setdefault(OWN, backend)
    registry._BACKENDS.setdefault(OWN, None)
    if not hasattr(backend, "_tags"):
        backend._tags = ()  # type: ignore[attr-defined]


def warn_if_taken(backend: Callable[..., Any] | None = None) -> None:
    """Says once what to write where another package holds the name `tensorrt`. Imports nothing."""
    registry = sys.modules.get("torch._dynamo.backends.registry")
    holder = registry._COMPILER_FNS.get(SHARED) if registry is not None else None
    module = getattr(holder, "__module__", None)
    if holder is not None and holder is not backend and not str(module).startswith("trt_dynamo."):
        warn_once(
            f'the backend name "{SHARED}" belongs to {module}: write backend="{OWN}" for the backend of trt_dynamo'
        )
