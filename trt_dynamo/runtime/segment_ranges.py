"""The ranges of sizes that a segment's engines are built for: they grow with what comes, and shrink where an engine for
them cannot be had.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from trt_dynamo.errors import BuildError
from trt_dynamo.hot_ranges import SeenSizes
from trt_dynamo.profiles import Ranges, Sizes

log = logging.getLogger(__name__)

# In TensorRT's words.
MEMORY = re.compile("out ?of ?memory|insufficient memory|not enough memory|allocat", re.IGNORECASE)


class SegmentRanges:
    """Those of one segment, whose owner sees to it that one thread at a time changes them.

    Args:
        name: the segment's, for the log.
        module: its graph.
        limit: the most bytes that a tensor may have, None: as many as it likes.
        narrow: how many narrow profiles an engine gets beside the one for the whole ranges.
    """

    def __init__(self, name: str, module: GraphModule, limit: int | None, narrow: int) -> None:
        self.name = name
        inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self.sizes = Sizes(inputs, [node.meta.get("val") for node in module.graph.nodes], limit)
        self.now: Ranges = self.sizes.first
        self.seen = SeenSizes(inputs, narrow)
        self.refused: list[tuple[Ranges, str]] = []  # those that no engine takes, and why
        if self.sizes.note:
            log.info("%s: %s", name, self.sizes.note)

    def grow(self, args: Sequence[Any], why: object, built_for: Ranges) -> bool:
        """Lets the sizes of a call in. False where that asks for no other engine than the one that was `built_for`."""
        wider = self.sizes.grown(self.now, args)
        why_not = next((each for ranges, each in self.refused if includes(wider, ranges)), None)
        if why_not is not None:
            log.debug("%s: %s, and %s", self.name, why, why_not)
            return False
        if wider == self.now and built_for == self.now:
            log.debug("%s: %s, and no range can grow", self.name, why)
            return False
        if wider != self.now:
            log.info("%s: %s; the ranges grow", self.name, why)
            self.now = wider
        return True

    def shrink(self, ranges: Ranges, error: BuildError) -> bool:
        """Whether there are narrower ranges to try, after a build that found too little memory for these."""
        narrower = self.sizes.narrower(ranges)
        if self.now != ranges or narrower is None or not MEMORY.search(str(error)):
            return False
        log.warning("%s: an engine for smaller sizes is built: %s", self.name, error)
        self.refused.append((ranges, str(error)))
        self.now = narrower
        return True

    def go_back(self, built_for: Ranges, error: Exception) -> bool:
        """Whether an engine that was `built_for` other ranges goes on, after one for these could not be made: sizes
        outside of them stay in eager.
        """
        if built_for == self.now:
            return False
        log.warning("%s: larger sizes stay in eager, no engine takes them: %s", self.name, error)
        self.refused.append((self.now, str(error)))
        self.now = built_for
        return True


def includes(wide: Ranges, narrow: Ranges) -> bool:
    """Whether all sizes of the one lie in the other."""
    return all(s in wide and wide[s].min <= span.min and span.max <= wide[s].max for s, span in narrow.items())
