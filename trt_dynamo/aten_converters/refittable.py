"""Which weights of a converted network can be replaced in its engine, and what the refit must know of each.

Comes in: a complete `Network` and the names that its weights got. Goes out: a `WeightBinding` for each, and the same as
JSON for the engine's manifest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from trt_dynamo.aten_converters.network import NamedWeight, Network
from trt_dynamo.errors import Unsupported
from trt_dynamo.trt import trt


@dataclasses.dataclass(frozen=True)
class WeightBinding:
    """One weight of an engine that can be refitted.

    `name` is what the refitter calls it, `layer` the constant that holds it. `position` counts among the segment's
    arguments, `index` among those that are baked in. `dtype` is torch's, `stored` the constant's (uint8 is held as
    int32, a weight that is cast at once as what it is cast to); the constant holds a tensor of `shape`, dense and
    row-major. A weight that is not `needed` reaches no result, and TensorRT may have dropped it.
    """

    name: str
    position: int
    index: int
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]
    layer: str
    needed: bool = True

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weight_bindings(
    net: Network,
    placeholders: Sequence[Node],
    weights: Mapping[str, torch.Tensor],
    named: Sequence[tuple[Node, NamedWeight]],
) -> tuple[WeightBinding, ...]:
    """The bindings of a complete network, in the order of the segment's arguments. An argument may have two: one as
    it is, and one in a smaller type.

    Raises:
        Unsupported: the values of a weight decide a shape, so that an engine of other values is another engine.
    """
    indices = {name: index for index, name in enumerate(weights)}
    read = tensors_read(net.raw) if named else set()
    positions = {node: position for position, node in enumerate(placeholders)}
    bindings = []
    for node, weight in sorted(named, key=lambda pair: positions[pair[0]]):
        position, tensor = positions[node], weights[node.name]
        if weight.raw.is_shape_tensor:
            raise Unsupported(f"the values of {weight.name} decide shapes, and cannot be replaced in an engine")
        bindings.append(
            WeightBinding(
                name=weight.name,
                position=position,
                index=indices[node.name],
                dtype=tensor.dtype,
                stored=weight.stored,
                shape=tuple(tensor.shape),
                layer=weight.layer,
                needed=weight.raw.name in read,
            )
        )
    return tuple(bindings)


def tensors_read(network: trt.INetworkDefinition) -> set[str]:
    """The names of all tensors on which a result may depend: on what the network's outputs, and the layers without
    an output (a loop's trip limit, a condition, an assertion), are computed from. A shape says nothing of values.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    waiting = [network.get_output(index).name for index in range(network.num_outputs)]
    for layer in layers:
        if layer.num_outputs == 0:
            waiting += input_names(layer)
    read: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in read:
            continue
        read.add(name)
        maker = makers.get(name)
        if maker is not None and maker.type != trt.LayerType.SHAPE:
            waiting += input_names(maker)
    return read


def input_names(layer: trt.ILayer) -> list[str]:
    """Of all inputs that are there; one that is optional can be None."""
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    return [tensor.name for tensor in inputs if tensor is not None]


def weights_manifest(weights: Sequence[WeightBinding]) -> list[dict[str, Any]]:
    """What the runtime must know of the weights, as JSON."""
    return [
        {
            "name": weight.name,
            "index": weight.index,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "stored": str(weight.stored).removeprefix("torch."),
            "shape": list(weight.shape),
            "needed": weight.needed,
        }
        for weight in weights
    ]
