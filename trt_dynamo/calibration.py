"""`calibrate`: batches through a model, so that `precision=auto` knows which values a half type cannot hold.

Comes in: a model and batches. Goes out: what was recorded, for this process; the cache keeps it beside the engines that
are made by it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.graph_breaks import ANOTHER_GO
from trt_dynamo.lowering import Lowered, lower
from trt_dynamo.lowering.lengths import keeps_lengths
from trt_dynamo.partition import Segment, partition
from trt_dynamo.precision import Kept, Precision, SegmentPrecision
from trt_dynamo.precision.recording import Recording
from trt_dynamo.recorded_shapes import original
from trt_dynamo.settings import Settings

log = logging.getLogger(__name__)

# A segment, what its calls record, and its weights by placeholder.
Recorded = tuple[Segment, Recording, Mapping[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration found: how many batches went through, and what each engine will compute in; `kept` are the
    nodes and weights that stay in float32 though their ops need not, each with its reason.
    """

    batches: int
    segments: tuple[SegmentPrecision, ...]

    @property
    def kept(self) -> tuple[Kept, ...]:
        return tuple(kept for segment in self.segments for kept in segment.chosen.kept)

    def __str__(self) -> str:
        return "\n".join([f"{self.batches} batches recorded", *map(str, self.segments)])


def calibrate(
    model: Callable[..., Any],
    loader: Iterable[Any],
    *,
    run: Callable[[Any, Any], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Calibration:
    """Runs every batch through the model in eager, without gradients, and records how large and how small the values
    get. Models with these weights that are compiled with `precision=auto` from now on compute in float16 what bears it.

    Args:
        model: compiled or not; in the state (`eval()`, device) in which it will be used.
        loader: batches, such as a DataLoader's. A mapping is given to the model as keyword arguments, a tuple or list
            as positional ones, anything else as the one argument.
        run: calls the model with a batch where that is not enough: `lambda model, batch: model(batch[0])`.
        options: those of `torch.compile`; what divides the model into engines must be the same there.
        dynamic: as it is given to `torch.compile`.

    Raises:
        TensorRTMissing: no TensorRT is installed, which says what goes into engines.
        SettingsError: an option is unknown or does not parse.
        ValueError: there was no batch.
    """
    settings = dataclasses.replace(Settings.from_env().merge(options), precision="auto")
    tensorrt_module.load()
    recordings: list[Recorded] = []
    recorded = torch.compile(original(model), backend=recording_backend(recordings, settings), dynamic=dynamic)
    batches = 0
    with torch.no_grad():
        for batch in loader:
            (run or call)(recorded, batch)
            batches += 1
    if batches == 0:
        raise ValueError("the loader gave no batch: an iterator can be used only once")
    return Calibration(batches, tuple(described(*each, settings) for each in enumerate(recordings)))


def recording_backend(recordings: list[Recorded], settings: Settings) -> Callable[..., Any]:
    """A backend of torch.compile that runs in eager what would go into engines, and adds a recording for each."""

    def record(lowered: Lowered) -> Callable[..., Any]:
        with unset_fake_temporarily(), torch.no_grad():
            parts = partition(lowered.module, lowered.names, settings)
            for segment in parts.segments:
                weights = dict(zip(segment.weights, lowered.weights_of(segment.weights), strict=True))
                recording = Recording(segment.module, weights)
                recordings.append((segment, recording, weights))
                setattr(parts.module, segment.name, recording)
        return parts.module.forward

    @keeps_lengths
    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return lower(module, inputs, record, settings)
        except ANOTHER_GO:
            raise
        except Exception as error:  # noqa: BLE001  the backend leaves such a graph to eager, and so has nothing to know of it
            log.warning("the values of a graph are not recorded: %s: %s", type(error).__name__, error)
            return module.forward

    return backend


def described(number: int, recorded: Recorded, settings: Settings) -> SegmentPrecision:
    """What the engine of a recorded segment will compute in."""
    segment, recording, weights = recorded
    precision = Precision(segment.module, segment.weights, settings, recording.finish())
    return SegmentPrecision(f"segment {number}", settings.precision, precision.graph(list(weights.values())))


def call(model: Callable[..., Any], batch: Any) -> Any:
    """Calls a model with a batch as its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
