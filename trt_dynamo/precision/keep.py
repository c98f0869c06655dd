"""Which nodes a user keeps in float32: patterns over the names of ops, modules and source lines.

In: the patterns of the setting `precision_keep`, then nodes. Out: the pattern that names a node, if one does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from torch._ops import OpOverload
from torch.fx import Node

from trt_dynamo.aten_converters.walker import source_line
from trt_dynamo.module_paths import modules_around

LINES = re.compile(r"(?P<file>.*):(?P<first>\d+)(-(?P<last>\d+))?")


def kept_by(node: Node, patterns: Sequence[str]) -> str | None:
    """The first pattern that names the node.

    `*` and `?` stand for any text and any character. A pattern may be an op (`aten.mm.default`, `aten.mm` or `mm`), a
    module by its path or its class (with all that is in it), or a source line (`model.py:41`, `model.py:41-60`).
    """
    if not patterns:
        return None
    names = [*op_names(node), *module_names(node)]
    line = source_line(node).split(",")[0]
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names) or is_line(line, pattern):
            return pattern
    return None


def op_names(node: Node) -> Iterator[str]:
    if isinstance(node.target, OpOverload):
        packet = str(node.target.overloadpacket)
        yield from (str(node.target), packet, packet.split(".")[-1])


def module_names(node: Node) -> Iterator[str]:
    """The paths and classes of the modules around the node: `encoder.layer.0`, `BertLayer`."""
    for path, kind in modules_around(node):
        if path:
            yield path
        yield kind


def is_line(line: str, pattern: str) -> bool:
    """Whether `file.py:41` is in `file.py:40-60`; a file without folders stands for the file in any folder."""
    found, wanted = LINES.fullmatch(line), LINES.fullmatch(pattern)
    if found is None or wanted is None:
        return False
    first, last = int(wanted["first"]), int(wanted["last"] or wanted["first"])
    file = found["file"] if "/" in wanted["file"] else PurePath(found["file"]).name
    return first <= int(found["first"]) <= last and fnmatch.fnmatchcase(file, wanted["file"])
