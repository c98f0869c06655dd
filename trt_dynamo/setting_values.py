"""From what a user writes for a setting to its value. In: a type, a rule, a text or value. Out: the value, or an error
that says what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field holds besides its type: its sentence in the docs, its unit, its bounds, the form of its items."""

    help: str
    engine: bool = False  # the setting changes the engine, so it is part of the cache key
    unit: Literal["", "bytes"] = ""
    low: int = 0
    high: int | None = None
    item: str = ""  # what each item of a list must match,
    example: str = ""  # and what such an item looks like
    env_only: bool = False
    secret: bool = False  # never printed


def convert(kind: Any, value: Any, rule: Rule) -> Any:
    """`value` as a `kind`. TypeError or ValueError with the reason where it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return convert_choice(value, arguments)
    if origin in (typing.Union, types.UnionType) and type(None) not in arguments:
        return convert_number_or_file(value, rule)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "default")):
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, rule)
    if origin is tuple:
        return convert_list(value, rule)
    if kind is bool:
        return convert_bool(value)
    if kind is int:
        return convert_number(value, rule)
    if kind is float:
        return convert_fraction(value)
    if not isinstance(value, str | os.PathLike):
        raise TypeError("expected a text" if kind is str else "expected a folder's path")
    if kind is str:
        return str(os.fspath(value)).strip()
    return Path(value).expanduser().absolute()


def convert_choice(value: Any, choices: tuple[str, ...]) -> str:
    """One of `choices`, in any case; `on` and `off` may also be said as a bool, or as `true`, `0`, ..."""
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text not in choices and {"on", "off"} <= {*choices}:
        text = "on" if text in YES else "off" if text in NO else text
    if text not in choices:
        raise ValueError(sentences(f"expected one of {', '.join(choices)}", nearest(str(value), choices)))
    return text


def convert_list(value: Any, rule: Rule) -> tuple[str, ...]:
    """A tuple of texts, without repeats. A string is split at commas and blanks."""
    if isinstance(value, str):
        items = [item for item in re.split(r"[,\s]+", value) if item]
    elif isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        items = [str(item) for item in value if reads_as_text(item)]
        items = sorted(items) if isinstance(value, set | frozenset) else items  # a set's order differs by process
    else:
        raise TypeError(f"expected a list of texts such as {rule.example}")
    # torch itself writes an op in these ways
    items = [item.removeprefix("torch.ops.").replace("::", ".") for item in items]
    for item in items:
        if not re.fullmatch(rule.item, item):
            raise ValueError(f"{item!r} is not of the form {rule.example}")
    return tuple(dict.fromkeys(items))


def reads_as_text(item: Any) -> bool:
    """Whether an item of a list is a text, a version such as 8.6, or one of torch's ops. TypeError if it is none."""
    if isinstance(item, str | float) or type(item).__name__ in ("OpOverload", "OpOverloadPacket"):
        return True
    raise TypeError(f"expected texts in the list, not {item!r}")


def convert_bool(value: Any) -> bool:
    """A bool, or a word or digit for one."""
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text not in YES + NO:
        raise ValueError(f"expected one of {', '.join(YES + NO)}")
    return text in YES


def convert_number(value: Any, rule: Rule) -> int:
    """A whole number within the rule's bounds; a size in bytes may bear a unit (K, M, G, T: powers of 1024)."""
    pattern = r"(\d+)" if not rule.unit else r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?"
    expected = "a size such as 500MB or 20GB, or a number of bytes" if rule.unit else "a whole number"
    if rule.high is not None:
        expected += f" from {rule.low} to {rule.high}"
    elif rule.low:
        expected += f", {rule.low} or more"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    match = None if isinstance(value, bool) else re.fullmatch(pattern, digits(value), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"expected {expected}")
    number = int(Fraction(match[1]) * UNITS[match[2].upper() if rule.unit else ""])
    if number < rule.low or (rule.high is not None and number > rule.high):
        raise ValueError(f"expected {expected}")
    return number


def convert_fraction(value: Any) -> float:
    """A finite number above 0."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, str | float | int) else parsed(value)
    if not 0 < number < math.inf:
        raise ValueError("expected a number above 0, such as 0.001")
    return number


def parsed(value: str | float) -> float:
    """The number; NaN for a text that is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def convert_number_or_file(value: Any, rule: Rule) -> int | Path:
    """A whole number within the rule's bounds, or the absolute path of a `.json` file."""
    if isinstance(value, str | os.PathLike) and os.fspath(value).strip().lower().endswith(".json"):
        return Path(os.fspath(value).strip()).expanduser().absolute()
    try:
        return convert_number(value, rule)
    except ValueError as error:
        raise ValueError(f"{error}, or the path of a .json file") from None


def digits(value: Any) -> str:
    """A number or a text as a text; nothing for what is neither."""
    if isinstance(value, str):
        return value.strip()
    try:
        return str(operator.index(value))
    except TypeError:
        return ""


def nearest(text: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?`, or nothing where no choice is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(text.strip().lower().replace("-", "_"), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""


def sentences(*parts: str) -> str:
    """The parts that are not empty, each ended like a sentence, those after the first with a capital."""
    first, *rest = (part if part.endswith(("?", ".")) else f"{part}." for part in parts if part)
    return " ".join([first, *(part[0].upper() + part[1:] for part in rest)])
