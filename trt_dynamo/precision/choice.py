"""Which nodes of a segment compute in a half type, and why the others do not.

Comes in: a segment's graph in the model's own dtypes, which must not change. Goes out: a `Choice`. Only what is float32
is ever lowered; what is half, double, complex, an integer or a bool stays what it is.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from trt_dynamo.aten_converters.left_to_eager import STAYS_FLOAT32
from trt_dynamo.aten_converters.tensor import holds
from trt_dynamo.aten_converters.walker import getattr_path
from trt_dynamo.precision.keep import kept_by
from trt_dynamo.precision.magnitudes import INEXACT, NAMES, weight_misfit
from trt_dynamo.precision.tables import PLACES, Role, packet_of, role_of

# How an op's schema calls what may be a number to compute with; `x + 1` is the overload for tensors.
NUMBER_TYPES = ("number", "Optional[number]", "float", "Optional[float]", "Tensor", "Optional[Tensor]")

SMALL_INTEGERS = (torch.bool, torch.uint8, torch.int8)


class Kind(enum.Enum):
    """What may be done to a float32 value. Of the kinds of its operands an op takes the first in this order."""

    EXACT = "must not be rounded, not even for a matrix product"
    SMALL = "must not be rounded, but where it is added to a product"
    WIDE = "stays in float32 between matrix products"
    INPUT = "comes in as float32"
    LOW = "is held in the half type"
    FREE = "is computed in float32, and may be rounded"
    CONSTANT = "is what its readers want it to be"


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """`low` is the half type, `nodes` compute in it; `reasons` says of others why not, where that is not their table's
    word. `kinds` has the kind of each float32 value.
    """

    low: torch.dtype
    nodes: frozenset[Node]
    reasons: Mapping[Node, str]
    kinds: Mapping[Node, Kind]


def choose(
    module: GraphModule,
    low: torch.dtype,
    *,
    weights: Collection[str] = (),
    keep: Sequence[str] = (),
    misfits: Mapping[str, str] | None = None,
    refused: Mapping[Node, str] | None = None,
) -> Choice:
    """The choice for a segment's graph.

    Args:
        weights: the placeholders that are parameters and buffers.
        keep: the user's patterns.
        misfits: values that must not be rounded, by the name of their node, and why.
        refused: nodes that cannot be had in the half type, and why.
    """
    return Chooser(module, low, set(weights), keep, misfits or {}, refused or {}).choice()


class Chooser:
    """Goes over the nodes in order, and once more from the end for what can be as all its readers want it."""

    def __init__(
        self,
        module: GraphModule,
        low: torch.dtype,
        weights: Collection[str],
        keep: Sequence[str],
        misfits: Mapping[str, str],
        refused: Mapping[Node, str],
    ) -> None:
        self.module = module
        self.low = low
        self.weights = weights
        self.keep = keep
        self.misfits = misfits
        self.refused = refused
        self.kinds: dict[Node, Kind] = {}
        self.nodes: set[Node] = set()
        self.reasons: dict[Node, str] = {}
        self.uncast: set[Node] = set()  # what must not read the half type
        self.anyway: set[Node] = set()  # what would be float32 without the reason too
        self.places = read_as_places(module)

    def choice(self) -> Choice:
        for node in self.module.graph.nodes:
            if node.op != "output" and has_float32(node):
                self.kinds[node] = self.kind_of(node)
            elif node.op == "call_function" and float32_operands(node):
                self.run(node, role_of(node))
        for node in reversed(self.module.graph.nodes):
            if self.kinds.get(node) in (Kind.FREE, Kind.CONSTANT) and self.wanted_low(node):
                self.nodes.add(node)
        # The parts of several results are as the results are.
        for node in self.module.graph.nodes:
            if node.target is operator.getitem:
                (self.nodes.add if node.args[0] in self.nodes else self.nodes.discard)(node)
        reasons = {node: reason for node, reason in self.reasons.items() if node not in self.anyway}
        return Choice(self.low, frozenset(self.nodes), reasons, self.kinds)

    def kind_of(self, node: Node) -> Kind:
        """The kind of a node's float32 values; notes whether it computes in the half type."""
        kind = self.source_kind(node) if node.op != "call_function" else self.result_kind(node)
        if node.name in self.misfits and node.name not in self.weights:
            self.nodes.discard(node)
            self.reasons[node] = self.misfits[node.name]
            return Kind.EXACT
        return kind

    def source_kind(self, node: Node) -> Kind:
        if node.op == "get_attr":
            reason = weight_misfit(getattr_path(self.module, str(node.target)), self.low)
        elif node.name in self.weights:
            reason = self.misfits.get(node.name, "")
        else:
            return Kind.INPUT
        if reason:
            self.reasons[node] = reason
        if not reason:
            return Kind.CONSTANT
        return Kind.SMALL if reason.endswith(INEXACT) else Kind.EXACT

    def result_kind(self, node: Node) -> Kind:
        if node.target is operator.getitem:
            return self.kinds[node.args[0]]  # type: ignore[index]
        role = role_of(node)
        if role is Role.CREATION:
            return self.number_kind(node) or Kind.CONSTANT
        if role is Role.CAST:
            return self.cast_kind(node)
        if not float32_operands(node) and role is not Role.CODES:
            return Kind.EXACT  # the model's own way to float32, from integers or a half type
        return self.run(node, role)

    def cast_kind(self, node: Node) -> Kind:
        """Of a cast to float32: integers may be places, and who casts a half type means it."""
        (source,) = node.all_input_nodes[:1]
        dtype = source.meta["val"].dtype
        if dtype is torch.float32:
            return self.run(node, Role.MOVEMENT)
        return Kind.WIDE if dtype in SMALL_INTEGERS else Kind.EXACT

    def number_kind(self, node: Node) -> Kind | None:
        """What a number that the half type cannot hold makes of a result: a large one would be infinite there. None
        where all numbers fit.
        """
        if "empty" in packet_of(node.target) or role_of(node) in (Role.SCALING, Role.CODES):  # they add it in float32
            return None
        wrong = [n for n in numbers(node) if isinstance(n, Node) or not holds(self.low, n)]
        large = torch.finfo(self.low).max
        if any(not isinstance(n, Node) and abs(n) > large for n in wrong):
            return Kind.EXACT
        return Kind.WIDE if wrong else None

    def run(self, node: Node, role: Role) -> Kind:
        """The kind of a node that reads float32 values, and whether it computes in the half type."""
        found = {self.kinds[each] for each in deciding_operands(node, role) if each in self.kinds}
        found |= {integer_kind(each) for each in tensor_operands(node)} if role is Role.BETWEEN else set()
        reason = self.why_wide(node, role, found)
        if reason:
            self.reasons[node] = reason
            if role not in (Role.MATRIX, Role.ATTENTION) and Kind.LOW not in found:
                self.anyway.add(node)
            kind = self.number_kind(node)
            if role is Role.MOVEMENT:
                return first(found if kind is None else {*found, kind})
            return kind or Kind.WIDE
        match role:
            case Role.MATRIX | Role.ATTENTION:
                # Weights alone are computed once, when the engine is built.
                return Kind.CONSTANT if found == {Kind.CONSTANT} else self.lowered(node)
            case Role.BETWEEN | Role.SCALING | Role.MOVEMENT:
                kind = first(found)
                if kind is Kind.SMALL and role is not Role.MOVEMENT:
                    return Kind.WIDE
                table = packet_of(node.target) == "embedding" and kind is Kind.CONSTANT
                return self.lowered(node) if kind is Kind.LOW or table else kind
            case Role.CODES:
                return self.coded_kind(node, first(found))
            case Role.NORM:
                return Kind.FREE
        return Kind.WIDE

    def coded_kind(self, node: Node, kind: Kind) -> Kind:
        """Of codes, and of what they stand for: a few bits, so that it may be rounded whatever it was made of."""
        if kind is Kind.LOW:
            return self.lowered(node)
        if kind in (Kind.EXACT, Kind.SMALL, Kind.CONSTANT) and first_operand(node) is not None:
            self.uncast.add(node)  # its codes are those of the float32 values
        return Kind.FREE

    def why_wide(self, node: Node, role: Role, found: Collection[Kind]) -> str:
        """Why a node computes in float32 that its table would not leave there; nothing where there is no reason."""
        if role in (Role.WIDE, Role.NORM):
            return ""
        if node in self.refused:
            return f"in {NAMES[self.low]}: {self.refused[node]}"
        if any(value.dtype in (torch.float16, torch.bfloat16, torch.float64) for value in floats(node)):
            return "the model mixes it with another type"
        if role is not Role.MOVEMENT and (pattern := kept_by(node, self.keep)) is not None:
            return f"precision_keep={pattern}"
        if STAYS_FLOAT32 in node.meta and role is not Role.MOVEMENT:
            return str(node.meta[STAYS_FLOAT32])
        if self.number_kind(node) is not None:
            shown = ", ".join("one made of sizes" if isinstance(n, Node) else f"{n:.3g}" for n in numbers(node))
            return f"{NAMES[self.low]} may not hold its number {shown}"
        if role in (Role.MATRIX, Role.ATTENTION):
            small = any(self.kinds.get(each) is Kind.SMALL for each in factors(node, role))
            if Kind.EXACT in found or small:
                return "an operand must not be rounded"
            if node in self.places and not found & {Kind.LOW, Kind.FREE}:  # type: ignore[operator]
                return "its result is read as a place"
        return ""

    def lowered(self, node: Node) -> Kind:
        self.nodes.add(node)
        return Kind.LOW

    def wanted_low(self, node: Node) -> bool:
        """Whether a node that moves values, and computes in float32 so far, may give its readers the half type."""
        if node.op != "call_function" or node in self.nodes or node in self.reasons or node in self.uncast:
            return False
        if node.target is not operator.getitem and role_of(node) not in (Role.MOVEMENT, Role.CAST, Role.CODES):
            return False
        if role_of(node) is Role.CAST and node.args[0].meta["val"].dtype is not torch.float32:  # type: ignore[union-attr]
            return False
        return bool(node.users) and all(self.reads_low(user, node) for user in node.users)

    def reads_low(self, user: Node, node: Node) -> bool:
        if user.target is operator.getitem:
            return user in self.nodes or not user.users
        return user in self.nodes and node in low_operands(user)


def first(kinds: Collection[Kind]) -> Kind:
    """The kind that decides. A value that came in does not meet a half one in the half type."""
    for kind in Kind:
        if kind in kinds:
            mixed = kind is Kind.INPUT and not {*kinds} <= {Kind.INPUT, Kind.CONSTANT}
            return Kind.WIDE if mixed else kind
    return Kind.CONSTANT


def integer_kind(node: Node) -> Kind:
    """What an operand that is no float does to arithmetic: a large integer does not fit into a half type."""
    dtype = node.meta["val"].dtype
    return Kind.CONSTANT if dtype.is_floating_point or dtype in SMALL_INTEGERS else Kind.EXACT


def has_float32(node: Node) -> bool:
    return any(isinstance(v, torch.Tensor) and v.dtype is torch.float32 for v in tree_leaves(node.meta.get("val")))


def is_float32(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def tensor_operands(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def float32_operands(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if has_float32(n)]


def floats(node: Node) -> list[torch.Tensor]:
    values = [n.meta["val"] for n in tensor_operands(node)]
    return [value for value in values if value.is_floating_point()]


def deciding_operands(node: Node, role: Role) -> list[Node]:
    """The operands whose kinds decide: not the statistics of a batch norm, nor the mask of an attention."""
    operands = float32_operands(node)
    if role in (Role.SCALING, Role.CODES):
        return [n for n in operands if n is node.args[0]]
    if role is Role.ATTENTION:
        return [n for n in operands if any(n is each for each in node.args[:3])]
    return operands


def first_operand(node: Node) -> Node | None:
    """The first argument, where it is float32."""
    first = node.args[0]
    return first if isinstance(first, Node) and is_float32(first) else None


def factors(node: Node, role: Role) -> list[Node]:
    """The operands that a matrix op multiplies; those that it adds are left out."""
    name, operands = packet_of(node.target), deciding_operands(node, role)
    if name in ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"):
        return [n for n in operands if n is not node.args[0] or n in node.args[1:3]]
    if name in ("convolution", "linear"):
        return [n for n in operands if any(n is each for each in node.args[:2])]
    return [n for n in operands if n.meta["val"].ndim > 1]


def low_operands(node: Node) -> list[Node]:
    """The operands that are cast as they are for a node that computes in the half type."""
    return [n for n in deciding_operands(node, role_of(node)) if is_float32(n)]


def numbers(node: Node) -> Iterator[Any]:
    """The numbers among a node's arguments that it computes with, Python's or made of sizes; not dims and flags."""
    if not isinstance(node.target, OpOverload):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if str(argument.type) not in NUMBER_TYPES:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float) or (isinstance(value, Node) and "Tensor" not in str(argument.type)):
            yield value


def read_as_places(module: GraphModule) -> set[Node]:
    """The nodes whose values become places in waves, or whole numbers, without a matrix product or norm between."""
    found: set[Node] = set()
    waiting = [n for node in module.graph.nodes if is_place(node) for n in float32_operands(node)]
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        if node.target is operator.getitem or role_of(node) in (Role.BETWEEN, Role.MOVEMENT, Role.SCALING):
            waiting += float32_operands(node)
    return found


def is_place(node: Node) -> bool:
    value = node.meta.get("val")
    to_whole = role_of(node) is Role.CAST and isinstance(value, torch.Tensor) and not value.is_floating_point()
    return node.op == "call_function" and (packet_of(node.target) in PLACES or to_whole)
