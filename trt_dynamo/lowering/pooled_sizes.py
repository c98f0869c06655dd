"""Keeps Dynamo from asking whether a size can be divided by a pooling layer's stride.

For the shape of a pooling layer's result, torch 2.11 divides and looks at the remainder, though Python's division needs
no correction. Dynamo guards each such look, so each layer would double the number of graphs for images whose height or
width varies. Newer versions divide only. Where this backend asks for the graph, so does 2.11; all others get
torch's own division as before.
"""

from __future__ import annotations

from typing import Any

from torch import _meta_registrations

from trt_dynamo.lowering.lengths import traced_for_us

theirs: Any = _meta_registrations.div_rtn


def divided(x: Any, y: Any) -> Any:
    """`x / y`, rounded towards minus infinity; both may be symbolic."""
    return x // y if traced_for_us() else theirs(x, y)


if "bool" in theirs.__code__.co_names:  # it asks for the remainder's sign
    _meta_registrations.div_rtn = divided
