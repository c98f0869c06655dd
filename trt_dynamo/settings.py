"""Every setting, in one place: its default, its environment variable and its option in `torch.compile(options=...)`.

Options beat `TRT_DYNAMO_<NAME>` variables, which beat the defaults. A bad option raises `SettingsError`; a bad variable
warns once and is ignored, so that a typing error in a shell never stops a training run. docs/settings.md is made from
here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from trt_dynamo.errors import SettingsError
from trt_dynamo.setting_values import Rule, convert, nearest, sentences

log = logging.getLogger(__name__)

PREFIX = "TRT_DYNAMO_"

Runtime = Literal["auto", "tensorrt", "reference", "eager"]
Flavor = Literal["auto", "tensorrt", "tensorrt_rtx"]
Weights = Literal["auto", "frozen", "inputs"]
WeightsCheck = Literal["always", "observed"]
AotCache = Literal["off", "on"]
Rebuild = Literal["background", "sync", "never"]
Compile = Literal["sync", "background"]
CacheMode = Literal["on", "readonly", "refresh", "off"]
CudaGraphs = Literal["off", "auto", "whole"]
Fallback = Literal["eager", "inductor"]
Training = Literal["eager", "inductor"]
Float64 = Literal["eager", "float32"]
Precision = Literal["native", "fp16", "bf16", "auto"]
Accumulate = Literal["default", "float32"]
Verify = Literal["off", "first", "sample"]
Progress = Literal["auto", "on", "off"]


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of `Settings` with its `Rule`."""
    rule = Rule(help, **rules)
    return dataclasses.field(default=default, repr=not rule.secret, metadata={"rule": rule})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user can tune. Field names are the option names; `TRT_DYNAMO_` + the upper-case name is the variable.

    Raises:
        SettingsError: a value does not parse as its field's type.
    """

    runtime: Runtime = setting(
        "auto",
        "what runs the engines: `auto` (TensorRT where it can run, else eager with one warning), `tensorrt`, "
        "`reference` (the reference evaluator: slow, exact, needs no GPU), `eager` (build nothing)",
    )
    flavor: Flavor = setting(
        "auto",
        "which TensorRT package to load: `auto` prefers `tensorrt`, then `tensorrt_rtx`; picked once per process",
        env_only=True,
    )
    min_segment_nodes: int = setting(3, "a run of fewer compute nodes than this is not worth an engine and stays eager")
    eager_ops: tuple[str, ...] = setting(
        (),
        "ATen ops to keep in eager, for example `aten.gelu,aten.addmm.default`",
        item=r"\w+\.\w+(\.\w+)?",
        example="aten.gelu or aten.gelu.default",
    )
    fallback: Fallback = setting(
        "eager",
        "what runs what TensorRT does not take, between engines and where there is none: `eager`, or `inductor` "
        "compiles it (docs/fallback.md)",
    )
    float64: Float64 = setting(
        "eager",
        "what becomes of float64, which TensorRT lacks: `eager` leaves it to PyTorch, `float32` computes it in float32 "
        "and casts the results back",
    )
    precision: Precision = setting(
        "native",
        "what engines compute in: `native` (the model's own types), `fp16` or `bf16` (what is float32 in the model, "
        "where it bears it: docs/precision.md), `auto` (fp16 but for what would overflow or lose too much, by the "
        "values that the first calls or `trt_dynamo.calibrate` recorded)",
        engine=True,
    )
    precision_keep: tuple[str, ...] = setting(
        (),
        "what stays in float32 all the same: patterns over the names of ops, modules (with all that is in them) and "
        "source lines, for example `aten.bmm,encoder.layer.0.*,LlamaMLP,model.py:41-60`",
        engine=True,
        item=r"[^\s,]+",
        example="aten.mm, encoder.layer.*.output or model.py:41",
    )
    fp16_accumulate: Accumulate = setting(
        "default",
        "where matrix products of float16 add up: `default` (as TensorRT's kernels do), `float32`",
        engine=True,
    )
    sparse_weights: bool = setting(
        False,
        "lets TensorRT take kernels for 2:4 sparse weights where an engine's weights are so (docs/sparsity.md); not in "
        "engines that can be refitted",
        engine=True,
    )
    calibration_calls: int = setting(
        8, "with `precision=auto`, how many calls run in eager and record the values, before the engine is built", low=1
    )
    verify: Verify = setting(
        "off",
        "compares engines with eager, and takes those out of use whose answers differ (docs/verify.md): `first` (the "
        "first call of each engine, and after each refit), `sample` (now and then too)",
    )
    verify_every: int = setting(200, "with `verify=sample`, each call of so many of a segment is compared", low=1)
    verify_tolerance: float | None = setting(
        None, "the largest relative error that `verify` lets pass; by default one for the precision (docs/verify.md)"
    )
    strict: bool = setting(
        False, "raise what would otherwise fall back to eager because of an error of ours or TensorRT's"
    )
    cache: CacheMode = setting(
        "on", "the engine cache on disk: `on`, `readonly`, `refresh` (rebuild and replace), `off`"
    )
    cache_dir: Path | None = setting(
        None, "the cache's folder; the default is the user's cache folder for `trt_dynamo`"
    )
    cache_size: int = setting(
        20 * 2**30, "the cache's largest size; the least recently used engines go first", unit="bytes"
    )
    aot_cache: AotCache = setting(
        "off",
        "whether AOTAutograd's own cache keeps lowered graphs, so that a new process does not trace them again "
        "(docs/cache.md)",
    )
    cache_remote: str | None = setting(
        None,
        "a cache behind the folder that many machines share: an fsspec URL such as `s3://bucket/engines` or a folder "
        "(docs/cache.md)",
    )
    cache_remote_seconds: int = setting(
        60, "how long a call waits for the remote cache before it builds, and the end of the program for uploads", low=1
    )
    cache_key_file: Path | None = setting(
        None,
        "a file with the secret key that entries of the cache are signed with; others are refused",
        env_only=True,
    )
    cache_key: str = setting("", "the secret key itself, instead of a file", env_only=True, secret=True)
    targets: tuple[str, ...] = setting(
        (),
        "compute capabilities to build for ahead of time (TensorRT-RTX only), for example `8.6,8.9,12.0`; "
        "the default is RTX's portable engine",
        engine=True,
        item=r"[1-9]\d?\.\d",
        example="8.6 or 12.0",
    )
    optimization_level: int | None = setting(None, "TensorRT's builder optimization level, 0 to 5", engine=True, high=5)
    workspace: int | None = setting(None, "the largest scratch memory of an engine", engine=True, unit="bytes", low=1)
    max_weight_sets: int = setting(
        4, "how many sets of weights (a model, its EMA copy, ...) get engines of their own", low=1
    )
    weights: Weights = setting(
        "auto",
        "how an engine gets the weights: `auto` (copied into it, and each change is seen and followed; as inputs where "
        "they are more than 1 GiB), `frozen` (copied into it, and you promise that they do not change), `inputs` (it "
        "reads the model's own memory at each call: no copy, nothing to follow, fewer optimizations)",
    )
    weights_check: WeightsCheck = setting(
        "always",
        "how a change of weights is noticed at a call: `always` (their content is read, beside the engine's work), "
        "`observed` (by versions, addresses and optimizer steps, which misses writes through `.data` or NumPy)",
    )
    rebuild_after: int = setting(
        8,
        "where engines cannot be refitted: after a change of weights, how many calls with the same weights run in "
        "eager before the engine is rebuilt",
    )
    compile: Compile = setting(
        "sync", "the first build: `sync` waits for it, `background` answers in eager until the engine is ready"
    )
    rebuild: Rebuild = setting(
        "background",
        "what follows when an engine no longer fits (a size outside its profile, changed weights): eager answers "
        "meanwhile (`background`), the call waits (`sync`), or eager answers from then on (`never`)",
    )
    profiles: int | Path = setting(
        1,
        "how many profiles an engine has (more than one: a narrow one for the sizes that come most), or the path of a "
        ".json file with the ranges of sizes, as `record_shapes` saves it (docs/shapes.md)",
        low=1,
    )
    max_tensor_bytes: int | None = setting(
        2 * 2**30,
        "the range of a size ends where a tensor of the engine would pass this, unless a call asks for more",
        unit="bytes",
        low=1,
    )
    training: Training = setting(
        "eager", "what runs the graphs that a backward pass may follow: `eager`, or `inductor` compiles them"
    )
    cuda_graphs: CudaGraphs = setting(
        "off",
        "whether calls are replayed as CUDA graphs: `auto` (each engine's, for shapes that come again), `whole` (a "
        "compiled call with all that runs between its engines, where it can be captured; else as `auto`)",
    )
    cuda_graphs_kept: int = setting(
        16, "for how many combinations of shapes an engine (or call) keeps a CUDA graph", low=1
    )
    max_contexts: int = setting(
        16,
        "execution contexts of an engine, so how many threads and streams run it at once; the others take turns",
        low=1,
    )
    nvtx: bool = setting(False, "an NVTX range for each call of an engine, with its segment's name (docs/profiling.md)")
    progress: Progress = setting("auto", "progress bars for long builds: `auto` shows them on a terminal only")

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, parse(name, getattr(self, name), shown=f"setting {name!r}"))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings that the environment asks for; each mistake in it is warned about once per process."""
        values, problems = read_env(environ)
        for problem in problems:
            warn_once(f"{problem} The variable is ignored.")
        return cls(**values)

    def merge(self, options: Mapping[str, Any] | None) -> Settings:
        """These settings, with `options` (the dict given to `torch.compile`) on top.

        Raises:
            SettingsError: an option is unknown, or its value does not parse.
        """
        if options is not None and not isinstance(options, Mapping):
            raise SettingsError(f"options must be a dict of settings, not {type(options).__name__}")
        values: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name in FIELDS and rule_of(name).env_only:
                raise SettingsError(
                    f"{name!r} is picked once per process: set {variable_of(name)} instead of the option"
                )
            values[name] = parse(name, value, shown=f"option {name!r}")
        return dataclasses.replace(self, **values)

    @property
    def profile_count(self) -> int:
        """How many profiles an engine has."""
        return self.profiles if isinstance(self.profiles, int) else 1

    @property
    def profiles_file(self) -> Path | None:
        """The file with the ranges of sizes, if there is one."""
        return self.profiles if isinstance(self.profiles, Path) else None

    @property
    def wide_products(self) -> bool:
        """Whether matrix products of float16 add up in float32."""
        return self.fp16_accumulate == "float32"

    def engine_fields(self) -> dict[str, Any]:
        """The settings that change an engine, for the cache's key."""
        return {name: getattr(self, name) for name in FIELDS if rule_of(name).engine}


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def rule_of(name: str) -> Rule:
    """The rule of the setting `name`."""
    rule: Rule = FIELDS[name].metadata["rule"]
    return rule


def variable_of(name: str) -> str:
    """The environment variable of the setting `name`."""
    return PREFIX + name.upper()


def read_env(environ: Mapping[str, str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The settings that `environ` (by default the process's) gives, and a sentence on each of its mistakes.

    An empty variable counts as not set, as is the custom in shells.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    known = {variable_of(name): name for name in FIELDS}
    for variable in sorted(name for name in environ if name.upper().startswith(PREFIX)):
        text = environ[variable].strip()
        if variable not in known:
            problems.append(unknown(variable, variable, known))
        elif text:
            try:
                values[known[variable]] = parse(known[variable], text, shown=variable)
            except SettingsError as error:
                problems.append(str(error))
    return values, problems


@functools.cache
def warn_once(message: str) -> None:
    """Logs `message` as a warning, the first time in this process."""
    log.warning("%s", message)


@functools.cache
def type_of(name: str) -> Any:
    """The type of the setting `name`."""
    return typing.get_type_hints(Settings)[name]


def unknown(shown: str, name: str, choices: Iterable[str]) -> str:
    """What an unknown option or variable `name` gets to hear."""
    return sentences(
        f"{shown} is not a setting of trt_dynamo", nearest(name, choices), f"The settings are {', '.join(choices)}"
    )


def parse(name: str, value: Any, *, shown: str) -> Any:
    """`value`, a string or already of the right type, as the type of the field `name`.

    Raises:
        SettingsError: no such field, or not a value of its type. `shown` is how the message calls it.
    """
    if name not in FIELDS:
        raise SettingsError(unknown(shown, str(name), FIELDS))
    try:
        return convert(type_of(name), value, rule_of(name))
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: `~nobody` has no home
        raise SettingsError(sentences(f"{shown} cannot be {value!r}", str(error))) from None
