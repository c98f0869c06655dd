"""Rewrites a node as what plain torch calls say: a pass calls them with the fake tensors that stand for the graph's
values, and `Recorder` writes each op that comes of it into the graph, before the node, with its own `meta["val"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from trt_dynamo.aten_converters.layout import memory_order
from trt_dynamo.aten_converters.left_to_eager import STAYS_EAGER, STAYS_FLOAT32
from trt_dynamo.errors import Unsupported
from trt_dynamo.lowering.decompositions import decompositions
from trt_dynamo.lowering.sizes import size_arguments
from trt_dynamo.profiles import dim_of

# What the parts of complex numbers are. Not those of complex128: TensorRT has no float64 either.
REAL_OF = {torch.complex64: torch.float32, torch.complex32: torch.float16}

# What a new node has from the one that it stands for.
OF_ITS_OWN = {"val", "tensor_meta", "original_aten", "eager_input_vals", STAYS_EAGER}


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """The mode that made the graph's values; None where there is no tensor."""
    values = [n.meta.get("val") for n in graph.nodes]
    return detect_fake_mode([v for v in tree_leaves(values) if isinstance(v, FakeTensor)])


class Recorder(TorchDispatchMode):
    """While it is entered, ops on the values of nodes become nodes, placed before `origin`, the node they stand for.

    A real tensor among an op's arguments becomes a constant of the graph. Ops are taken apart as lowering does it.
    """

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.graph = module.graph
        self.mode = mode
        self.table = decompositions()
        self.nodes: dict[int, Node] = {}  # by the identity of their values, which the nodes keep alive
        self.sizes: dict[sympy.Expr, Node] = {}
        self.constants: dict[int, tuple[torch.Tensor, Node]] = {}
        self.first = next(node for node in self.graph.nodes if node.op != "placeholder")
        self.origin = self.before = self.first

    @contextmanager
    def at(self, origin: Node, before: Node | None = None) -> Iterator[None]:
        """Records what stands for `origin`, before it or before another node."""
        self.origin, self.before = origin, before or origin
        with torch.no_grad(), enable_python_dispatcher(), self.mode, self:
            yield

    def track(self, node: Node) -> None:
        """Makes the node's value known; what an op reads must be."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
        elif isinstance(value, torch.SymInt):
            self.sizes[value.node.expr] = node

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.table:
            with self:
                result = self.table[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            raise Unsupported(f"{func} writes")
        args, kwargs = tree_map(self.as_fake, (tuple(args), kwargs))
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return result
        self.call(func, self.argument(args), self.argument(kwargs), result)
        return result

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Node:
        """The node of a call with this result, and a `getitem` for each tensor in a tuple."""
        with self.graph.inserting_before(self.before):
            name = func.overloadpacket.__name__
            node = self.graph.create_node("call_function", func, args, kwargs, name)
            self.describe(node, result)
            for index, value in enumerate(result if isinstance(result, tuple | list) else ()):
                if isinstance(value, torch.Tensor):
                    self.describe(self.graph.call_function(operator.getitem, (node, index)), value)
        return node

    def describe(self, node: Node, value: Any) -> None:
        kept = {key: v for key, v in self.origin.meta.items() if key not in OF_ITS_OWN}
        node.meta = {**kept, "val": value, STAYS_FLOAT32: "it stands for complex numbers or float64"}
        self.track(node)

    def as_fake(self, value: Any) -> Any:
        """A constant of the graph for a real tensor; anything else as it is."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self.constants:
            name = f"constant_{len(self.constants)}"
            while hasattr(self.module, name):
                name += "_"
            self.module.register_buffer(name, value)
            with self.graph.inserting_before(self.first):
                node = self.graph.get_attr(name)
            node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
            self.track(node)
            self.constants[id(value)] = value, node
        return self.constants[id(value)][1].meta["val"]

    def argument(self, value: Any) -> Any:
        """What a node has as an argument for a value."""
        if isinstance(value, torch.Tensor):
            return self.nodes[id(value)]
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise Unsupported("a number that depends on sizes")
        if isinstance(value, list | tuple):
            return type(value)(self.argument(item) for item in value)
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        return value

    def size(self, value: torch.SymInt) -> Node | int:
        """A node for a size, as arithmetic of the graph's arguments if need be."""
        expression = dim_of(value)
        if isinstance(expression, int):
            return expression
        if expression not in self.sizes:
            symbols, _ = size_arguments(self.graph)
            symbols = {**symbols, **{e: n for e, n in self.sizes.items() if e.is_Symbol}}
            if not expression.free_symbols <= symbols.keys():
                raise Unsupported("a size that depends on data")
            tracer = torch.fx.proxy.GraphAppendingTracer(self.graph)
            proxies: dict[Any, Any] = {symbol: torch.fx.Proxy(node, tracer) for symbol, node in symbols.items()}
            with self.graph.inserting_before(self.before):
                node: Node = sympy_interp(PythonReferenceAnalysis, proxies, expression).node
            node.meta["val"] = value
            self.sizes[expression] = node
        return self.sizes[expression]


def like(value: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype, with the strides of another, copied only if need be. It may have one dim more, for the
    parts of complex numbers, which then lie side by side."""
    value = value.to(dtype)
    width = 2 if value.ndim > wanted.ndim else 1
    strides = list(zip(value.stride(), wanted.stride(), strict=False))
    fits = all(
        statically_known_true(size <= 1) or statically_known_true(have == want * width)
        for size, (have, want) in zip(wanted.shape, strides, strict=True)
    )
    if width == 2:
        fits = fits and value.stride(-1) == 1 and all(statically_known_true(have % 2 == 0) for have, _ in strides)
    order = memory_order(wanted)
    if fits or (order is None and width == 1):
        return value
    order = (*(order or range(wanted.ndim)), *range(wanted.ndim, value.ndim))
    copy = value.permute(order).clone(memory_format=torch.contiguous_format)
    return copy.permute([order.index(axis) for axis in range(len(order))])


def is_view(node: Node) -> bool:
    """Whether the node's result is the memory of an argument."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    return any(argument.alias_info and not argument.alias_info.is_write for argument in target._schema.arguments)


def run_again(node: Node, mode: FakeTensorMode) -> None:
    """States a node's value anew after its arguments changed."""
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with torch.no_grad(), enable_python_dispatcher(), mode:
        node.meta["val"] = function(*args, **kwargs)
