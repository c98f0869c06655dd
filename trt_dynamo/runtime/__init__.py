"""What happens in a call: which engine answers, on which stream, with whose memory, or why eager does.

`segment_runner` is where a call of a segment comes in. It asks `segment_engines` for the engine that has the call's
weights, which an `Engine` runs by a `Call`. `one_look`, `whole_graph` and `layouts` wrap whole compiled calls.
"""

from trt_dynamo.runtime.background import wait_for_builds
from trt_dynamo.runtime.engine import Engine, OutsideProfile
from trt_dynamo.runtime.segment_runner import SegmentModule, SegmentRunner

__all__ = ["Engine", "OutsideProfile", "SegmentModule", "SegmentRunner", "wait_for_builds"]
