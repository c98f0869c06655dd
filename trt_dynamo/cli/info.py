"""`info`: what is installed, whether engines can be built and run here and if not why, the settings, the cache."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator
from typing import Any

import typer

from trt_dynamo.cli.output import AsJson, plural, size, write_json, write_pairs, write_table
from trt_dynamo.errors import in_a_line


def info(as_json: AsJson = False) -> None:
    """What is installed, whether engines can run here, the settings and the cache."""
    with quiet_settings():
        facts = gather()
    if as_json:
        write_json(facts)
        return
    write_pairs(machine_lines(facts))
    typer.echo()
    rows = [(name, show(name, field["value"]), field["source"]) for name, field in facts["settings"].items()]
    write_table(("setting", "value", "source"), rows)
    for problem in facts["problems"]:
        typer.echo(f"\n{problem} The variable is ignored.")


@contextlib.contextmanager
def quiet_settings() -> Iterator[None]:
    """`info` tells the mistakes in the environment in its own words, once."""
    log = logging.getLogger("trt_dynamo.settings")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def gather() -> dict[str, Any]:
    """All that `info` knows, as plain data."""
    import torch

    import trt_dynamo
    from trt_dynamo import trt

    missing = trt.why_missing()
    return {
        "trt_dynamo": trt_dynamo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "tensorrt": {
            "flavor": None if missing else trt.flavor(),
            "version": None if missing else trt.version(),
            "missing": missing,
        },
        "driver": driver(),
        "gpus": gpus(),
        "why_not_runnable": trt.why_not_runnable(),
        "settings": settings_in_force(),
        "problems": problems(),
        "cache": cache(),
    }


def driver() -> dict[str, str | None]:
    """The newest CUDA that the driver serves, as `13.0`, or why that cannot be known."""
    try:
        from cuda.bindings import driver as cuda

        status, version = cuda.cuDriverGetVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return {"cuda": None, "missing": in_a_line(error)}
    if status != cuda.CUresult.CUDA_SUCCESS:
        return {"cuda": None, "missing": f"the driver answers {status.name}"}
    return {"cuda": f"{version // 1000}.{version % 1000 // 10}", "missing": None}


def gpus() -> list[dict[str, Any]]:
    """What torch says about each GPU that it sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory": properties.total_memory})
    return found


def settings_in_force() -> dict[str, dict[str, Any]]:
    """Each setting with its value and where it comes from."""
    from trt_dynamo.settings import FIELDS, Settings, read_env, variable_of

    given, _ = read_env()
    settings = Settings(**given)
    return {
        name: {"value": told(name, value), "source": variable_of(name) if name in given else "default"}
        for name, value in ((name, getattr(settings, name)) for name in FIELDS)
    }


def told(name: str, value: Any) -> Any:
    """The value, without its secrets."""
    from trt_dynamo.cache import without_password
    from trt_dynamo.settings import rule_of

    if name == "cache_remote" and value is not None:
        return without_password(value)
    return "(secret)" if value and rule_of(name).secret else value


def problems() -> list[str]:
    """What is wrong with the TRT_DYNAMO_ variables of this process."""
    from trt_dynamo.settings import read_env

    return read_env()[1]


def cache() -> dict[str, Any]:
    """The cache's folder, what is in it and, where it is not used, why."""
    from trt_dynamo.cache import open_store
    from trt_dynamo.settings import Settings, read_env

    store = open_store(Settings(**read_env()[0]))
    refusal = store.refusal()
    entries = [] if refusal else store.entries()
    return {
        "folder": str(store.folder),
        "entries": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "max_bytes": store.max_bytes,
        "refusal": refusal,
    }


def machine_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything but the settings, a line each."""
    torch, tensorrt, cuda = facts["torch"], facts["tensorrt"], facts["driver"]
    lines = [
        ("trt_dynamo", facts["trt_dynamo"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("torch", f"{torch['version']} (built for CUDA {torch['cuda'] or 'none'})"),
        ("TensorRT", tensorrt["missing"] or f"{tensorrt['flavor']} {tensorrt['version']}"),
        ("driver", f"for CUDA up to {cuda['cuda']}" if cuda["cuda"] else f"none: {first_sentence(cuda['missing'])}"),
    ]
    lines += [("GPU", f"{g['name']}, capability {g['capability']}, {size(g['memory'])}") for g in facts["gpus"]]
    lines += [] if facts["gpus"] else [("GPU", "none")]
    reason = facts["why_not_runnable"]
    stored = facts["cache"]
    held = f"{plural(stored['entries'], 'entry', 'entries')}, {size(stored['bytes'])} of {size(stored['max_bytes'])}"
    return [
        *lines,
        ("engines", f"cannot run here: {reason}" if reason else "can run here"),
        ("cache", stored["refusal"] or f"{stored['folder']} ({held})"),
    ]


def first_sentence(text: str) -> str:
    """The first sentence of an error's text, without its full stop."""
    return text.split(". ")[0].rstrip(".")


def show(name: str, value: Any) -> str:
    """A setting's value for a person to read; `-` where nothing is set."""
    from trt_dynamo.settings import rule_of

    if value is None or value in ((), ""):
        return "-"
    if rule_of(name).unit == "bytes":
        return size(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)
