"""Our ops, defined for `torch.export.load` as soon as both torch and trt_dynamo are imported, in whatever order.
Nothing comes in or goes out. trt_dynamo must not import torch by itself, which takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the other finders do, and defines the ops when it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for each in others if (found := each.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_define(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            try:
                importlib.import_module("trt_dynamo.engine_op")
            except (
                ImportError,
                AttributeError,
                RuntimeError,
            ) as error:  # torch itself works
                logging.getLogger(__name__).warning("programs with engines cannot be loaded: %s", error)

        spec.loader.exec_module = execute_and_define  # type: ignore[method-assign]
        return spec


def define_ops() -> None:
    """Defines the ops now where torch is imported, else when it is."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, AfterTorch())
    elif hasattr(sys.modules["torch"], "library"):  # it has come so far
        importlib.import_module("trt_dynamo.engine_op")
