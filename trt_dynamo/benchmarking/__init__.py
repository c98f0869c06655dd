"""Times a model in eager, by Inductor and on TensorRT engines, side by side: `python -m trt_dynamo bench`.

Comes in: a model with arguments (`sources`), which columns to time (`columns`), for how long (`timing`). Goes out: a
`Result` for each model, as a table, a chart (`chart`) or plain data. `measuring` puts them together.
"""

from __future__ import annotations

from trt_dynamo.benchmarking.columns import COLUMNS
from trt_dynamo.benchmarking.measuring import Request, measure
from trt_dynamo.benchmarking.results import Cell, Result
from trt_dynamo.benchmarking.sources import Case

__all__ = ["COLUMNS", "Case", "Cell", "Request", "Result", "measure"]
