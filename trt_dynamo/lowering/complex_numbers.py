"""Complex numbers as pairs of reals, in the layout of `view_as_real`: TensorRT has no complex type.

In: a lowered graph. Out: the same graph, in which ops on complex values are ops on real tensors with a last dim of 2.
Complex arguments and results of the graph are viewed as such in eager, which costs nothing. An op without a rule stays
as it is, between such views. A graph without complex values is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.lowering import (  # noqa: F401  they fill RULES
    complex_arithmetic,
    complex_movement,
    complex_products,
    fourier,
)
from trt_dynamo.lowering.pairs import RULES, Pair
from trt_dynamo.lowering.recording import REAL_OF, fake_mode_of, like
from trt_dynamo.lowering.rewriting import Rewriter

NO_RULE = "there is no rule for it as arithmetic of pairs of reals"


def complex_as_pairs(graph: Graph) -> None:
    """Rewrites the graph in place. Values of complex128 stay what they are, and what is computed with them."""
    values = [leaf for node in graph.nodes for leaf in tree_leaves(node.meta.get("val"))]
    if not any(is_complex(value) or is_turned(value) for value in values):
        return
    mode, module = fake_mode_of(graph), graph.owning_module
    if mode is not None and module is not None:
        AsPairs(module, mode).run()
        graph.eliminate_dead_code()


def is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in REAL_OF and value.layout is torch.strided


def is_turned(value: Any) -> bool:
    """Whether a value has a sign that is not in its memory: the imaginary part of a conjugate."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.is_neg()


class AsPairs(Rewriter):
    """A `Pair` stands for each complex tensor."""

    def carries(self, value: Any) -> bool:
        return is_complex(value)

    def into(self, value: torch.Tensor) -> Pair:
        return Pair(torch.view_as_real(value.resolve_conj().resolve_neg()))

    def back(self, carried: Pair, wanted: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(carried.value)

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(value.resolve_conj().resolve_neg()).contiguous()

    def wrapped(self, value: torch.Tensor) -> Pair:
        return Pair(value)

    def enter(self, node: Node) -> None:
        """Real values that bear a sign get it into their memory, where an engine looks."""
        super().enter(node)
        value: Any = node.meta.get("val")
        if is_turned(value) and not is_complex(value):
            with self.recorder.at(node, self.after(node)):
                physical = value.resolve_neg()
            self.exchange(node, self.recorder.nodes[id(physical)])

    def concerns(self, node: Node) -> bool:
        return super().concerns(node) or any(map(is_turned, tree_leaves(node.meta.get("val"))))

    def result(self, node: Node, args: Any, kwargs: Any) -> Any:
        values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
        found = {leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
        other = next((dtype for dtype in found if dtype.is_complex and dtype not in REAL_OF), None)
        if other is not None:
            raise Unsupported(f"TensorRT has no {str(other).removeprefix('torch.')}")
        rule = RULES.get(node.target)
        if rule is None:
            raise Unsupported(NO_RULE)
        result, wanted = rule(*args, **kwargs), node.meta["val"]
        if isinstance(wanted, torch.Tensor):
            return as_stated(result, wanted)
        return [as_stated(r, w) for r, w in zip(result, wanted, strict=True)]


def as_stated(result: Any, wanted: torch.Tensor) -> Any:
    """A rule's result in the dtype and strides that the graph states."""
    pairs = isinstance(result, Pair)
    value = result.value if pairs else result
    if pairs != wanted.is_complex() or value.ndim != wanted.ndim + pairs:
        raise ConversionError(f"a rule for complex numbers made {result} for {wanted}")
    value = like(value, wanted, REAL_OF.get(wanted.dtype, wanted.dtype))
    return Pair(value) if pairs else value
