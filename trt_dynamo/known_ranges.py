"""Gives recorded ranges to the symbols of a graph that Dynamo hands over, and has Dynamo make symbols where it did not.

Comes in: Dynamo's graph and its inputs. Goes out: ranges declared to the graph's ShapeEnv; or a restart of Dynamo's
analysis, so that one graph serves all recorded sizes from the first call on.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._guards import CompileContext
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from trt_dynamo.errors import SettingsError
from trt_dynamo.profiles import Dim, Range, declare, dim_of, shape_env_of, solved
from trt_dynamo.recorded_shapes import APPLIED, Dims, Ranges, original, read_ranges, signature_of, tensors_in
from trt_dynamo.settings import Settings, warn_once

log = logging.getLogger(__name__)

RESUMED = "torch_dynamo_resume_in"  # what Dynamo calls the rest of a function after a graph break
MARKS = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")


class Restart(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Has Dynamo trace the frame again. The first is the one restart that it lets a backend ask for; after the second
    it forgets where the trace before went, which with symbols may be another way.
    """


def use_known_ranges(module: GraphModule, inputs: Sequence[Any], settings: Settings) -> None:
    """Declares what is known of the sizes of the graph's inputs, from `RecordedShapes.apply` or from the file that the
    setting `profiles` names.

    Raises:
        Restart: Dynamo shall trace again, with symbols for the dims that are known to vary.
    """
    REQUESTS.take_back()
    frame = traced_frame()
    if frame is None or (settings.profiles_file is None and not APPLIED):
        return
    model, arguments = called_with(frame)
    known = applied_to(model, frame.f_code) or from_file(settings.profiles_file)
    names = {id(tensor): path for name, value in arguments.items() for path, tensor in tensors_in(name, value)}
    found: dict[sympy.Symbol, Range] = {}
    values = []
    for node, arg in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        value, name = node.meta.get("example_value"), names.get(id(arg), "")
        if not isinstance(value, torch.Tensor) or name not in known:
            continue
        for axis, span in dims_known(name, value, known[name]):
            dim = dim_of(value.shape[axis])
            if isinstance(dim, int):
                REQUESTS.consider(arg, name, axis, dim, span)
            else:
                values.append(value)
                join(found, dim, span)
    REQUESTS.send()
    if found:
        declare(shape_env_of(values), found)


class Requests(threading.local):
    """The dims for which this thread asks Dynamo for symbols. Dynamo reads that off attributes of the caller's tensors,
    which are removed as soon as it has.
    """

    def __init__(self) -> None:
        self.made: list[tuple[torch.Tensor, int, str]] = []
        self.fresh: list[tuple[torch.Tensor, str]] = []  # the attributes that the tensors did not have before
        self.next: list[tuple[torch.Tensor, int, str]] = []
        self.compilation: Any = None
        self.before: set[tuple[str, int]] = set()
        self.refused: set[tuple[str, int]] = set()

    def take_back(self) -> None:
        for tensor, axis, _ in self.made:
            getattr(tensor, MARKS[0], set()).discard(axis)
        for tensor, mark in self.fresh:
            vars(tensor).pop(mark, None)
        same = CompileContext.current_compile_id() == self.compilation
        self.compilation = CompileContext.current_compile_id()
        self.before = {(name, axis) for _, axis, name in self.made if same}
        self.refused = self.refused if same else set()
        self.made, self.next, self.fresh = [], [], []

    def consider(self, tensor: torch.Tensor, name: str, axis: int, size: int, span: Range) -> None:
        """Asks for a symbol if the dim is known to vary and Dynamo may do it: sizes 0 and 1 are graphs of their own."""
        if (name, axis) in self.before:  # it was asked, and the model makes a constant of it
            self.refused.add((name, axis))
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
        if plain and span.min < span.max and size >= 2 and (name, axis) not in self.refused and may_vary():
            self.next.append((tensor, axis, name))

    def send(self) -> None:
        self.made, self.next = self.next, []
        if not self.made:
            return
        tensors = {id(tensor): tensor for tensor, _, _ in self.made}.values()
        self.fresh = [(tensor, mark) for tensor in tensors for mark in MARKS if not hasattr(tensor, mark)]
        for tensor, axis, _ in self.made:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        log.debug("asking Dynamo for symbols: %s", ", ".join(f"{name}, dim {axis}" for _, axis, name in self.made))
        raise Restart(restart_reason="sizes that are known to vary")


REQUESTS = Requests()


def may_vary() -> bool:
    """Whether `torch.compile` was not told `dynamic=False`."""
    config = torch._dynamo.config
    return bool(config.automatic_dynamic_shapes or not config.assume_static_by_default)


def traced_frame() -> Any:
    """What Dynamo keeps of the frame that it traces in this thread, if it is one that the user calls."""
    convert = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(getattr(convert, "tls", None), "current_tx", None)
    frame = getattr(getattr(translator, "output", None), "root_tx", None)
    return None if frame is None or frame.f_code.co_name.startswith(RESUMED) else frame


def called_with(frame: Any) -> tuple[Any, Mapping[str, Any]]:
    """The module or function that is compiled, where the frame tells, and its arguments by the names that `signature`
    gives them: the frame may be that of a decorator, or of Dynamo's own `inner(*args, **kwargs)`.
    """
    code, values = frame.f_code, dict(frame.f_locals)
    count = code.co_argcount
    named = code.co_varnames[: count + code.co_kwonlyargcount]
    rest = list(code.co_varnames[len(named) :])
    positional = [values[name] for name in named[:count] if name in values]
    keywords = {name: values[name] for name in named[count:] if name in values}
    if code.co_flags & inspect.CO_VARARGS:
        positional += values.get(rest.pop(0), ())
    if code.co_flags & inspect.CO_VARKEYWORDS:
        keywords |= values.get(rest.pop(0), {})
    model = None
    first = positional[0] if positional else None
    if isinstance(first, torch.nn.Module) and ("self" in named[:1] or is_forward(code, first)):
        model = positional.pop(0)
    elif "fn" in code.co_freevars:
        model = original(values.get("fn"))
    try:
        return model, signature_of(model).bind(*positional, **keywords).arguments
    except (TypeError, ValueError):
        return model, {name: value for name, value in values.items() if name != "self"}


def is_forward(code: Any, model: torch.nn.Module) -> bool:
    """Whether the code is that of the module's `forward`, or of a decorator around it."""
    function: Any = getattr(model.forward, "__func__", model.forward)
    while function is not None and getattr(function, "__code__", None) is not code:
        function = getattr(function, "__wrapped__", None)
    return function is not None


def applied_to(model: Any, code: Any) -> Ranges | None:
    """What was applied to the module or function, or to the function with this code."""
    for target, ranges in list(APPLIED.items()):
        if target is model or getattr(target, "__code__", None) is code:
            return ranges
    return None


def from_file(file: Path | None) -> Ranges:
    """The ranges in the file; none, and a warning, where they cannot be had."""
    if file is None:
        return {}
    try:
        stat = file.stat() if file.is_file() else None
        return read_once(file, stat and (stat.st_mtime_ns, stat.st_size))
    except SettingsError as error:
        warn_once(f"{error}. Ranges are made by the usual rule.")
        return {}


@functools.lru_cache(maxsize=8)
def read_once(file: Path, version: Any) -> Ranges:
    """The file's ranges; it is read anew when its `version` is another."""
    return read_ranges(file)


def dims_known(name: str, value: torch.Tensor, dims: Dims) -> Iterator[tuple[int, Range]]:
    """The dims of an input with their ranges; none, and a warning, where they are not those of this tensor."""
    rank = max(dims.ranges, default=-1) + 1 if dims.rank is None else dims.rank
    if rank > value.ndim or dims.rank not in (None, value.ndim):
        warn_once(f"the ranges for {name} are of {rank} dims, it has {value.ndim}: record them anew. It has none now.")
        return
    for axis, span in dims.ranges.items():
        size = dim_of(value.shape[axis])
        if isinstance(size, int) and span.min == span.max != size:
            warn_once(f"dim {axis} of {name} is {size}, and always {span.min} say the ranges: record them anew")
        yield axis, span


def join(found: dict[sympy.Symbol, Range], dim: Dim, span: Range) -> None:
    """Adds the range of a dim to that of its symbol, if it tells one; equal dims get one range that holds both."""
    ends = [solved(dim, number) for number in (span.min, span.opt, span.max)]
    known = [end for end in ends if end is not None]
    if len(known) < len(ends):
        return
    symbol, low, opt, high = known[0][0], *(number for _, number in known)
    old = found.get(symbol)
    new = Range(low, opt, high) if old is None else Range(min(low, old.min), max(opt, old.opt), max(high, old.max))
    found[symbol] = new
