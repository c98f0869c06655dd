"""Writes the pages of docs/ that the code itself holds, so that the two cannot differ: settings and operators.

python -m scripts.make_docs            writes
python -m scripts.make_docs --check    says whether they are current, with exit code 1 when one is not
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trt_dynamo.cli.operators_page import converters_part, operators_page
from trt_dynamo.setting_values import NO, YES, Rule
from trt_dynamo.settings import FIELDS, rule_of, type_of, variable_of

DOCS = Path(__file__).parent.parent / "docs"

HEAD = """\
<!-- Made by `make docs` from trt_dynamo/settings.py: edit that. -->

# Settings

A setting is an option of the backend or an environment variable; options beat variables, which beat the defaults:

```python
model = torch.compile(model, backend="tensorrt", options={"min_segment_nodes": 5})
```

```
TRT_DYNAMO_MIN_SEGMENT_NODES=5 python serve.py
```

An unknown option, or a value that does not parse, raises `SettingsError` and names the nearest valid choice. A variable
that is wrong warns once and is ignored; an empty one counts as not set. `python -m trt_dynamo info` prints what is in
force, and where each value comes from.

| option | variable | values | default | what it does |
| --- | --- | --- | --- | --- |
"""

TAIL = """
A change of a setting marked * makes other engines; those in the cache for the old value stay there, for when it comes
back. Sizes take the units K, M, G and T (powers of 1024), lists are separated by commas or blanks.
"""


def settings_page() -> str:
    """The text of docs/settings.md."""
    return HEAD + "".join(line(name) for name in FIELDS) + TAIL


def line(name: str) -> str:
    """One setting's line of the table."""
    rule, default = rule_of(name), FIELDS[name].default
    option = f"`{name}`" if not rule.env_only else "(variable only)"
    cells = [option + "*" * rule.engine, f"`{variable_of(name)}`", values(type_of(name), rule)]
    cells += [shown(default, rule), rule.help[0].upper() + rule.help[1:]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def values(kind: Any, rule: Rule) -> str:
    """What may be given, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType) and type(None) not in arguments:
        return ", or ".join(values(argument, rule) for argument in arguments).replace("a folder", "a file's path")
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return f"{values(inner, rule)}, or `none`"
    if origin is tuple:
        return f"a list, each as {rule.example}"
    if kind is bool:
        return f"`{YES[0]}` or `{NO[0]}`"
    if kind is int:
        bounds = f" from {rule.low} to {rule.high}" if rule.high is not None else f", {rule.low} or more"
        return "a size" if rule.unit else f"a whole number{bounds}"
    if kind is float:
        return "a number above 0"
    return "a text" if kind is str else "a folder"


def shown(default: Any, rule: Rule) -> str:
    """A default as one would write it."""
    if default is None or default in ((), ""):
        return "none"
    if isinstance(default, bool):
        return f"`{int(default)}`"
    if rule.unit == "bytes" and default % 2**30 == 0:
        return f"`{default // 2**30}GB`"
    return f"`{default}`"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page, "operators.md": operators_page}


def is_current(file: Path, page: str) -> bool:
    """Whether the file holds the page; of another torch's page, all but what is torch's."""
    text = file.read_text() if file.is_file() else ""
    versions = [re.findall(r"^torch (\S+) tags", t, re.MULTILINE) for t in (text, page)]
    return text == page if versions[0] == versions[1] else text.endswith(converters_part())


def main(arguments: list[str]) -> int:
    """Writes the pages, or with `--check` compares them."""
    stale = [name for name, page in PAGES.items() if not is_current(DOCS / name, page())]
    for name in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{name} is not what the code says: run make docs\n")
        else:
            (DOCS / name).write_text(PAGES[name]())
    return int(bool(stale and "--check" in arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
