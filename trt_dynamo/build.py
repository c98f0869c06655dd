"""From a network to plan bytes: profiles, builder flags, the build. Works on a machine without a GPU for
TensorRT-RTX.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from trt_dynamo import log as tensorrt_log
from trt_dynamo import processes, shutdown
from trt_dynamo import trt as tensorrt
from trt_dynamo.aten_converters import ConvertedNetwork
from trt_dynamo.errors import BuildError
from trt_dynamo.profiles import Range, dim_range
from trt_dynamo.progress import progress
from trt_dynamo.settings import Settings, warn_once
from trt_dynamo.trt import trt

log = logging.getLogger(__name__)

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profile_of(converted: ConvertedNetwork, ranges: Mapping[sympy.Symbol, Range]) -> Profile:
    """For each input that the network kept: its smallest, best and largest shape (or value, for a size), in memory
    order.
    """
    profile: Profile = {}
    for binding in converted.inputs:
        dims = [binding.shape[axis] for axis in binding.order] if not binding.size else [binding.value]
        spans = [dim_range(dim, ranges, signed=binding.size) for dim in dims]
        profile[binding.name] = (tuple(s.min for s in spans), tuple(s.opt for s in spans), tuple(s.max for s in spans))
    return profile


def build(
    converted: ConvertedNetwork,
    profile: Profile,
    settings: Settings,
    *,
    hot: Sequence[Profile] = (),
    label: str = "",
    refit: bool = False,
    tf32: bool = False,
) -> bytes:
    """The serialized engine. With `refit` the weights of a network converted with `refit` can be replaced in it; with
    `tf32` its float32 products may be computed in TF32.

    `profile` is the engine's first, with all sizes; `hot` are further ones, each within it.

    Raises:
        BuildError: TensorRT refused; the text ends with TensorRT's own words. Or this is a child that cannot build.
    """
    if processes.cannot_build:
        raise BuildError(processes.cannot_build[0])
    builder, network = converted.network.builder, converted.network.raw
    config = builder.create_builder_config()
    configure(config, settings, refit=refit, tf32=tf32)
    if settings.cuda_graphs != "off":
        make_capturable(config, network)
    for each in (profile, *hot):
        add_profile(builder, config, converted, each)
    started = time.perf_counter()
    with tensorrt_log.collected() as errors:
        with shutdown.in_tensorrt(), progress(config, settings, label):
            data = builder.build_serialized_network(network, config)
        if data is None:
            raise BuildError(why_not_built(errors, label, refit=refit))
    plan = bytes(data)
    log.info(
        "%s: %d layers built in %.1f s, %.1f MB",
        label,
        network.num_layers,
        time.perf_counter() - started,
        len(plan) / 1e6,
    )
    return plan


def why_not_built(errors: Sequence[str], label: str, *, refit: bool) -> str:
    """What to say where TensorRT gave no plan, with its own words."""
    if shutdown.ENDING.is_set():
        return f"{label or 'an engine'} is not built: the program ends"
    words = "; ".join(dict.fromkeys(tensorrt_log.first_line(e) for e in errors)) or "TensorRT gave no reason"
    if refit:
        words += f"; the engine was to be refittable. {tensorrt.why_no_refit() or ''}".rstrip()
    return f"TensorRT could not build {label or 'the engine'}: {words}"


def configure(config: trt.IBuilderConfig, settings: Settings, *, refit: bool, tf32: bool) -> None:
    """What the settings and the engine's kind ask for."""
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # TensorRT's default is on
    if refit:
        make_refittable(config)
    elif settings.sparse_weights:  # what is refitted may be dense, and NVIDIA promises nothing for that
        allow_sparse_kernels(config)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    for index, target in enumerate(settings.targets):
        set_target(config, index, target, len(settings.targets))


def make_refittable(config: trt.IBuilderConfig) -> None:
    """Only the weights that the network marks, where TensorRT can: all others stay constants that it may fold."""
    flag = getattr(trt.BuilderFlag, "REFIT_INDIVIDUAL", None)
    config.set_flag(trt.BuilderFlag.REFIT if flag is None else flag)


def allow_sparse_kernels(config: trt.IBuilderConfig) -> None:
    """TensorRT looks at the constants by itself, and times the sparse kernels against the others."""
    flag = getattr(trt.BuilderFlag, "SPARSE_WEIGHTS", None)
    if flag is None:
        warn_once(f"{tensorrt.flavor()} {tensorrt.version()} has no flag for sparse weights: sparse_weights is ignored")
    else:
        config.set_flag(flag)


# Layers that allocate while they run, whose engines cannot be captured as CUDA graphs.
ALLOCATING = ("TRIP_LIMIT", "NON_ZERO", "NMS")


def make_capturable(config: trt.IBuilderConfig, network: Any) -> None:
    """Fit for CUDA graphs, for which TensorRT for RTX has a flag; TensorRT itself needs none."""
    flag = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    kinds = {trt.ILayer.type.__get__(network.get_layer(i)).name for i in range(network.num_layers)}
    if flag is not None and kinds.isdisjoint(ALLOCATING):
        config.set_flag(flag)


def set_target(config: Any, index: int, target: str, count: int) -> None:
    """Ahead-of-time target of a TensorRT-RTX engine, by compute capability such as `8.9`."""
    name = "SM" + target.replace(".", "")
    if not tensorrt.is_rtx() or not hasattr(trt, "ComputeCapability"):
        raise BuildError("the setting targets needs TensorRT for RTX; TensorRT builds for the GPU that it runs on")
    capability = getattr(trt.ComputeCapability, name, None)
    if capability is None:
        known = ", ".join(n.removeprefix("SM") for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        raise BuildError(f"TensorRT for RTX cannot build for compute capability {target}; it knows {known}")
    if index == 0:
        config.num_compute_capabilities = count
    config.set_compute_capability(capability, index)


def add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, converted: ConvertedNetwork, profile: Profile
) -> None:
    made = builder.create_optimization_profile()
    sizes = {binding.name for binding in converted.inputs if binding.size}
    for name, (smallest, best, largest) in profile.items():
        if name in sizes:
            made.set_shape_input(name, smallest, best, largest)
        else:
            made.set_shape(name, smallest, best, largest)
    if config.add_optimization_profile(made) < 0:
        raise BuildError(f"TensorRT refused the profile {profile}")
