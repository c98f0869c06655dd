"""An explanation as one HTML page, which needs no network and no other file.

Comes in: an explanation as plain data. Goes out: the page's text, made from `explanation.html` with the data inside.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

TEMPLATE = "explanation.html"


def page(found: Mapping[str, Any], title: str = "") -> str:
    """The page for what `Explanation.as_dict` gives; `title` names the model."""
    template = importlib.resources.files("trt_dynamo").joinpath(TEMPLATE).read_text(encoding="utf-8")
    shown = {name: found[name] for name in ("graphs", "broken", "breaks", "inductor", "nodes", "engines")}
    # No text of the model's may end the script: in JSON, < is the same as its escape.
    data = json.dumps({**shown, "builds": [told(build) for build in found["builds"]]}).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title or "A model"), "DATA": data}
    return re.sub("@(TITLE|DATA)@", lambda found: parts[found[1]], template)


def told(build: Mapping[str, Any]) -> str:
    """A build in a line."""
    outcome = f"failed ({build['error']})" if build["error"] else "from the cache" if build["hit"] else "built"
    reason = f"{build['reason']}: {build['detail']}" if build["detail"] else build["reason"]
    return f"{build['segment']}: {outcome} in {build['seconds']:.1f} s; {reason}"
