"""`quantize`: a model in floats and batches become a model with quantize and dequantize nodes, by torchao's PT2E.

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

from trt_dynamo.quantization.observers import CODES, observer
from trt_dynamo.quantization.smoothing import smooth
from trt_dynamo.quantization.weight_only import WEIGHT_ONLY, quantize_weights

log = logging.getLogger(__name__)

aten = torch.ops.aten

METHODS = ("minmax", "smooth", "entropy", "percentile")

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


def quantize(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    dtype: str = "int8",
    *,
    method: str | None = None,
    percentile: float = 99.99,
    strength: float = 0.8,
    group: int | None = None,
    keep: Sequence[str] = (),
    run: Callable[[Any, Any], Any] | None = None,
    dynamic: bool = True,
) -> nn.Module:
    """A quantized copy of the model, for `torch.compile(..., backend="tensorrt")`: linear layers and convolutions
    read inputs and weights as INT8 or FP8 codes, with one scale per input and one per output channel of a weight;
    embeddings read their weights as codes of the same type, with one scale per row.

    The model is exported as it is called with the first batch, and calibrated with all. With "int8wo" and "int4wo" only
    weights become codes, the model stays the module that it was, and there is nothing to calibrate.

    Args:
        model: in floats, in the device and state in which it will be used; it is exported in `eval()`.
        loader: batches, such as a DataLoader's. A mapping is given to the model as keyword arguments, a tuple or list
            as positional ones, anything else as the one argument. A hundred or so are enough.
        dtype: "int8", or "fp8" (float8_e4m3fn, for compute capability 8.9 and later). Weights alone: "int8wo", or
            "int4wo" (of linear layers; those of embeddings become int8).
        method: what an input's scale is made of. "minmax": its largest magnitude, the default for fp8. "smooth", that
            for int8: the same, after the range of channels that reach far went from the inputs of linear layers into
            their weights, as in SmoothQuant. "entropy": the limit that TensorRT's entropy calibrator would choose
            (int8). "percentile": the magnitude below which `percentile` percent lie. Weights always have their largest.
        percentile, strength: of the methods "percentile" and "smooth"; a strength of 1 moves all into the weights.
        group: of "int8wo" and "int4wo": how many weights of a row share a scale, by default all of them, and 32.
        keep: patterns (`*` and `?`) over the names of modules; what matches, and all that is in it, stays in floats.
        run: calls the model with a batch where that is not enough: `lambda model, batch: model(batch[0])`.
        dynamic: keeps the sizes of inputs open, as far as the model lets them be.

    Raises:
        ImportError: torchao is not installed.
        ValueError: a value of an argument is unknown, there was no batch, or a value of the model is not finite.
    """
    if method is not None and dtype in WEIGHT_ONLY:
        raise ValueError(f"method {method!r}: {dtype} looks at no batch")
    method = method or ("smooth" if dtype == "int8" else "minmax")
    check_arguments(dtype, method, percentile, strength, group)
    if dtype in WEIGHT_ONLY:
        torchao("torchao.quantization")
        return quantize_weights(model, dtype, group, tuple(keep))
    if loader is None:
        raise ValueError(f"{dtype} is calibrated with batches: give a loader")
    pt2e = torchao("torchao.quantization.pt2e.quantize_pt2e")
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("the loader gave no batch: an iterator can be used only once") from None
    call = run or called
    with torch.no_grad():
        exported = export(model, first, call, dynamic=dynamic)
        prepared = pt2e.prepare_pt2e(exported, quantizer(dtype, method, percentile, tuple(keep)))
        for batch in chain_first(first, batches):
            call(prepared, batch)
        if method == "smooth":
            smooth(prepared, strength)
        converted: nn.Module = pt2e.convert_pt2e(prepared, fold_quantize=dtype == "int8")
    torchao("torchao.quantization.pt2e").allow_exported_model_train_eval(converted)
    return converted


def check_arguments(dtype: str, method: str, percentile: float, strength: float, group: int | None) -> None:
    if dtype not in CODES and dtype not in WEIGHT_ONLY:
        raise ValueError(f"dtype {dtype!r}: it is one of {', '.join((*CODES, *WEIGHT_ONLY))}")
    if group is not None and (dtype not in WEIGHT_ONLY or group < 1):
        raise ValueError(f"group {group}: it is a number of weights, of {' and '.join(WEIGHT_ONLY)}")
    if method not in METHODS:
        raise ValueError(f"method {method!r}: it is one of {', '.join(METHODS)}")
    if method == "entropy" and dtype != "int8":
        raise ValueError("method 'entropy' compares with the evenly spaced codes of int8; for fp8 take another")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile}: it lies between 0 and 100")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}: it lies between 0 and 1")


def torchao(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"trt_dynamo.quantize needs torchao: pip install 'trt-dynamo[quantize]' ({error})") from error


def chain_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is given to a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def called(model: Any, batch: Any) -> Any:
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


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
