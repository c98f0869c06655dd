"""torch's own op database as cases: each sample of each op, traced, converted, built, evaluated, compared with
eager.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from trt_dynamo.errors import BuildError, TrtDynamoError, Unsupported
from trt_dynamo.testing import check

# Comparing results that differ from run to run, or that hold no data, says nothing.
NOT_COMPARABLE = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "bernoulli", "cauchy",
    "exponential", "geometric", "log_normal", "multinomial", "normal", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "uniform", "nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d",
    "nn.functional.alpha_dropout", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "svd_lowrank", "pca_lowrank",
}  # fmt: skip

TOLERANCES = {
    torch.float32: (2e-4, 2e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (5e-2, 5e-2),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a sample: `passed`, `unsupported` (with the reason), `wrong`, `error`, or `untraceable` (torch's
    own).
    """

    kind: str
    detail: str = ""


def ops() -> dict[str, OpInfo]:
    """The ops of torch's database whose results can be compared, by name and variant."""
    named = {f"{op.name}{'.' if op.variant_test_name else ''}{op.variant_test_name}": op for op in op_db}
    return {name: op for name, op in named.items() if op.name not in NOT_COMPARABLE}


def samples(op: OpInfo, dtype: torch.dtype, limit: int | None) -> Iterator[SampleInput]:
    """The first `limit` samples, always the same ones; none where the op does not take the dtype."""
    if dtype not in op.supported_dtypes("cpu"):
        return iter(())
    torch.manual_seed(0)
    return itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), limit)


def as_function(op: OpInfo, sample: SampleInput) -> tuple[Callable[..., Any], list[Any]]:
    """The sample as a function of its tensors alone."""
    leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def function(*given: torch.Tensor) -> Any:
        left = iter(given)
        filled = [next(left) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        first, args, kwargs = tree_unflatten(filled, spec)
        # The result is copied: a view of an input is eager's to make.
        return tree_map(lambda r: r.clone() if isinstance(r, torch.Tensor) else r, op.op(first, *args, **kwargs))

    return function, tensors


def run(
    op: OpInfo, dtype: torch.dtype, sample: SampleInput, *, dynamic: bool, build: bool, seconds: int = 60
) -> Outcome:
    """One sample, through everything but a GPU."""
    function, tensors = as_function(op, sample)
    rtol, atol = TOLERANCES.get(dtype, (None, None))
    with deadline(seconds):
        try:
            with torch.no_grad():
                function(*(t.clone() for t in tensors))
        except Exception as error:
            return Outcome("untraceable", f"eager: {type(error).__name__}: {error}"[:300])
        try:
            check(function, *tensors, dynamic=dynamic, rtol=rtol, atol=atol, build_engines=build)
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
