"""Writes docs/settings.md from the settings themselves, so that the two cannot differ.

python -m scripts.make_docs            writes
python -m scripts.make_docs --check    says whether it is current, with exit code 1 when it is not
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from trt_dynamo.settings import FIELDS, NO, YES, Rule, rule_of, type_of, variable_of

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"

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
    return "a folder"


def shown(default: Any, rule: Rule) -> str:
    """A default as one would write it."""
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return f"`{int(default)}`"
    if rule.unit == "bytes" and default % 2**30 == 0:
        return f"`{default // 2**30}GB`"
    return f"`{default}`"


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` compares it."""
    page = settings_page()
    if "--check" not in arguments:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(page)
        return 0
    if TARGET.is_file() and TARGET.read_text() == page:
        return 0
    sys.stderr.write(f"{TARGET.name} is not what the settings say: run make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
