"""Ranges of sizes from real traffic: `record_shapes` notes what a model is called with, a JSON file keeps it.

Comes in: calls of a model. Goes out: for each tensor argument, by name, the smallest, most frequent and largest size of
each dim. `trt_dynamo.known_ranges` gives these to the engines.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import json
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from trt_dynamo.errors import SettingsError
from trt_dynamo.profiles import LARGEST, Range


@dataclasses.dataclass(frozen=True)
class Dims:
    """The ranges of an input's dims, by number; `rank` is how many dims there are, None where only some are known."""

    ranges: Mapping[int, Range]
    rank: int | None = None


Ranges: TypeAlias = dict[str, Dims]  # by the name of the input

# What `RecordedShapes.apply` said, by the module or function.
APPLIED: MutableMapping[Any, Ranges] = weakref.WeakKeyDictionary()


class RecordedShapes:
    """The shapes that a model was called with. An input's name is that of the parameter of `forward` (or of the
    function), with a dot and an index, key or field for each container that it lies in: `x`, `batch.mask`, `images.0`.
    """

    def __init__(self, model: Callable[..., Any] | None = None) -> None:
        self.model = model  # what is called, uncompiled
        self.signature = None if model is None else signature_of(model)
        self.lock = threading.Lock()
        self.calls = 0
        self.shapes: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
        self.given: Ranges = {}  # what a file says

    def note(self, *args: Any, **kwargs: Any) -> None:
        """Notes the shapes of one call with these arguments; runs nothing."""
        if self.signature is None:
            raise TypeError("these shapes were read from a file; record_shapes(model) gives what can note more")
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:  # the call itself will say what is wrong
            return
        found = [pair for name, value in bound.arguments.items() for pair in tensors_in(name, value)]
        with self.lock:
            self.calls += 1
            self.shapes.update((path, tuple(tensor.shape)) for path, tensor in found)

    @property
    def known(self) -> Ranges:
        """A `Range` for each dim of each input, as far as known. An input that came with several ranks has none."""
        by_name: dict[str, dict[tuple[int, ...], int]] = {}
        for (name, shape), count in self.shapes.items():
            by_name.setdefault(name, {})[shape] = count
        found = dict(self.given)
        for name, shapes in by_name.items():
            if len({len(shape) for shape in shapes}) == 1:
                rank = len(next(iter(shapes)))
                found[name] = Dims({axis: range_seen(shapes, axis) for axis in range(rank)}, rank)
        return found

    @property
    def ranges(self) -> dict[str, Any]:
        """The same as plain data, as it stands in the file: for each input a list with an int or a dict of `min`,
        `opt` and `max` for each dim; a dict by dim where not all are known.
        """
        return {name: plain(dims) for name, dims in self.known.items()}

    def save(self, file: str | Path) -> None:
        """Writes the ranges to a JSON file, to be read and edited by people too."""
        lines = [f"  {json.dumps(name)}: {json.dumps(dims)}" for name, dims in self.ranges.items()]
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, file: str | Path) -> RecordedShapes:
        """What `save` wrote, or somebody by hand.

        Raises:
            SettingsError: there is no such file, or it does not say ranges; the text says what to change.
        """
        found = cls()
        found.given = read_ranges(Path(file))
        return found

    def apply(self, model: Callable[..., Any] | None = None) -> None:
        """Makes these the ranges of every later compilation of the model (the one that was recorded, unless given), in
        this process. What was compiled before stays as it is.

        Raises:
            TypeError: there is no model to apply them to.
        """
        target = self.model if model is None else original(model)
        if target is None:
            raise TypeError("these shapes were read from a file: give the model that they are for, apply(model)")
        APPLIED[target] = self.known

    def __str__(self) -> str:
        return "\n".join(f"{name}: {dims}" for name, dims in self.ranges.items())


@contextlib.contextmanager
def record_shapes(model: Callable[..., Any]) -> Iterator[RecordedShapes]:
    """Notes the shapes of all tensors that the model is called with inside of the `with` block.

    `model` is a module, compiled or not, or what `torch.compile` made of a function. Calls that Dynamo inlines into a
    larger graph are not seen: record what is called.

    Raises:
        TypeError: a plain function, whose calls nobody can see; `note` of the recorder takes them one by one.
    """
    recorded = RecordedShapes(original(model))
    with watched(model, torch._dynamo.disable(recorded.note)):
        yield recorded


@contextlib.contextmanager
def watched(model: Any, note: Callable[..., None]) -> Iterator[None]:
    """Has every call of the model tell `note` its arguments first."""
    if isinstance(model, nn.Module) and getattr(model, "_compiled_call_impl", None) is None:
        handle = model.register_forward_pre_hook(lambda _, args, kwargs: note(*args, **kwargs), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    if isinstance(model, nn.Module):  # after `model.compile()`, whose graph would take hooks in
        run: Any = model._compiled_call_impl
        model._compiled_call_impl = noting(run, note)
        try:
            yield
        finally:
            model._compiled_call_impl = run
        return
    cell = called_by(model)
    run = cell.cell_contents
    cell.cell_contents = noting(run, note)
    try:
        yield
    finally:
        cell.cell_contents = run


def noting(run: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return run(*args, **kwargs)

    # Dynamo must trace what is called here, not this.
    skipped: Callable[..., Any] = torch._dynamo.disable(call, recursive=False)
    return skipped


def called_by(function: Callable[..., Any]) -> types.CellType:
    """Where `torch.compile`'s wrapper of a function keeps the function that it runs."""
    inner = getattr(function, "_torchdynamo_orig_callable", None)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(function, "__closure__", None) or (), strict=True))
    if inner is None or "fn" not in cells:
        raise TypeError(
            "record_shapes takes a module, or what torch.compile made of a function; for any other callable call "
            "note(...) of trt_dynamo.RecordedShapes(function) beside it"
        )
    cell: types.CellType = cells["fn"]
    return cell


def original(model: Any) -> Any:
    """What was compiled; a module in place of its bound method."""
    while (inner := vars_of(model).get("_orig_mod") or vars_of(model).get("_torchdynamo_orig_callable")) is not None:
        model = inner
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else model


def vars_of(model: Any) -> Mapping[str, Any]:
    """The attributes of the object's own, a registered module among them."""
    own = getattr(model, "__dict__", {})
    return {**own.get("_modules", {}), **own} if isinstance(own, Mapping) else {}


def signature_of(model: Any) -> inspect.Signature:
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in a value made of lists, tuples, mappings and dataclasses, each with its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(f"{name}.{index}", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(f"{name}.{field.name}", getattr(value, field.name))


def range_seen(shapes: Mapping[tuple[int, ...], int], axis: int) -> Range:
    """The range of one dim over these shapes and counts; `opt` is the size that came most, the largest of equals."""
    counts: collections.Counter[int] = collections.Counter()
    for shape, count in shapes.items():
        counts[shape[axis]] += count
    return Range(min(counts), max(counts, key=lambda size: (counts[size], size)), max(counts))


def plain(dims: Dims) -> Any:
    data = {
        axis: span.min if span.min == span.max else {"min": span.min, "opt": span.opt, "max": span.max}
        for axis, span in dims.ranges.items()
    }
    return list(data.values()) if dims.rank is not None else {str(axis): span for axis, span in data.items()}


def read_ranges(file: Path) -> Ranges:
    """The ranges in a JSON file.

    Raises:
        SettingsError: as `RecordedShapes.load` says.
    """
    try:
        data = json.loads(file.read_text())
    except OSError as error:
        raise SettingsError(
            f"the file of ranges {file} cannot be read ({error.strerror}): record_shapes makes one, or unset profiles"
        ) from None
    except ValueError as error:
        raise SettingsError(
            f"the file of ranges {file} is no JSON ({error}): record it anew or mend that place"
        ) from None
    if not isinstance(data, dict):
        raise SettingsError(
            f'the file of ranges {file} must hold an object such as {{"x": [{{"min": 1, "max": 8}}, 3]}}'
        )
    return {name: dims_given(dims, f"{file}: {name}") for name, dims in data.items()}


def dims_given(dims: Any, where: str) -> Dims:
    if isinstance(dims, Mapping):
        wrong = [axis for axis in dims if not str(axis).isdecimal()]
        if wrong:
            raise SettingsError(f"{where}: {wrong[0]!r} is no dim; a dim is a number from 0, as a text")
        return Dims({int(axis): range_given(span, f"{where}, dim {axis}") for axis, span in dims.items()})
    if isinstance(dims, Sequence) and not isinstance(dims, str):
        spans = {axis: range_given(span, f"{where}, dim {axis}") for axis, span in enumerate(dims)}
        return Dims(spans, len(spans))
    raise SettingsError(f"{where}: expected a list with a range or a size for each dim, not {dims!r}")


def range_given(span: Any, where: str) -> Range:
    """`{"min": 1, "opt": 8, "max": 32}`, `opt` may be left out; or one size."""
    if is_size(span):
        return Range(span, span, span)
    if not isinstance(span, Mapping) or not {"min", "max"} <= span.keys() <= {"min", "opt", "max"}:
        raise SettingsError(f'{where}: expected a size, or {{"min": 1, "opt": 8, "max": 32}}, not {span!r}')
    ends = (span["min"], span.get("opt", span["max"]), span["max"])
    if not all(is_size(end) for end in ends):
        raise SettingsError(f"{where}: min, opt and max must be whole numbers from 0 to {LARGEST}, not {span!r}")
    if not ends[0] <= ends[1] <= ends[2]:
        raise SettingsError(f"{where}: it must be that min <= opt <= max, and {span!r} is not so")
    return Range(*ends)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
