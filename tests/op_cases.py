"""torch's own databases of operators and modules as cases: each is traced, converted, built, evaluated, and compared
with eager.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from trt_dynamo.errors import BuildError, TrtDynamoError, Unsupported
from trt_dynamo.partition import partition
from trt_dynamo.settings import Settings
from trt_dynamo.testing import check, evaluate, trace

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "bool")
EXPECTATIONS = Path(__file__).parent / "op_expectations.json"

# Their results differ from run to run, or hold no data: what is asked of them is that no engine makes them up.
NOT_COMPARABLE = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "bernoulli", "cauchy",
    "exponential", "geometric", "log_normal", "multinomial", "normal", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "uniform", "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d",
    "nn.functional.alpha_dropout", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "svd_lowrank", "pca_lowrank",
    "nn.FractionalMaxPool2d", "nn.FractionalMaxPool3d",
}  # fmt: skip

# Which of several equal values they point at is nowhere promised: they get values of which no two are equal.
TIED = {"argsort", "kthvalue", "median", "mode", "msort", "nanmedian", "sort", "topk"}

TOLERANCES = {
    torch.float32: (2e-4, 2e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (5e-2, 5e-2),
    torch.complex64: (2e-4, 2e-5),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of tensors, under the name of the op or module that it calls."""

    name: str
    function: Callable[..., Any]
    tensors: Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: `passed`, `unsupported` (with the reason), `wrong`, `error`, or `untraceable` (torch's
    own).
    """

    kind: str
    detail: str = ""


@functools.cache
def ops() -> dict[str, OpInfo]:
    """torch's database of ops, by name and variant."""
    return {f"{op.name}{'.' if op.variant_test_name else ''}{op.variant_test_name}": op for op in op_db}


@functools.cache
def modules() -> dict[str, ModuleInfo]:
    """torch's database of modules, by name."""
    return {info.name: info for info in module_db}


@functools.cache
def expectations() -> dict[str, Any]:
    """What is known of each op, as `python -m benchmarks.op_coverage --write` found it."""
    found: dict[str, Any] = json.loads(EXPECTATIONS.read_text())
    return found


def names() -> list[str]:
    return [*ops(), *modules()]


def cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """All cases of an op or module, always the same ones; none where it does not take the dtype."""
    torch.manual_seed(0)
    if name in ops():
        return op_cases(name, dtype) if dtype in ops()[name].supported_dtypes("cpu") else iter(())
    return module_cases(name, dtype) if dtype in modules()[name].dtypes else iter(())


def case_at(name: str, dtype: torch.dtype, position: int) -> Case | None:
    """The case at a position, counted from the start again where there are fewer; None where there is none."""
    found = list(itertools.islice(cases(name, dtype), position + 1))
    return found[position % len(found)] if found else None


def op_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    op = ops()[name]
    for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
        x = distinct(sample.input) if op.name in TIED else sample.input
        yield as_case(name, op.op, (x, *sample.args), sample.kwargs)


def distinct(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype in random order, without equal values as far as the dtype has enough."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.randperm(x.numel()).to(torch.int16).view(x.dtype).reshape(x.shape)
    if x.dtype is torch.bool:
        return x[:16] if x.ndim == 1 else x  # eager keeps the order of few elements
    return torch.randperm(x.numel()).to(x.dtype).reshape(x.shape)


def module_cases(name: str, dtype: torch.dtype) -> Iterator[Case]:
    info = modules()[name]
    for given in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=False):
        made = given.constructor_input
        module: torch.nn.Module = info.module_cls(*made.args, **made.kwargs).to(dtype).eval()
        call = given.forward_input
        if call is None:
            continue
        if name.startswith("nn.Lazy"):
            module(*call.args, **call.kwargs)  # now it has its parameters
        yield as_case(name, module, call.args, call.kwargs)


def as_case(name: str, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Case:
    """The call as a function of its tensors alone."""
    leaves, spec = tree_flatten((tuple(args), kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def function(*given: torch.Tensor) -> Any:
        left = iter(given)
        filled = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(filled, spec)
        # The result is copied: a view of an input is eager's to make.
        return tree_map(lambda r: r.clone() if isinstance(r, torch.Tensor) else r, call(*args, **kwargs))

    return Case(name, function, tensors)


def run(case: Case, dtype: torch.dtype, *, dynamic: bool, build: bool, seconds: int = 60) -> Outcome:
    """One case, through everything but a GPU.

    torch's fused transformer kernels, which compute other numbers for padding, are `test_fast_paths.py`'s.
    """
    with deadline(seconds), fused_kernels_off():
        try:
            with torch.no_grad():
                case.function(*(t.clone() for t in case.tensors))
        except Exception as error:
            return Outcome("untraceable", f"eager: {type(error).__name__}: {error}"[:300])
        try:
            if case.name in NOT_COMPARABLE:
                take_apart(case, dynamic=dynamic)
            else:
                compare(case, dtype, dynamic=dynamic, build=build)
        except Unsupported as error:
            return Outcome("unsupported", str(error))
        except AssertionError as error:
            return Outcome("wrong", str(error)[:600])
        except BuildError as error:
            return Outcome("error", f"BuildError: {error}"[:600])
        except TrtDynamoError as error:
            return Outcome("error", f"{type(error).__name__}: {error}"[:600])
        except TimeoutError:
            return Outcome("error", f"took longer than {seconds} s")
        except Exception as error:
            return Outcome("untraceable", f"{type(error).__name__}: {error}"[:300])
    return Outcome("passed")


def compare(case: Case, dtype: torch.dtype, *, dynamic: bool, build: bool) -> None:
    """Raises AssertionError where the results are not eager's.

    In a half type they may also be those of float32, rounded, or as near to them as eager's are: kernels that compute
    in the half type itself are further off than ours.
    """
    rtol, atol = tolerance(case.name, dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        check(case.function, *case.tensors, dynamic=dynamic, rtol=rtol, atol=atol, build_engines=build)
        return
    assert rtol is not None and atol is not None
    checked = evaluate(case.function, *case.tensors, dynamic=dynamic, build_engines=build)
    with torch.no_grad():
        eager = tree_flatten(case.function(*(t.clone() for t in case.tensors)))[0]
        exact = in_float32(case)
    for mine, its, best in zip(checked.results, eager, exact or eager, strict=True):
        if isinstance(its, torch.Tensor) and its.is_floating_point():
            assert_near(mine, its, best, rtol, atol)
        else:
            torch.testing.assert_close(mine, its, rtol=0, atol=0)


def tolerance(name: str, dtype: torch.dtype) -> tuple[float | None, float | None]:
    known = expectations()["tolerances"].get(name, {}) if EXPECTATIONS.is_file() else {}
    rtol, atol = known.get(str(dtype).removeprefix("torch."), TOLERANCES.get(dtype, (None, None)))
    return rtol, atol


def in_float32(case: Case) -> list[Any] | None:
    """The results of the case with its half types as float32; None where it cannot be computed so."""
    try:
        tensors = [t.float() if t.is_floating_point() else t.clone() for t in case.tensors]
        return list(tree_flatten(case.function(*tensors))[0])
    except Exception:
        return None


def assert_near(mine: torch.Tensor, its: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> None:
    best = exact.to(its.dtype) if exact.shape == its.shape else its
    off, offs = (mine.double() - best.double()).abs(), (its.double() - best.double()).abs()
    largest = torch.where(offs.isfinite(), offs, 0).max() if offs.numel() else 0
    good = torch.isclose(mine, its, rtol, atol, equal_nan=True) | torch.isclose(mine, best, rtol, atol, equal_nan=True)
    good |= off <= 2 * largest
    assert bool(good.all()), f"{int((~good).sum())} of {good.numel()} elements are off by up to {off[~good].max():.3g}"


def take_apart(case: Case, *, dynamic: bool) -> None:
    """Raises `Unsupported` where some node would stay in eager."""
    parts = partition(trace(case.function, case.tensors, dynamic=dynamic), {}, Settings(min_segment_nodes=0))
    reasons = dict.fromkeys(f"{v.target}: {v.reason}" for v in parts.verdicts if not v.ok)
    if reasons:
        raise Unsupported("; ".join(reasons))


@contextlib.contextmanager
def fused_kernels_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class deadline:
    """Raises TimeoutError in the main thread when the block takes longer than this many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self.expire)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    @staticmethod
    def expire(*_: object) -> None:
        raise TimeoutError
