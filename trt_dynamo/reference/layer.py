"""One TensorRT layer, read once, and the registry of the functions that run them.

In: a layer of an `INetworkDefinition`. Out: a `Layer` (names, shapes, dtypes, weights). A function registered with
`@evaluates("KIND")` makes a plain function of torch tensors of a `Layer`, so that a call reads nothing of TensorRT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trt_dynamo.errors import ConversionError, Unsupported
from trt_dynamo.trt import TORCH_TYPES, trt

# How a tensor is kept here when torch has no such dtype: INT4 as its values, FP4 and E8M0 as the floats they stand for.
STORAGE = {**TORCH_TYPES, "INT4": torch.int8, "FP4": torch.float32, "E8M0": torch.float32}
LOW_FLOATS = frozenset({"HALF", "BF16", "FP8"})

CLASSES = {
    "CONVOLUTION": "IConvolutionLayer",
    "GRID_SAMPLE": "IGridSampleLayer",
    "NMS": "INMSLayer",
    "ACTIVATION": "IActivationLayer",
    "POOLING": "IPoolingLayer",
    "LRN": "ILRNLayer",
    "SCALE": "IScaleLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "DECONVOLUTION": "IDeconvolutionLayer",
    "CONCATENATION": "IConcatenationLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "UNARY": "IUnaryLayer",
    "PADDING": "IPaddingLayer",
    "SHUFFLE": "IShuffleLayer",
    "REDUCE": "IReduceLayer",
    "TOPK": "ITopKLayer",
    "GATHER": "IGatherLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "RAGGED_SOFTMAX": "IRaggedSoftMaxLayer",
    "CONSTANT": "IConstantLayer",
    "IDENTITY": "IIdentityLayer",
    "CAST": "ICastLayer",
    "SLICE": "ISliceLayer",
    "SHAPE": "IShapeLayer",
    "PARAMETRIC_RELU": "IParametricReLULayer",
    "RESIZE": "IResizeLayer",
    "TRIP_LIMIT": "ITripLimitLayer",
    "RECURRENCE": "IRecurrenceLayer",
    "ITERATOR": "IIteratorLayer",
    "LOOP_OUTPUT": "ILoopOutputLayer",
    "SELECT": "ISelectLayer",
    "ASSERTION": "IAssertionLayer",
    "FILL": "IFillLayer",
    "QUANTIZE": "IQuantizeLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "CONDITION": "IConditionLayer",
    "CONDITIONAL_INPUT": "IIfConditionalInputLayer",
    "CONDITIONAL_OUTPUT": "IIfConditionalOutputLayer",
    "SCATTER": "IScatterLayer",
    "EINSUM": "IEinsumLayer",
    "ONE_HOT": "IOneHotLayer",
    "NON_ZERO": "INonZeroLayer",
    "REVERSE_SEQUENCE": "IReverseSequenceLayer",
    "NORMALIZATION": "INormalizationLayer",
    "SQUEEZE": "ISqueezeLayer",
    "UNSQUEEZE": "IUnsqueezeLayer",
    "CUMULATIVE": "ICumulativeLayer",
    "DYNAMIC_QUANTIZE": "IDynamicQuantizeLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer",
    "ATTENTION_OUTPUT": "IAttentionOutputLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "MOE": "IMoELayer",
}


class Layer:
    """One layer: its names, and, while it is prepared, TensorRT's own object for the attributes."""

    def __init__(self, native: Any, constants: Mapping[str, Tensor]) -> None:
        self.native = native
        self.plain = type(native) is trt.ILayer
        self.kind = layer_kind(native)
        self.name: str = native.name
        self.constants = constants
        self.input_tensors = [native.get_input(i) for i in range(native.num_inputs)]
        self.output_tensors = [native.get_output(i) for i in range(native.num_outputs)]
        self.inputs: list[str | None] = [None if tensor is None else tensor.name for tensor in self.input_tensors]
        self.outputs: list[str] = [tensor.name for tensor in self.output_tensors]

    def let_go(self) -> None:
        """Gives TensorRT's object its class back: of a typed activation or pooling, `type` means something else."""
        if self.plain:
            self.native.__class__ = trt.ILayer

    @functools.cached_property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """Shapes as TensorRT infers them, -1 for a dim that is not known; () for an input that is not there."""
        return [() if tensor is None else shape_of(tensor, self.name) for tensor in self.input_tensors]

    @functools.cached_property
    def input_types(self) -> list[str]:
        """Names of `trt.DataType`; "" for an input that is not there."""
        return ["" if tensor is None else tensor.dtype.name for tensor in self.input_tensors]

    @functools.cached_property
    def output_shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(tensor, self.name) for tensor in self.output_tensors]

    @functools.cached_property
    def output_types(self) -> list[str]:
        return [tensor.dtype.name for tensor in self.output_tensors]

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype in which the first output is kept."""
        return STORAGE[self.output_types[0]]

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(f"reference evaluator: layer {self.name!r} ({self.kind}): {reason}")

    def has_input(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def weights(self, role: str, *names: str) -> Tensor:
        """The layer's own weights `role` (`kernel`, `bias`, ...), flat, in memory of their own; empty if it has none.

        Raises:
            Unsupported: TensorRT does not let Python read this dtype back, and `constants` has none of `names`
                (`<layer>.<role>` if there are no names).
        """
        found = getattr(self.native, role)
        if not isinstance(found, trt.Weights):
            return torch.from_numpy(found.copy()).reshape(-1)
        if found.size == 0:
            return torch.empty(0, dtype=STORAGE[found.dtype.name], device="cpu")
        return self.given(found.dtype.name, found.size, *(names or (f"{self.name}.{role}",)))

    def given(self, dtype: str, size: int, *names: str) -> Tensor:
        """The tensor that the caller supplies, flat, for weights of a dtype that Python cannot read back."""
        for name in names:
            tensor = self.constants.get(name)
            if tensor is None:
                continue
            if dtype in ("FP4", "E8M0"):
                tensor = tensor.float()
            if tensor.dtype != STORAGE[dtype] or tensor.numel() != size:
                have = f"{tensor.dtype} with {tensor.numel()} elements"
                raise ConversionError(f"constants[{name!r}] is {have}; the network has {dtype}, {size}")
            return tensor.detach().cpu().clone().reshape(-1)
        raise self.unsupported(f"weights of dtype {dtype} cannot be read back: give constants[{names[0]!r}]")


def dims(value: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in value)


def axes_of(mask: int) -> list[int]:
    """The axes whose bits are set in TensorRT's bit mask."""
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def shape_of(tensor: Any, layer: str) -> tuple[int, ...]:
    """Shape of an `ITensor` as TensorRT infers it, -1 for what is not known."""
    try:
        return dims(tensor.shape)
    except (RuntimeError, ValueError) as error:
        raise ConversionError(
            f"TensorRT cannot infer the shape of {tensor.name!r} (layer {layer!r}): {error}"
        ) from error


def layer_kind(native: Any) -> str:
    """The name of the layer's type. Once its class is set, `type` of an activation or pooling is something else."""
    kind: str = trt.ILayer.type.__get__(native).name
    if kind in CLASSES and type(native) is trt.ILayer:
        native.__class__ = getattr(trt, CLASSES[kind])
    return kind


Run = Callable[..., Any]
Prepare = Callable[[Layer], Run]


@dataclass(frozen=True)
class Rule:
    """How a kind of layer is run.

    exact: it only moves or compares values, so low floats need not be widened.
    host: the inputs whose values are read on the host.
    weights: the layer's own weights; those that are there are given to the function by these names.
    places: the function makes tensors and is given `device`.
    data_dependent: the size of what it gives depends on values.
    """

    prepare: Prepare
    exact: bool
    host: tuple[int, ...]
    weights: tuple[str, ...]
    places: bool
    data_dependent: bool


RULES: dict[str, Rule] = {}


def evaluates(
    kind: str,
    *,
    exact: bool = False,
    host: tuple[int, ...] = (),
    weights: tuple[str, ...] = (),
    places: bool = False,
    data_dependent: bool = False,
) -> Callable[[Prepare], Prepare]:
    """Registers the function that prepares layers of type `kind` (a `trt.LayerType` by name)."""

    def register(prepare: Prepare) -> Prepare:
        RULES[kind] = Rule(prepare, exact, host, weights, places, data_dependent)
        return prepare

    return register
