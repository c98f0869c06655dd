"""What Dynamo itself leaves to eager, so that no backend ever sees it, and what it traces again because a guard failed:
told from Dynamo's own counters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch.nn.utils.rnn import PackedSequence

from trt_dynamo.reports import count
from trt_dynamo.settings import warn_once

# Dynamo's own ways of asking for another go, which a backend lets pass.
ANOTHER_GO = (RestartAnalysis, SkipFrame)

RECURRENT = (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN)

SKIPPED = (
    "nn.LSTM, nn.GRU and nn.RNN run in eager, with the rest of the function that calls them: Dynamo does not trace "
    "them unless torch._dynamo.config.allow_rnn = True is set before the model is compiled"
)
PACKED = "packed sequences run in eager: their layout depends on the values of the lengths"


def counted() -> dict[str, int]:
    """Dynamo's messages so far on what it does not trace, and how often each came."""
    utils = sys.modules.get("torch._dynamo.utils")
    counters = getattr(utils, "counters", {})
    found: dict[str, int] = {}
    for kind in ("unimplemented", "graph_break"):
        for message, times in counters.get(kind, {}).items():
            found[str(message)] = found.get(str(message), 0) + times
    return found


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collects, at the end of the block, why Dynamo left something to eager inside it."""
    before, reasons = counted(), list[str]()
    yield reasons
    new = [message for message, times in counted().items() if times > before.get(message, 0)]
    reasons += dict.fromkeys(map(reworded, new))


def reworded(message: str) -> str:
    """Dynamo's message in one line; ours where we can say more."""
    if "allow_rnn" in message:
        return SKIPPED
    if re.search(r"\bpack(_padded)?_sequence|pad_packed_sequence|PackedSequence", message):
        return PACKED
    title, _, rest = message.partition("\n")
    explanation = re.search(r"Explanation: (.*)", rest)
    return f"{title}: {explanation[1]}" if explanation else title


def foreseen(model: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """What Dynamo will not trace, as model and arguments show: it says so once, and may have done that before."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    skipped = not allows_recurrent() and any(isinstance(module, RECURRENT) for module in modules)
    packed = any(isinstance(arg, PackedSequence) for arg in args)
    return [SKIPPED] * skipped + [PACKED] * packed


def allows_recurrent() -> bool:
    import torch._dynamo.config as dynamo

    return bool(getattr(dynamo, "allow_rnn", True))


def warn_if_recurrent_skipped() -> None:
    """Says once that Dynamo has met a recurrent layer in this process and does not trace it."""
    if not allows_recurrent() and any("allow_rnn" in message for message in counted()):
        warn_once(SKIPPED)


def note_guard_failure() -> None:
    """Counts the graph that Dynamo has just made, where it stands for one whose guards did not hold. The first guard
    that failed is the reason, in Dynamo's words, without the number of the graph.
    """
    utils = sys.modules.get("torch._dynamo.utils")
    context = getattr(utils, "get_metrics_context", lambda: None)()
    reason = getattr(context, "_metrics", {}).get("recompile_reason")
    if reason:
        count("guard_failures", re.sub(r"^\d+/\d+: ", "", str(reason)).splitlines()[0].split("  # ")[0].strip())
