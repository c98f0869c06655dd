"""TensorRT as a backend of torch.compile: `torch.compile(model, backend="tensorrt")`, which needs no import of this.

What stands in `__all__` is the public interface. All but the settings and the errors is loaded when it is first used,
so that importing trt_dynamo costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trt_dynamo.errors import (
    BuildError,
    ConversionError,
    EngineError,
    FileError,
    SettingsError,
    TrtDynamoError,
    Unsupported,
)
from trt_dynamo.settings import Settings

if TYPE_CHECKING:
    from trt_dynamo.aten_converters import Network, Tensor, converter
    from trt_dynamo.backend import tensorrt
    from trt_dynamo.cache import register_cache_artifacts
    from trt_dynamo.calibration import Calibration, calibrate
    from trt_dynamo.engine_file import EngineFile, export_engine
    from trt_dynamo.explanation import explain
    from trt_dynamo.exported import ExportedModule, compile
    from trt_dynamo.model_file import load, save
    from trt_dynamo.program_with_engines import exported_program
    from trt_dynamo.quantization import freeze_fake_quantize, quantize
    from trt_dynamo.recorded_shapes import RecordedShapes, record_shapes
    from trt_dynamo.reports import report, reset_report
    from trt_dynamo.sparsity import Sparsified, sparsify
    from trt_dynamo.weights import weights_changed

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "Calibration",
    "ConversionError",
    "EngineError",
    "EngineFile",
    "ExportedModule",
    "FileError",
    "Network",
    "RecordedShapes",
    "Settings",
    "SettingsError",
    "Sparsified",
    "Tensor",
    "TrtDynamoError",
    "Unsupported",
    "__version__",
    "calibrate",
    "compile",
    "converter",
    "explain",
    "export_engine",
    "exported_program",
    "freeze_fake_quantize",
    "load",
    "quantize",
    "record_shapes",
    "register_cache_artifacts",
    "report",
    "reset_report",
    "save",
    "sparsify",
    "tensorrt",
    "weights_changed",
]

# Where each name comes from that is loaded at its first use.
LAZY = {
    "Network": "trt_dynamo.aten_converters",
    "Tensor": "trt_dynamo.aten_converters",
    "converter": "trt_dynamo.aten_converters",
    "Calibration": "trt_dynamo.calibration",
    "EngineFile": "trt_dynamo.engine_file",
    "ExportedModule": "trt_dynamo.exported",
    "RecordedShapes": "trt_dynamo.recorded_shapes",
    "Sparsified": "trt_dynamo.sparsity",
    "calibrate": "trt_dynamo.calibration",
    "compile": "trt_dynamo.exported",
    "explain": "trt_dynamo.explanation",
    "export_engine": "trt_dynamo.engine_file",
    "exported_program": "trt_dynamo.program_with_engines",
    "load": "trt_dynamo.model_file",
    "freeze_fake_quantize": "trt_dynamo.quantization",
    "quantize": "trt_dynamo.quantization",
    "record_shapes": "trt_dynamo.recorded_shapes",
    "register_cache_artifacts": "trt_dynamo.cache",
    "report": "trt_dynamo.reports",
    "reset_report": "trt_dynamo.reports",
    "save": "trt_dynamo.model_file",
    "sparsify": "trt_dynamo.sparsity",
    "tensorrt": "trt_dynamo.backend",
    "weights_changed": "trt_dynamo.weights",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
