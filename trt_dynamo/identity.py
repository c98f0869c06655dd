"""What makes an engine this one and no other, beside its graph, and what its manifest says of it.

Comes in: an engine that is wanted, a converted network. Goes out: the parts of a cache key, and JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.aten_converters import ConvertedNetwork, weights_manifest
from trt_dynamo.aten_converters.registry import lookup
from trt_dynamo.cache import digests, segment_key
from trt_dynamo.origins import Origin
from trt_dynamo.partition import Segment
from trt_dynamo.precision import Chosen, Precision
from trt_dynamo.profiles import Ranges
from trt_dynamo.settings import Settings
from trt_dynamo.weights import EARLY


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """What all engines of a segment have in common. They compute as `precision` says, and where that is float32, in
    TF32 if `tf32`.
    """

    segment: Segment
    precision: Precision
    tf32: bool
    device: torch.device
    settings: Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """One engine: with these weights baked in, or taking them as inputs if None, or with weights that can be changed,
    if `refit`; for these ranges of sizes, and with profiles of their own for the narrower ones that are `hot`.
    """

    blueprint: Blueprint
    weights: Sequence[torch.Tensor] | None
    ranges: Ranges
    hot: Sequence[Ranges] = ()
    refit: bool = False

    @property
    def named_weights(self) -> dict[str, torch.Tensor]:
        """The weights that the network holds, by the names of the segment's arguments."""
        return {} if self.weights is None else dict(zip(self.blueprint.segment.weights, self.weights, strict=True))


@dataclasses.dataclass(frozen=True)
class Identity:
    """`key` is the engine's in the cache; `digests` have the content of each weight that is baked in, by name; `chosen`
    is the segment's graph in its precision; `origin` tells people what the key is made of; `others` are the keys of
    engines that serve as well, where there are some.
    """

    key: str
    digests: Mapping[str, str]
    chosen: Chosen
    origin: Callable[[], Origin]
    others: Callable[[], Sequence[str]] = tuple


def identity_of(wanted: Wanted) -> Identity:
    """What makes the engine this one and no other.

    Raises:
        Unsupported: something in the graph has no content that a key could hold.
    """
    blueprint, given = wanted.blueprint, wanted.named_weights
    settings = blueprint.settings
    contents = {} if wanted.refit else dict(zip(given, digests_of([*given.values()]), strict=True))
    chosen = blueprint.precision.graph(wanted.weights)
    key_of = functools.partial(segment_key, ranges=wanted.ranges, hot=wanted.hot)
    shaped_by: dict[str, Any] = {
        "weights": dict.fromkeys(given, "refit") if wanted.refit else contents,
        "settings": settings,
        "platform": platform_of(blueprint.device, settings, blueprint.tf32),
        "converters": converters_version(blueprint.segment),
    }
    key = key_of(chosen.module, **shaped_by)
    as_it_is = functools.partial(key_of, blueprint.segment.module)  # two precisions of a graph have one origin
    # Only what the cache lacks asks for the origin.
    origin = functools.cache(lambda: origin_of(as_it_is, **shaped_by))

    def others() -> list[str]:
        mine = target_of(blueprint.device)
        if mine is None or settings.targets == (mine,):
            return []
        return [key_of(chosen.module, **{**shaped_by, "settings": dataclasses.replace(settings, targets=(mine,))})]

    return Identity(key, contents, chosen, origin, others)


def digests_of(weights: Sequence[torch.Tensor]) -> list[str]:
    """The SHA-256 of each, perhaps from a look that began in this compilation."""
    early = EARLY.get()
    known = early.digests(weights) if early is not None else None
    return digests(weights) if known is None else known


def manifest_of(network: ConvertedNetwork) -> dict[str, Any]:
    """What the runtime must know of an engine's inputs and outputs, as JSON."""

    def describe(binding: Any) -> dict[str, Any]:
        dtype = str(binding.dtype).removeprefix("torch.")
        return {
            "name": binding.name,
            "position": binding.position,
            "dtype": dtype,
            "order": list(binding.order),
            "size": binding.size,
        }

    return {
        "inputs": [describe(b) for b in network.inputs],
        "outputs": [describe(b) for b in network.outputs],
        "weights": weights_manifest(network.weights),
    }


def platform_of(device: torch.device, settings: Settings, tf32: bool) -> dict[str, str]:
    """Where an engine can be used: a portable one of TensorRT-RTX anywhere, one of TensorRT on this kind of GPU."""
    facts = {
        "flavor": tensorrt_module.flavor(),
        "tensorrt": tensorrt_module.version(),
        "tf32": str(tf32),
    }
    if tensorrt_module.is_rtx() and settings.cuda_graphs != "off":
        facts["scratch memory"] = "the caller's"  # a flag of the build
    if device.type == "cuda" and not tensorrt_module.is_rtx():
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["capability"] = str(torch.cuda.get_device_capability(device))
    return facts


def target_of(device: torch.device) -> str | None:
    """The target for which an engine would have been built ahead of time for this GPU alone; None where engines are
    not built so.
    """
    if not tensorrt_module.is_rtx() or device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def converters_version(segment: Segment) -> str:
    """Our version, and the source of the user's own converters that the segment uses."""
    parts = [our_version()]
    targets = {str(n.target): n.target for n in segment.module.graph.nodes if n.op == "call_function"}
    for _, target in sorted(targets.items()):
        used = lookup(target)
        if used is not None and not used.function.__module__.startswith("trt_dynamo."):
            parts.append(source_of(used.function))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def our_version() -> str:
    """A digest of the code that makes networks, so that an engine never outlives the converter that made it."""
    folder = Path(__file__).parent
    files = [*sorted((folder / "aten_converters").glob("*.py")), folder / "build.py", folder / "profiles.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = function.__code__
        return f"{function.__qualname__} {code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"


def origin_of(
    key_of: Callable[..., str],
    weights: Mapping[str, str],
    settings: Settings,
    platform: Mapping[str, str],
    converters: str,
) -> Origin:
    """What the parts of a key say of an engine, for people: to tell why it is not the one that was stored before."""
    graph = key_of(weights=dict.fromkeys(weights, "baked"), settings=Settings(), platform={}, converters="")
    chosen = {f"setting {name}": str(value) for name, value in settings.engine_fields().items()}
    content = hashlib.sha256("".join(weights.values()).encode()).hexdigest()
    return Origin(graph, {**chosen, **platform, "converters": converters, "weights": content})
