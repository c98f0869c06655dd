"""Which of the user's modules a node of a graph comes from, as Dynamo noted it."""

from __future__ import annotations

import re

from torch.fx import Node


def modules_around(node: Node) -> list[tuple[str, str]]:
    """The modules around a node, the outermost first: the path from the model, and the class. The model itself, and
    what has no name in it, has an empty path.
    """
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        plain = re.sub(r"\._modules|\._parameters", "", str(path))
        plain = re.sub(r"^L\['?\w+'?\]", "", plain)
        plain = re.sub(r"\['?([^'\]]*)'?\]", r".\1", plain).strip(".")
        found.append((plain, kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__))
    return found
