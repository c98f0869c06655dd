"""A model in floats and batches become a model with quantize and dequantize nodes, by torchao's PT2E.

torchao is loaded at the first call; nothing else needs it.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from trt_dynamo.quantization.asked import Asked, with_first
from trt_dynamo.quantization.observers import CODES, observer
from trt_dynamo.quantization.smoothing import smooth

log = logging.getLogger(__name__)

aten = torch.ops.aten

# The ops whose input and weight are quantized, with the axis of the weight that has a scale for each index.
WEIGHTED = {
    aten.linear.default: 0,
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.padding: 0,
}


def calibrated(model: nn.Module, loader: Iterable[Any], asked: Asked) -> nn.Module:
    """The model as torchao's PT2E quantizes it, for "int8" and "fp8".

    Raises:
        ImportError: torchao is not installed.
        ValueError: there was no batch, or a value of the model is not finite.
    """
    pt2e = torchao("torchao.quantization.pt2e.quantize_pt2e")
    first, batches = with_first(loader)
    with torch.no_grad():
        exported = export(model, first, asked.call, dynamic=asked.dynamic)
        prepared = pt2e.prepare_pt2e(exported, quantizer(asked.dtype, asked.method, asked.percentile, asked.keep))
        for batch in batches:
            asked.call(prepared, batch)
        if asked.method == "smooth":
            smooth(prepared, asked.strength)
        converted: nn.Module = pt2e.convert_pt2e(prepared, fold_quantize=asked.dtype == "int8")
    torchao("torchao.quantization.pt2e").allow_exported_model_train_eval(converted)
    return converted


def torchao(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"trt_dynamo.quantize needs torchao: pip install 'trt-dynamo[quantize]' ({error})") from error


# -- export -----------------------------------------------------------------------------------------------------------


def export(model: nn.Module, batch: Any, call: Callable[[Any, Any], Any], *, dynamic: bool) -> GraphModule:
    """The model's graph, as it is called with the batch."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        return model(*args, **kwargs)

    training = model.training
    model.eval()
    try:
        call(note, batch)
        if not given:
            raise ValueError("run did not call the model")
        args, kwargs = given[0]
        for example in examples(args, kwargs, dynamic=dynamic):
            try:
                return exported_module(model, *example, dynamic=dynamic)
            except Exception as error:  # noqa: BLE001  a size that must be one: the batch as it is tells what is wrong
                log.debug("no export with a doubled batch: %s", error)
        return exported_module(model, args, kwargs, dynamic=dynamic)
    finally:
        model.train(training)


def examples(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A batch of one, doubled: torch.export takes a size of 1 for one that is always 1."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
    if dynamic and tensors and all(x.shape[0] == 1 for x in tensors):
        yield pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.ndim else x, (args, kwargs))


def exported_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool) -> GraphModule:
    shapes = None
    if dynamic:
        sizes = [pytree.tree_map(open_sizes, x) for x in (*args, *kwargs.values())]
        shapes = shapes_by_name(model, args, kwargs, sizes)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def open_sizes(x: Any) -> dict[int, Any] | None:
    """What torch.export is told of an argument: any size, as far as the model lets it be."""
    return dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None


def shapes_by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Sequence[Any]) -> Any:
    """As torch.export wants them: in the order of the arguments, those of keywords by name."""
    if not kwargs:
        return tuple(shapes)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    named = dict(zip([*list(bound)[: len(args)], *kwargs], shapes, strict=True))
    variable = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_KEYWORD]
    if variable and variable[0] in bound:
        extra = bound[variable[0]]
        named = {**{k: v for k, v in named.items() if k not in extra}, variable[0]: {k: named[k] for k in extra}}
    return named


# -- what is quantized ------------------------------------------------------------------------------------------------


def quantizer(dtype: str, method: str, percent: float, keep: tuple[str, ...]) -> Any:
    """torchao's plan for a graph: the inputs and weights of linear layers and convolutions."""
    module = torchao("torchao.quantization.pt2e.quantizer")

    def specification(axis: int | None, how: str = method, kind: str = dtype) -> Any:
        made = observer(kind, how, percent, axis)
        return module.QuantizationSpec(dtype=CODES[kind][1], observer_or_fake_quant_ctr=made)

    def annotate(node: Node, specs: dict[Any, Any]) -> None:
        made = module.QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        node.meta["quantization_annotation"] = made

    # Of embeddings nothing is multiplied: int8 keeps more of a row than fp8 does.
    rows = specification(0, "minmax", "int8")

    class WeightedOps(module.Quantizer):  # type: ignore[misc, name-defined]
        def annotate(self, model: GraphModule) -> GraphModule:
            for node in model.graph.nodes:
                if node.target is aten.embedding.default and not kept(node, keep) and is_weight(node.args[0]):
                    annotate(node, {node.args[0]: rows})
                axis = WEIGHTED.get(node.target)
                if axis is None or kept(node, keep) or not takes_weight(node):
                    continue
                # only the input of a linear layer has its channels in the last dim
                how = "minmax" if method == "smooth" and node.target is not aten.linear.default else method
                specs = {node.args[0]: specification(None, how), node.args[1]: specification(axis)}
                annotate(node, specs)
            return model

        def validate(self, model: GraphModule) -> None:
            pass

    return WeightedOps()


def takes_weight(node: Node) -> bool:
    """Whether it multiplies an input in floats with a parameter."""
    x = node.args[0]
    if not isinstance(x, Node) or not is_weight(node.args[1]) or x.op == "get_attr":
        return False
    return is_float(x)


def is_weight(node: Any) -> bool:
    """Whether the node is a parameter or buffer in floats."""
    return isinstance(node, Node) and node.op == "get_attr" and is_float(node)


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def kept(node: Node, patterns: Sequence[str]) -> bool:
    """Whether the node belongs to a module that stays in floats."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    names = [path.replace("L['self'].", "") for path in paths if path]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
