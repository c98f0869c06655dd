"""Carries the values of some types as others through a graph: what complex numbers and float64 have in common.

Where such a value enters the graph, or an op stays as it is, eager turns it into what stands for it, and back where it
leaves.
"""

from __future__ import annotations

import abc
import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER
from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.recording import Recorder, is_view, run_again


class Rewriter(abc.ABC):
    """Walks over a graph once. `carried` has what stands for the value of each node that has one of those types."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        self.module = module
        self.graph = module.graph
        self.mode = mode
        self.recorder = Recorder(module, mode)
        self.carried: dict[Node, Any] = {}
        self.original: dict[Node, Node] = {}  # the node with the value as the graph states it, where one is in use
        self.changed: set[Node] = set()  # nodes of which the value is stated anew

    @abc.abstractmethod
    def carries(self, value: Any) -> bool:
        """Whether something else stands for the value. (The methods below call torch on values that do not exist.)"""

    @abc.abstractmethod
    def into(self, value: torch.Tensor) -> Any:
        """What stands for a value."""

    @abc.abstractmethod
    def back(self, carried: Any, wanted: torch.Tensor) -> torch.Tensor:
        """The value, `wanted` as the graph states it."""

    @abc.abstractmethod
    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """What stands for a constant, which does exist."""

    @abc.abstractmethod
    def wrapped(self, value: torch.Tensor) -> Any:
        """What stands for a constant, from the value of what `constant` made."""

    @abc.abstractmethod
    def result(self, node: Node, args: Any, kwargs: Any) -> Any:
        """What stands for the result of a node, or for each of its results.

        Raises:
            Unsupported: it stays as it is; the text says why.
        """

    def leaves_alone(self, node: Node) -> bool:
        """Whether a node stays as it is, without a reason that a user should read."""
        return False

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self.with_original_arguments(node)
            elif node.op == "get_attr" and self.carries(node.meta.get("val")):
                with _disable_current_modes(), torch.no_grad():
                    value = self.constant(operator.attrgetter(str(node.target))(self.module).detach())
                self.carried[node] = self.wrapped(self.recorder.as_fake(value))
                self.original[node] = node
            else:
                self.refresh(node)
                if node.op != "call_function" or not self.rewritten(node):
                    self.with_original_arguments(node)
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

    def after(self, node: Node) -> Node:
        """The place for what is made of a node's value at once."""
        return self.recorder.first if node.op == "placeholder" else node.next

    def enter(self, node: Node) -> None:
        """Turns what eager makes, or the graph gets, into what stands for it."""
        if self.carries(node.meta.get("val")):
            with self.recorder.at(node, self.after(node)):
                self.carried[node] = self.into(node.meta["val"])
            self.original[node] = node

    def concerns(self, node: Node) -> bool:
        """Whether values that something else stands for go in or come out."""
        return any(n in self.carried for n in node.all_input_nodes) or any(
            self.carries(leaf) for leaf in tree_leaves(node.meta.get("val"))
        )

    def rewritten(self, node: Node) -> bool:
        """Rewrites the node; False if it stays."""
        if not self.concerns(node) or self.leaves_alone(node):
            return False
        if node.target is operator.getitem:
            (parent,) = node.all_input_nodes
            if parent in self.carried:
                self.replace(node, self.carried[parent][node.args[1]])
            return parent in self.carried
        try:
            with self.recorder.at(node):
                args, kwargs = torch.fx.map_arg(
                    (node.args, node.kwargs), lambda n: self.carried.get(n, n.meta.get("val"))
                )
                result = self.result(node, args, kwargs)
        except Unsupported as error:
            node.meta[STAYS_EAGER] = str(error)
            return False
        self.replace(node, result)
        return True

    def replace(self, node: Node, result: Any) -> None:
        if isinstance(node.meta["val"], torch.Tensor) and not self.carries(node.meta["val"]):
            self.exchange(node, self.recorder.nodes[id(result)])
        else:
            self.carried[node] = result

    def exchange(self, node: Node, new: Node) -> None:
        """Has all that reads a node read another."""
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.changed.add(new)

    def with_original_arguments(self, node: Node) -> None:
        """Gives the node the values that it was written for."""
        if any(n in self.carried for n in node.all_input_nodes):
            node.args, node.kwargs = torch.fx.map_arg(
                (node.args, node.kwargs), lambda n: self.original_node(n) if n in self.carried else n
            )
            if is_view(node):
                run_again(node, self.mode)

    def original_node(self, node: Node) -> Node:
        """The node with the value that something else stands for. A view stays the view that it was, with the strides,
        the memory and the conjugate bit that the graph's caller expects."""
        if node not in self.original:
            if is_view(node) and isinstance(node.meta["val"], torch.Tensor):
                self.with_original_arguments(node)
                self.original[node] = node
            else:
                with self.recorder.at(node):
                    value = self.back(self.carried[node], node.meta["val"])
                self.original[node] = self.recorder.nodes[id(value)]
        return self.original[node]
