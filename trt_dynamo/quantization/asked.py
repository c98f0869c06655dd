"""What a caller of `quantize` asks for, and the batches that come with it: checked, with the defaults filled in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from trt_dynamo.quantization.weight_only import GROUPS

# By tool and type: the methods, the default first. A type of weights alone has "minmax" without calibration.
METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "torchao": {
        "int8": ("smooth", "minmax", "entropy", "percentile"),
        "fp8": ("minmax", "smooth", "percentile"),
        "int8wo": (),
        "int4wo": (),
    },
    "modelopt": {"int8": ("smooth", "minmax"), "fp8": ("minmax",), "int8wo": (), "int4wo": ("awq",)},
}


def called(model: Any, batch: Any) -> Any:
    """A mapping as keyword arguments, a tuple or list as positional ones, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of `quantize`, as it describes them; `method` is "" for weights alone that no batch is needed for.

    Raises:
        ValueError: a value is unknown, or has no meaning with the others.
    """

    tool: str = "torchao"
    dtype: str = "int8"
    method: str = ""
    percentile: float = 99.99
    strength: float = 0.8
    group: int | None = None
    keep: tuple[str, ...] = ()
    call: Callable[[Any, Any], Any] = called
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.tool not in METHODS:
            raise ValueError(f"tool {self.tool!r}: it is one of {', '.join(METHODS)}")
        kinds = METHODS[self.tool]
        if self.dtype not in kinds:
            raise ValueError(f"dtype {self.dtype!r}: it is one of {', '.join(kinds)}")
        self.check_method(kinds[self.dtype])
        if self.group is not None and (self.dtype not in GROUPS or self.group < 1):
            raise ValueError(f"group {self.group}: it is a number of weights, of {' and '.join(GROUPS)}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile}: it lies between 0 and 100")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength {self.strength}: it lies between 0 and 1")

    def check_method(self, methods: tuple[str, ...]) -> None:
        if not self.method and self.dtype not in GROUPS:
            object.__setattr__(self, "method", methods[0])
        if not self.method or self.method in methods:
            return
        if not methods:
            raise ValueError(f"method {self.method!r}: {self.dtype} looks at no batch")
        if (self.method, self.dtype) == ("entropy", "fp8"):
            raise ValueError("method 'entropy' compares with the evenly spaced codes of int8; for fp8 take another")
        raise ValueError(f"method {self.method!r}: of {self.tool}'s {self.dtype} it is one of {', '.join(methods)}")

    def batches(self, loader: Iterable[Any] | None) -> Iterable[Any] | None:
        """The loader, or None where no batch is needed.

        Raises:
            ValueError: there is none, and batches are needed.
        """
        if loader is None and self.method:
            raise ValueError(f"{self.dtype} is calibrated with batches: give a loader")
        return loader if self.method else None


def with_first(loader: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them.

    Raises:
        ValueError: there is none.
    """
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("the loader gave no batch: an iterator can be used only once") from None
    return first, itertools.chain([first], batches)
