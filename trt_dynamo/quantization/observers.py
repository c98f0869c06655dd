"""Observers for PT2E: they look at a tensor while a model is calibrated, and become its quantize and dequantize nodes.

Comes in: what is calibrated, by which method, to which type. Goes out: a class that torchao's `prepare_pt2e` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from trt_dynamo.quantization.ranges import Entropy, Largest, LargestPerChannel, Percentile

# The largest code of each type, and the type of its codes.
CODES: Mapping[str, tuple[float, torch.dtype]] = {"int8": (127.0, torch.int8), "fp8": (448.0, torch.float8_e4m3fn)}


class Observed(nn.Module):
    """Looks at each tensor that passes, and gives it on as it is."""

    def __init__(self, kind: str, method: str, percent: float, axis: int | None, **parent: Any) -> None:
        super().__init__(**parent)
        self.kind, self.axis = kind, axis
        self.dtype, self.is_dynamic = CODES[kind][1], False
        self.qscheme = torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric
        self.range: Largest | Entropy | Percentile = Largest(axis)
        if axis is None:
            makers = {"minmax": Largest, "smooth": LargestPerChannel, "entropy": Entropy}
            self.range = makers[method]() if method in makers else Percentile(percent)

    def forward(self, x: Tensor) -> Tensor:
        self.range.see(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point. What was always 0, or was never seen, gets a scale of 1."""
        limit = self.range.limit()
        if limit is None:
            limit = torch.tensor(0.0)
        scale = limit / CODES[self.kind][0]
        scale = torch.where((scale > 1e-30) & scale.isfinite(), scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    def convert(self, model: GraphModule, node: Node) -> None:
        """torchao's hook: puts quantize and dequantize into the graph, in the place of this module's call."""
        source, graph = node.args[0], model.graph
        assert isinstance(source, Node)
        with graph.inserting_before(node):
            make = self.int8 if self.kind == "int8" else self.fp8
            made = make(model, source, str(node.target))
        node.replace_all_uses_with(made)
        graph.erase_node(node)

    def int8(self, model: GraphModule, source: Node, name: str) -> Node:
        ops, (scale, zero) = torch.ops.quantized_decomposed, self.calculate_qparams()
        rest: tuple[Any, ...]
        if self.axis is None:
            quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
            rest = (float(scale), 0, -128, 127, torch.int8)
        else:
            quantize, dequantize = ops.quantize_per_channel.default, ops.dequantize_per_channel.default
            numbers = (buffer(model, f"{name}_scale", scale), buffer(model, f"{name}_zero_point", zero))
            rest = (*numbers, self.axis, -127, 127, torch.int8)
        codes = model.graph.call_function(quantize, (source, *rest))
        kept = dtype_of(source)
        return model.graph.call_function(
            dequantize, (codes, *rest), {} if kept is torch.float32 else {"out_dtype": kept}
        )

    def fp8(self, model: GraphModule, source: Node, name: str) -> Node:
        scale, _ = self.calculate_qparams()
        if self.axis is not None:
            value = source.meta["val"]
            scale = scale.reshape([-1 if i == self.axis else 1 for i in range(value.ndim)])
        number, ops = buffer(model, f"{name}_scale", scale), torch.ops.torchao
        codes = model.graph.call_function(
            ops.quantize_affine_float8_non_decomposed.default, (source, number, torch.float8_e4m3fn)
        )
        return model.graph.call_function(
            ops.dequantize_affine_float8_non_decomposed.default, (codes, number, dtype_of(source))
        )


def dtype_of(node: Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else torch.float32


def buffer(model: GraphModule, name: str, value: Tensor) -> Node:
    """The value as a buffer of the model, and the node that reads it."""
    plain = name.replace(".", "_")
    model.register_buffer(plain, value)
    return model.graph.get_attr(plain)


@functools.cache
def observer(kind: str, method: str, percent: float, axis: int | None) -> type:
    """A class that torchao knows as an observer; its specification needs nothing but the class."""
    from torchao.quantization.pt2e.observer import ObserverBase

    class Observer(Observed, ObserverBase):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            super().__init__(kind, method, percent, axis, dtype=CODES[kind][1])

    return Observer
