"""One engine of a segment: from the cache, or converted, built and stored. In: what the segment's engines have in
common, and what this one shall be. Out: an `Engine` that is loaded, or the reference evaluator in its place.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence

import torch

from trt_dynamo import trt as tensorrt_module
from trt_dynamo.aten_converters import ConvertedNetwork, convert
from trt_dynamo.build import Profile, build, profile_of
from trt_dynamo.cache import Plan, get_or_build
from trt_dynamo.errors import WeightsMoved
from trt_dynamo.identity import Blueprint, Identity, Wanted, identity_of, manifest_of
from trt_dynamo.profiles import Ranges
from trt_dynamo.reports import count, spend
from trt_dynamo.runtime.engine import Engine, load_plan
from trt_dynamo.unloaded import loading, unloaded

# The copies of weights that networks hold, by digest: the segments of a model, and its engines for other sizes, share
# one. Nobody writes to them; what is to be refitted has copies of its own.
COPIES: weakref.WeakValueDictionary[tuple[str, tuple[int, ...]], torch.Tensor] = weakref.WeakValueDictionary()


def make_engine(
    blueprint: Blueprint,
    weights: Sequence[torch.Tensor] | None,
    ranges: Ranges,
    hot: Sequence[Ranges] = (),
    *,
    refit: bool = False,
    unchanged: Callable[[], bool] = lambda: True,
) -> Engine:
    """The engine of a segment with these weights baked in, or taking them as inputs if None: cached, or converted and
    built. With `refit` its weights can be changed, and must be before its first use: a cached one has others.

    Raises:
        Unsupported, ConversionError, BuildError, EngineError: as their docstrings say.
        WeightsMoved: the weights are no longer `unchanged`, so nothing was stored under their digests.
    """
    wanted = Wanted(blueprint, weights, ranges, hot, refit)
    identity, settings = identity_of(wanted), blueprint.settings
    # Converted when somebody asks for it: of a plan from the cache nobody does, but for the stand-in.
    network = functools.cache(functools.partial(network_of, wanted, identity, unchanged))
    if settings.runtime == "reference" and refit and tensorrt_module.why_no_refit() is not None:
        # No builder makes such a plan here; the stand-in needs none.
        return stand_in(network(), profiles_of(wanted, network()), blueprint.device, settings.max_contexts)
    plan, hit = plan_of(wanted, identity, network)
    # Of what came from the cache nothing was stored, and calls that read the weights see a change since the key.
    seen_at_calls = settings.weights != "frozen" and settings.weights_check == "always"
    if not (hit and seen_at_calls):
        check_weights(wanted, unchanged)
    engine = loaded(wanted, plan, identity.key, network, hit=hit)
    engine.hit = hit
    if not hit:
        engine.made_otherwise = identity.origin().what_changed(settings)
        identity.origin().note()
    if weights is None:
        engine.take_weights(blueprint.segment.weight_positions)
    return engine


def network_of(wanted: Wanted, identity: Identity, unchanged: Callable[[], bool]) -> ConvertedNetwork:
    """The network, with copies of the weights: TensorRT reads them while it builds, when the model may train on.

    Raises:
        Unsupported, ConversionError: as for `convert`.
        WeightsMoved: the weights changed before all were copied.
    """
    copies = copies_of(wanted, identity, unchanged)
    wide = wanted.blueprint.settings.wide_products
    return convert(identity.chosen.module, copies, wanted.ranges, refit=wanted.refit, wide_products=wide)


def copies_of(wanted: Wanted, identity: Identity, unchanged: Callable[[], bool]) -> dict[str, torch.Tensor]:
    """The weights by name, as nobody changes them."""
    given, digests = wanted.named_weights, identity.digests
    shared = {name: COPIES.get((digests.get(name, ""), tensor.stride())) for name, tensor in given.items()}
    made = {name: tensor.detach().clone() for name, tensor in given.items() if shared[name] is None}
    check_weights(wanted, unchanged)
    if not wanted.refit:
        COPIES.update({(digests[name], tensor.stride()): tensor for name, tensor in made.items()})
    return {**made, **{name: tensor for name, tensor in shared.items() if tensor is not None}}


def check_weights(wanted: Wanted, unchanged: Callable[[], bool]) -> None:
    """
    Raises:
        WeightsMoved: the weights are no longer what the engine's key says. That of a refittable one says nothing.
    """
    if not wanted.refit and not unchanged():
        raise WeightsMoved(f"the weights of {wanted.blueprint.segment.name} changed while its engine was built")


def profiles_of(wanted: Wanted, network: ConvertedNetwork) -> list[Profile]:
    return [profile_of(network, ranges) for ranges in (wanted.ranges, *wanted.hot)]


def plan_of(wanted: Wanted, identity: Identity, network: Callable[[], ConvertedNetwork]) -> tuple[Plan, bool]:
    """The plan, from the cache or built, and whether the cache had it."""
    settings = wanted.blueprint.settings
    started = time.perf_counter()
    build_it = functools.partial(built_plan, wanted, identity, network)
    plan, hit = get_or_build(identity.key, build_it, settings, identity.others if loading() else tuple)
    spend("load_seconds" if hit else "build_seconds", time.perf_counter() - started)
    count("cache_hits" if hit else "cache_misses")
    return plan, hit


def built_plan(wanted: Wanted, identity: Identity, network: Callable[[], ConvertedNetwork]) -> Plan:
    """The plan, built, with what a later process must know of it."""
    blueprint = wanted.blueprint
    begun = time.perf_counter()
    converted = network()
    first, *others = profiles_of(wanted, converted)
    plan = build(
        converted,
        first,
        blueprint.settings,
        hot=others,
        label=blueprint.segment.name,
        refit=wanted.refit,
        tf32=blueprint.tf32,
    )
    count("engines_built")
    recorded = blueprint.precision.findings.manifest
    noted = {} if recorded is None else {"precision": recorded}
    manifest = {**manifest_of(converted), "origin": identity.origin().manifest(), **noted}
    return Plan(plan, {**manifest, "build_seconds": round(time.perf_counter() - begun, 3)})


def loaded(wanted: Wanted, plan: Plan, key: str, network: Callable[[], ConvertedNetwork], *, hit: bool) -> Engine:
    """The engine of a plan, or what stands for it: where nothing is loaded, and where nothing can run."""
    settings, device = wanted.blueprint.settings, wanted.blueprint.device
    stored: Engine | None = unloaded(key, len(plan.data), hit)
    if stored is not None:
        return stored
    if settings.runtime == "reference":
        return stand_in(network(), profiles_of(wanted, network()), device, settings.max_contexts)
    return load_plan(plan.data, plan.manifest, device, settings.max_contexts)


def stand_in(network: ConvertedNetwork, profiles: Sequence[Profile], device: torch.device, contexts: int) -> Engine:
    """The reference evaluator in an engine's place. Equal segments share a plan, but this network has its own names."""
    from trt_dynamo.reference import ReferenceEngine, ReferenceRefitter

    raw = ReferenceEngine(network.network.raw, profiles, network.constants, device, weights=network.weights)
    if device.type == "cuda":  # it keeps copies of weights that this stream made, and runs on any
        torch.cuda.current_stream(device).synchronize()
    return Engine(
        raw, manifest_of(network), device, owner=network, refitter_factory=ReferenceRefitter, contexts=contexts
    )


def engine_on_trial(blueprint: Blueprint, label: str, network: ConvertedNetwork, ranges: Ranges) -> Engine:
    """An engine of another network of the segment, which nothing keeps: it is to show where the segment's own errs."""
    settings, device = blueprint.settings, blueprint.device
    profile = profile_of(network, ranges)
    if settings.runtime == "reference":
        return stand_in(network, [profile], device, 1)
    plan = build(network, profile, settings, label=label, tf32=blueprint.tf32)
    return load_plan(plan, manifest_of(network), device, 1)
