"""Complex numbers as pairs of reals, in the layout of `view_as_real`: TensorRT has no complex type.

In: a lowered graph. Out: the same graph, in which ops on complex values are ops on real tensors with a last dim of 2.
Complex arguments and results of the graph are viewed as such in eager, which costs nothing. An op without a rule stays
as it is, between such views. A graph without complex values is left alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER
from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.lowering import complex_arithmetic, complex_movement, complex_products, fourier
from trt_dynamo.lowering.pairs import RULES, Pair
from trt_dynamo.lowering.recording import REAL_OF, Recorder, fake_mode_of, is_view, like, run_again

NO_RULE = "there is no rule for it as arithmetic of pairs of reals"

# These fill RULES.
RULE_MODULES = (complex_arithmetic, complex_movement, complex_products, fourier)


def complex_as_pairs(graph: Graph) -> None:
    """Rewrites the graph in place. Values of complex128 stay what they are, and what is computed with them."""
    if not any(concerned(leaf) for node in graph.nodes for leaf in tree_leaves(node.meta.get("val"))):
        return
    mode, module = fake_mode_of(graph), graph.owning_module
    if mode is None or module is None:
        return
    Rewriter(module, mode).run()
    graph.eliminate_dead_code()


def concerned(value: Any) -> bool:
    """Whether a value is complex, or bears a sign that is not in its memory: the imaginary part of a conjugate."""
    return isinstance(value, torch.Tensor) and (value.dtype in REAL_OF or value.is_neg())


class Rewriter:
    """Walks over a graph once. `pairs` has what stands for each node with complex values."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        self.module = module
        self.graph = module.graph
        self.mode = mode
        self.recorder = Recorder(module, mode)
        self.pairs: dict[Node, Any] = {}
        self.complex: dict[Node, Node] = {}  # the node with complex values, where one is in use
        self.changed: set[Node] = set()  # nodes of which the value is stated anew

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self.with_complex_arguments(node)
            elif node.op == "get_attr" and concerned(node.meta.get("val")):
                self.pairs[node] = self.constant(node)
                self.complex[node] = node
            else:
                self.refresh(node)
                if node.op != "call_function" or not self.rewritten(node):
                    self.with_complex_arguments(node)
                    self.recorder.track(node)
                    self.enter(node)

    def refresh(self, node: Node) -> None:
        """A view of what changed is a view of other memory."""
        if not self.changed.isdisjoint(node.all_input_nodes):
            if node.target is operator.getitem:
                node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
            elif is_view(node):
                run_again(node, self.mode)
            else:
                return
            self.changed.add(node)

    def enter(self, node: Node) -> None:
        """Views what eager makes, or the graph gets, as pairs."""
        value: Any = node.meta.get("val")
        if not concerned(value):
            return
        with self.recorder.at(node, self.recorder.first if node.op == "placeholder" else node.next):
            physical = value.resolve_conj().resolve_neg()
            if value.is_complex():
                self.pairs[node] = Pair(torch.view_as_real(physical))
                self.complex[node] = node
                return
        new = self.recorder.nodes[id(physical)]
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.changed.add(new)

    def constant(self, node: Node) -> Pair:
        """A complex constant of the graph as a real one."""
        with _disable_current_modes(), torch.no_grad():
            value: torch.Tensor = operator.attrgetter(str(node.target))(self.module)
            real = torch.view_as_real(value.detach().resolve_conj().resolve_neg()).contiguous()
        return Pair(self.recorder.as_fake(real))

    def rewritten(self, node: Node) -> bool:
        """Rewrites the node by its rule, where complex values go in or come out; False if it stays."""
        inner = [n for n in node.all_input_nodes if n in self.pairs]
        if not inner and not any(concerned(leaf) for leaf in tree_leaves(node.meta.get("val"))):
            return False
        if node.target is operator.getitem:
            (parent,) = node.all_input_nodes
            if parent in self.pairs:
                self.replace(node, self.pairs[parent][node.args[1]])
            return parent in self.pairs
        try:
            self.replace(node, self.result(node))
        except Unsupported as error:
            node.meta[STAYS_EAGER] = str(error)
            return False
        return True

    def result(self, node: Node) -> Any:
        """What stands for a node's result, by its rule."""
        around = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
        found = {leaf.dtype for leaf in tree_leaves(around) if isinstance(leaf, torch.Tensor)}
        other = next((dtype for dtype in found if dtype.is_complex and dtype not in REAL_OF), None)
        if other is not None:
            raise Unsupported(f"TensorRT has no {str(other).removeprefix('torch.')}")
        rule = RULES.get(node.target)
        if rule is None:
            raise Unsupported(NO_RULE)
        with self.recorder.at(node):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.pairs.get(n, n.meta.get("val")))
            result, wanted = rule(*args, **kwargs), node.meta["val"]
            if isinstance(wanted, torch.Tensor):
                return as_stated(result, wanted)
            return [as_stated(r, w) for r, w in zip(result, wanted, strict=True)]

    def replace(self, node: Node, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            new = self.recorder.nodes[id(result)]
            node.replace_all_uses_with(new)
            self.changed.add(new)
        else:
            self.pairs[node] = result

    def with_complex_arguments(self, node: Node) -> None:
        """Gives the node the complex values that it was written for."""
        if any(n in self.pairs for n in node.all_input_nodes):
            node.args, node.kwargs = torch.fx.map_arg(
                (node.args, node.kwargs), lambda n: self.complex_node(n) if n in self.pairs else n
            )
            if is_view(node):
                run_again(node, self.mode)

    def complex_node(self, node: Node) -> Node:
        """The node with the complex values that pairs stand for. A view stays the view that it was, with the strides,
        the memory and the conjugate bit that the graph's caller expects."""
        if node not in self.complex:
            if is_view(node) and isinstance(self.pairs[node], Pair):
                self.with_complex_arguments(node)
                self.complex[node] = node
            else:
                with self.recorder.at(node):
                    value = torch.view_as_complex(self.pairs[node].value)
                self.complex[node] = self.recorder.nodes[id(value)]
        return self.complex[node]


def as_stated(result: Any, wanted: torch.Tensor) -> Any:
    """A rule's result in the dtype and strides that the graph states."""
    pairs = isinstance(result, Pair)
    value = result.value if pairs else result
    if pairs != wanted.is_complex() or value.ndim != wanted.ndim + pairs:
        raise ConversionError(f"a rule for complex numbers made {result} for {wanted}")
    value = like(value, wanted)
    return Pair(value) if pairs else value
