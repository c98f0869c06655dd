"""The text of docs/operators.md: core ATen, what stays in eager and why, and every converter."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import torch
from torch._ops import OpOverload

from trt_dynamo.aten_converters import CONVERTERS
from trt_dynamo.aten_converters.data_dependent import FULL_TENSORRT_ONLY, NO_ENGINE
from trt_dynamo.aten_converters.left_to_eager import LEFT, RANDOM, why_none
from trt_dynamo.lowering.decompositions import torch_table
from trt_dynamo.lowering.pairs import RULES

HEAD = """\
<!-- Made by `make docs`, that is `python -m trt_dynamo ops --markdown`. -->

# Operators

An op runs in TensorRT when it has a converter, or is taken apart into ops that have one. Whether a converter takes a
call is decided call by call: `trt_dynamo.explain` names the nodes that stay in eager, each with its reason.
[Custom operators](custom_operators.md) says how to add a converter.
"""

CORE = """
## Core ATen

torch {version} tags {total} overloads as core:

| | overloads |
| --- | --- |
| with a converter | {converter} |
| taken apart, made arithmetic of reals, or freed of mutation before conversion | {decomposed} |
| sizes: computed by Python, or from the shapes of the network's inputs | {size} |
| in eager | {eager} |

These stay in eager, all of them or on one of the two TensorRTs:

| overload | TensorRT | TensorRT for RTX |
| --- | --- | --- |
"""

LEFT_HEAD = """
## Left to eager

Beside what nobody has asked for yet, these ops have no converter, for a reason:

| ops | reason |
| --- | --- |
"""

CONVERTERS_HEAD = """
## With a converter

{operators} ATen operators, {overloads} overloads; the third column is the file in `trt_dynamo/aten_converters/`.

| operator | overloads | converted in |
| --- | --- | --- |
"""


def converted() -> list[tuple[str, list[str], str]]:
    """Operator, its overloads and the module of their converter, by name."""
    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for target, converter in CONVERTERS.items():
        module = converter.function.__module__.removeprefix("trt_dynamo.aten_converters.")
        groups[str(target.overloadpacket), module].append(target._overloadname)
    return [(op, sorted(names), module) for (op, module), names in sorted(groups.items())]


def core_overloads() -> Iterator[OpOverload]:
    """The ATen overloads that torch tags as core, by name."""
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace == "aten" and hasattr(torch.ops.aten, packet):
            op = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
            if isinstance(op, OpOverload) and torch.Tag.core in op.tags:
                yield op


def way_of(op: OpOverload) -> str:
    """What becomes of a core overload: `converter`, `decomposed`, `size` or `eager`."""
    if op in CONVERTERS:
        return "converter"
    if op.overloadpacket.__name__.startswith("sym_"):
        return "size"
    # AOTAutograd makes `x.op(out=y)` of `op` and a copy.
    functional = op._overloadname == "out" and op.overloadpacket.default in CONVERTERS
    return "decomposed" if op in torch_table() or op in RULES or functional else "eager"


def table(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def operators_page() -> str:
    """The page, whole, for the torch that is installed."""
    ways = {op: way_of(op) for op in core_overloads()}
    counts = {way: list(ways.values()).count(way) for way in ("converter", "decomposed", "size", "eager")}
    version = ".".join(torch.__version__.split(".")[:2])
    eager = [(f"`{op}`", why_none(op), "the same") for op, way in ways.items() if way == "eager"]
    eager += [(f"`{op}`", "a converter", NO_ENGINE) for op in ways if op in FULL_TENSORRT_ONLY]
    left = [(", ".join(f"`{name}`" for name in sorted(names.split())), reason) for reason, names in LEFT.items()]
    left.append(("random numbers", RANDOM))
    return (
        HEAD
        + CORE.format(version=version, total=len(ways), **counts)
        + table(eager)
        + LEFT_HEAD
        + table(left)
        + converters_part()
    )


def converters_part() -> str:
    """The table of converters, with its heading; it is the same for every torch."""
    rows = converted()
    head = CONVERTERS_HEAD.format(operators=len({op for op, _, _ in rows}), overloads=sum(len(o) for _, o, _ in rows))
    return head + table([(f"`{op}`", ", ".join(f"`{o}`" for o in names), f"`{where}`") for op, names, where in rows])
