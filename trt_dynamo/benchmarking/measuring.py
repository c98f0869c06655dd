"""One model in all columns. In: a `Case` and a `Request`. Out: a `Result`.

Each column is compiled, called once, compared with the model as it was given, warmed and weighed, one after the other;
then all are timed in turns. What goes wrong with one is told in its cell.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import trt_dynamo
from trt_dynamo import trt as tensorrt_module
from trt_dynamo.benchmarking import memory
from trt_dynamo.benchmarking.columns import Column, compiled, why_missing
from trt_dynamo.benchmarking.results import Cell, Result
from trt_dynamo.benchmarking.sources import Case
from trt_dynamo.benchmarking.timing import Call, Samples, Spread, calls_a_round, in_turns, timed, warm
from trt_dynamo.errors import typed_in_a_line
from trt_dynamo.reports import report
from trt_dynamo.runtime.agreement import difference
from trt_dynamo.settings import Settings
from trt_dynamo.watched_runs import in_eager, none_answered

# So much of an error's text stands in a cell.
WORDS = 200


@dataclasses.dataclass(frozen=True)
class Request:
    """What to time, and how. `dtype`: the model and its inputs are cast to it first. `options` are TensorRT's settings.
    `calls` of each column in all, or as many as fit into `seconds`.
    """

    columns: tuple[Column, ...]
    device: torch.device
    dtype: torch.dtype | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calls: int | None = None
    seconds: float = 4.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """A column that is ready to be timed; `estimate` are the seconds of a call."""

    cell: Cell
    call: Call
    estimate: float


def measure(case: Case, request: Request, told: Callable[[str], object] = lambda _: None) -> Result:
    """Times the case. `told` hears what is being done, for who watches.

    Raises:
        SettingsError: an option is unknown or does not parse.
    """
    settings = Settings.from_env().merge(request.options)
    cells = {
        column.name: Cell(column.name, column.title, missing=why_missing(column, request.device, settings) or "")
        for column in request.columns
    }
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            case = case.to(request.device)
            expected = tensors(case.model(*case.args, **case.kwargs))
            case = case.to(request.device, request.dtype)
        except Exception as error:  # noqa: BLE001  other models of the table go on
            failed = {
                name: dataclasses.replace(cell, failed=typed_in_a_line(error, WORDS)) for name, cell in cells.items()
            }
            return result_of(case, request, failed)
        fill(cells, case, expected, request, told)
    release()
    return result_of(case, request, cells)


def fill(
    cells: dict[str, Cell],
    case: Case,
    expected: Sequence[torch.Tensor],
    request: Request,
    told: Callable[[str], object],
) -> None:
    """Times all columns that are not missing."""
    trials: dict[str, Trial] = {}
    for column in request.columns:
        if cells[column.name].missing:
            continue
        told(column.title)
        try:
            trials[column.name] = prepared(cells[column.name], column, case, expected, request)
        except Exception as error:  # noqa: BLE001  its cell says so; the others go on
            cells[column.name] = dataclasses.replace(cells[column.name], failed=typed_in_a_line(error, WORDS))
            release()

    def fail(name: str, error: Exception) -> None:
        cells[name] = dataclasses.replace(cells[name], failed=typed_in_a_line(error, WORDS))

    told("in turns")
    counts = {
        name: calls_a_round(trial.estimate, calls=request.calls, seconds=request.seconds)
        for name, trial in trials.items()
    }
    functions = {name: trial.call for name, trial in trials.items()}
    for name, samples in in_turns(functions, counts, waiter(request.device), fail).items():
        cells[name] = timed_cell(trials[name].cell, samples)


def timed_cell(cell: Cell, samples: Samples) -> Cell:
    return dataclasses.replace(cell, alone=Spread.of(samples.alone), in_a_row=Spread.of(samples.in_a_row))


def prepared(cell: Cell, column: Column, case: Case, expected: Sequence[torch.Tensor], request: Request) -> Trial:
    """A column compiled, compared, warmed and weighed."""
    wait = waiter(request.device)
    before, held = report(), memory.kept(request.device)
    run = compiled(column, case.model, request.dynamic, request.options)

    def call() -> object:
        return run(*case.args, **case.kwargs)

    outcome: list[torch.Tensor] = []
    first = timed(lambda: outcome.extend(tensors(call())), wait)
    error, note = compared(outcome, expected)
    outcome.clear()
    estimate = warm(call, wait)
    weight = memory.transient(request.device, call)
    after = memory.kept(request.device)
    if weight is not None and held is not None and after is not None:
        weight += max(0, after - held)
    if column.name == "tensorrt":
        note = "; ".join(filter(None, (note, answered_by_engines(before))))
    cell = dataclasses.replace(cell, first_call=first, error=error, note=note, memory=weight)
    return Trial(cell, call, estimate)


def answered_by_engines(before: Mapping[str, Any]) -> str:
    """What eager did in their place, in words.

    Raises:
        TrtDynamoError: no engine answered.
    """
    if report()["engine_calls"] == before["engine_calls"]:
        raise none_answered(before)
    reasons = in_eager(before)
    return f"partly in eager: {'; '.join(reasons)}" if reasons else ""


def tensors(results: Any) -> list[torch.Tensor]:
    """The tensors in what a model returned, as copies: a CUDA graph writes over its results in its next call."""
    return [leaf.clone() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def compared(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> tuple[float | None, str]:
    """The largest error of the results, or None with the reason."""
    if len(results) != len(expected):
        return None, f"it gives {len(results)} tensors, the model {len(expected)}"
    if not expected:
        return None, "there are no tensors to compare"
    found = [difference(a.to(e.dtype), e) for a, e in zip(results, expected, strict=True)]
    why = next((each.why for each in found if each.why), "")
    if why:
        return None, why
    strange = sum(each.strange for each in found)
    return max(each.error for each in found), f"{strange} values are NaN or infinite" if strange else ""


def waiter(device: torch.device) -> Call:
    """Waits until the device has done all."""
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


def release() -> None:
    """Gives back what a column or model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def result_of(case: Case, request: Request, cells: Mapping[str, Cell]) -> Result:
    device = request.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    options = {key: str(value) for key, value in request.options.items()}
    options |= {"dynamic": str(request.dynamic)} if request.dynamic is not None else {}
    return Result(case.name, name, case.dtype, case.items, tuple(cells.values()), options, versions())


def versions() -> dict[str, str]:
    found = {"trt_dynamo": trt_dynamo.__version__, "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if tensorrt_module.why_missing() is None:
        found[tensorrt_module.flavor()] = tensorrt_module.version()
    return found
