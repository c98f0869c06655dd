"""From an ATen graph to a TensorRT network: `convert` walks the nodes, one converter each, and checks every result."""

from __future__ import annotations

from trt_dynamo.aten_converters import (  # noqa: F401  the converters register themselves
    activations,
    attention,
    comparison,
    convolution,
    creation,
    data_dependent,
    distance,
    division,
    fractional_pooling,
    functions,
    grouped_products,
    indexing,
    matmul,
    normalization,
    padding,
    pointwise,
    pooling,
    quantization,
    quantized_by_limit,
    recurrent,
    recurrent_kernels,
    reduction,
    resampling,
    scan,
    scatter,
    sorting,
    special,
    views,
)
from trt_dynamo.aten_converters.conversion import ConvertedNetwork, convert
from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.aten_converters.refittable import WeightBinding, weights_manifest
from trt_dynamo.aten_converters.registry import CONVERTERS, Converter, converter

__all__ = [
    "CONVERTERS",
    "ConvertedNetwork",
    "Converter",
    "Network",
    "Tensor",
    "WeightBinding",
    "convert",
    "converter",
    "weights_manifest",
]
