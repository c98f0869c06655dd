"""What a case of the selftest is, and what it is given: a `Trial`, which compiles, compares and keeps the figures.

Comes in: functions and arguments. Goes out: an `AssertionError` where an answer is wrong or was not given by an engine,
`Skipped` where the case means nothing here; else what was measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.reports import report

Run = Callable[["Trial"], None]

# An answer may differ from eager's by `absolute + relative * |eager's|`. TF32 is off unless torch's settings allow it.
TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-3, 1e-4),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (8e-2, 8e-2),
}
TIMED_CALLS = 20


class Skipped(TrtDynamoError):
    """The case means nothing on this machine; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: `run` gets a `Trial` and raises where something is wrong."""

    name: str
    run: Run
    about: str = ""


CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Run], Run]:
    """Decorates a function of a `Trial`: it becomes the case `name`, its docstring what the case is about."""

    def add(run: Run) -> Run:
        if name in CASES:
            raise ValueError(f"there are two cases {name!r}")
        CASES[name] = Case(name, run, (run.__doc__ or "").strip().split("\n")[0])
        return run

    return add


@dataclasses.dataclass
class Figures:
    """What a case measured. `difference`: the largest from eager's answer; `used`: the largest share of the tolerance
    that an element used, above 1 where it is wrong; times in milliseconds a call, where engines ran on a GPU.
    """

    difference: float = 0.0
    used: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0
    build_seconds: float = 0.0
    engine_calls: int = 0
    eager_ms: float | None = None
    engine_ms: float | None = None


class Trial:
    """What a case works with. `runtime` is `tensorrt` or `reference`; `folder` is the case's own, empty."""

    def __init__(self, runtime: str, folder: Path) -> None:
        self.runtime = runtime
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.figures = Figures()

    def skip(self, reason: str) -> None:
        raise Skipped(reason)

    def needs_gpu(self) -> None:
        if self.device.type != "cuda":
            self.skip("needs a CUDA GPU")

    def place(self, value: Any) -> Any:
        """The tensors of a tree on the trial's device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, value)

    def compile(self, model: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
        """The model compiled so that what does not go into an engine is an error, and no call is answered without."""
        settings = {"runtime": self.runtime, "strict": True, "min_segment_nodes": 1, "rebuild": "sync", **options}
        return torch.compile(model, backend="tensorrt", dynamic=dynamic, options={"cache": "off", **settings})

    def same(
        self,
        model: Callable[..., Any],
        *args: Any,
        dynamic: bool | None = None,
        tolerance: tuple[float, float] | None = None,
        timed: bool = False,
        also: Sequence[Sequence[Any]] = (),
        **options: Any,
    ) -> Callable[..., Any]:
        """Compiles the model, and compares its answers to `args` and to each of `also` with eager's. Gives it back."""
        if isinstance(model, torch.nn.Module):
            model = model.to(self.device)
        compiled = self.compile(model, dynamic=dynamic, **options)
        for given in (args, args, *also):
            self.agree(compiled, model, *given, tolerance=tolerance)
        self.answered()
        if timed and self.runtime == "tensorrt":
            given = self.place(args)
            self.figures.eager_ms, self.figures.engine_ms = milliseconds(model, given), milliseconds(compiled, given)
        return compiled

    def agree(
        self,
        compiled: Callable[..., Any],
        model: Callable[..., Any],
        *args: Any,
        tolerance: tuple[float, float] | None = None,
    ) -> None:
        """One call, compared with eager's."""
        with torch.no_grad():
            got = compiled(*copied(self.place(args)))
            self.compare(got, model(*copied(self.place(args))), tolerance)

    def compare(self, got: Any, want: Any, tolerance: tuple[float, float] | None = None) -> None:
        """Two trees of tensors: dtypes and shapes alike, numbers within the tolerance, integers exactly."""
        found, expected = tree_flatten(got)[0], tree_flatten(want)[0]
        assert len(found) == len(expected), f"{len(found)} results; eager gives {len(expected)}"
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            if not isinstance(b, torch.Tensor):
                assert a == b, f"result {index} is {a}; eager gives {b}"
                continue
            kinds = [f"{x.dtype} {tuple(x.shape)} on {x.device.type}" for x in (a, b)]
            assert kinds[0] == kinds[1], f"result {index} is {kinds[0]}; eager gives {kinds[1]}"
            self.compare_numbers(index, a, b, tolerance)

    def compare_numbers(
        self, index: int, a: torch.Tensor, b: torch.Tensor, tolerance: tuple[float, float] | None
    ) -> None:
        relative, absolute = tolerance or TOLERANCES.get(b.dtype, (0.0, 0.0))
        if not b.is_floating_point():
            wrong = int((a != b).sum())
            assert not wrong, f"result {index}: {wrong} of {b.numel()} elements are not eager's"
            return
        wide, wanted = a.double(), b.double()
        same = (wide == wanted) | (wide.isnan() & wanted.isnan())
        apart = torch.where(same, 0.0, (wide - wanted).abs().nan_to_num(nan=torch.inf))
        share = apart / (absolute + relative * wanted.abs().nan_to_num(0.0, 0.0, 0.0))
        used, difference = (float(x.max()) if x.numel() else 0.0 for x in (share, apart))
        if used >= self.figures.used:
            self.figures.used, self.figures.difference = used, difference
            self.figures.relative, self.figures.absolute = relative, absolute
        assert used <= 1, (
            f"result {index}: {int((share > 1).sum())} of {b.numel()} elements are not eager's; the largest difference "
            f"is {difference:.3g}, {used:.3g} times what rtol={relative:g}, atol={absolute:g} allow"
        )

    def answered(self, engines: int | None = None) -> None:
        """Every call so far was an engine's; `engines`: and so many were built."""
        counts = report()
        why = "; ".join([*counts["eager_reasons"], *counts["eager_graphs"]])
        assert counts["engine_calls"], f"no engine answered: {why or 'nothing went to TensorRT'}"
        assert not counts["eager_calls"], f"{counts['eager_calls']} calls were answered in eager: {why}"
        if engines is not None:
            assert counts["engines_built"] == engines, f"{counts['engines_built']} engines were built, not {engines}"


def copied(tree: Any) -> Any:
    """The tree with clones of its tensors, their strides kept: a model may write into its arguments."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def milliseconds(function: Callable[..., Any], args: Sequence[Any]) -> float:
    """The median time of a call, the GPU waited for each time."""
    spent = []
    with torch.no_grad():
        for _ in range(TIMED_CALLS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            function(*args)
            torch.cuda.synchronize()
            spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(spent)
