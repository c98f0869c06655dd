"""The reference evaluator: TensorRT's own network definition, run in PyTorch by each layer's documented meaning.

In: an `INetworkDefinition` and tensors by name. Out: tensors by name. It never looks at the graph that the network was
made from, nor at the converters, so that it can judge them. `ReferenceEngine` runs a network behind the interface of
`ICudaEngine` and `IExecutionContext`.
"""

from trt_dynamo.reference import (  # noqa: F401  registers the layers
    attention,
    convolution,
    indexing,
    matmul,
    pointwise,
    quantization,
    reduction,
    resampling,
    views,
)
from trt_dynamo.reference.context import ReferenceContext
from trt_dynamo.reference.engine import ReferenceEngine, ReferenceRuntime
from trt_dynamo.reference.evaluator import Evaluator, evaluate
from trt_dynamo.reference.refit import ReferenceRefitter

__all__ = ["Evaluator", "ReferenceContext", "ReferenceEngine", "ReferenceRefitter", "ReferenceRuntime", "evaluate"]
