"""INT8, FP8 and INT4: models get quantize and dequantize nodes, by calibration or by training, or weights of codes. No
TensorRT is needed for it.

Comes in: a model in floats, or one that was trained with fake quantization. Goes out: a model for torch.compile.
"""

from __future__ import annotations

from trt_dynamo.quantization.fake_quantizers import freeze_fake_quantize
from trt_dynamo.quantization.front import quantize

__all__ = ["freeze_fake_quantize", "quantize"]
