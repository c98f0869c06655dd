"""The op that stands for an engine in an exported program. In: a segment's arguments, its engine's bytes, and what is
to be known of it. Out: the segment's results, as tensors of their own.

`import trt_dynamo.engine_op` defines it, with our other ops, so that `torch.export.load` knows them. What answers is
loaded at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trt_dynamo.operators import (  # noqa: F401  an exported graph may have these ops
    attention,
    fake_quantize,
    fourier,
    recurrent,
    resampling,
)


@torch.library.custom_op("trt_dynamo::run_engine", mutates_args=())
def run_engine(
    tensors: Sequence[torch.Tensor], numbers: Sequence[int], engine: torch.Tensor, manifest: str
) -> list[torch.Tensor]:
    """The results of a segment, without gradients.

    Args:
        tensors, numbers: the segment's arguments, in their order, by kind.
        engine: uint8, entries of the engine cache as one stream (`cache.packing`).
        manifest: JSON, the segment's graph in it (`carried_segment`).

    Raises:
        EngineError: the manifest is of another format, or the tensors lie on another device; with `strict`, what else
            ends in eager.
    """
    from trt_dynamo.carried_runner import runner_of

    return runner_of(engine, manifest)(tensors, numbers)


@run_engine.register_fake
def fake_run_engine(
    tensors: Sequence[torch.Tensor], numbers: Sequence[int], engine: torch.Tensor, manifest: str
) -> list[torch.Tensor]:
    from trt_dynamo.carried_segment import segment_in

    return segment_in(manifest).like_results(tensors, numbers)


RUN_ENGINE = torch.ops.trt_dynamo.run_engine.default
