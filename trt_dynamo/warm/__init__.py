"""A warm start through AOTAutograd's own cache: a graph that another process has lowered is not traced again.

Comes in: Dynamo's graph and all that shapes its lowering. Goes out: a `KeptGraphs`, which puts compilers into the form
that lets that cache keep what they make; or None, with the reason in the log, where that is not wanted, not possible,
or not certain to be right.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from trt_dynamo.settings import Settings
from trt_dynamo.warm.salt import Table, salt_of, why_not

log = logging.getLogger(__name__)

# What we use of torch that is not public.
NEEDED = {
    "torch._functorch._aot_autograd.autograd_cache": ("BypassAOTAutogradCache", "should_use_local_autograd_cache"),
    "torch._functorch._aot_autograd.schemas": ("SerializableAOTDispatchCompiler",),
    "torch._functorch.config": ("bundled_autograd_cache", "enable_autograd_cache", "patch"),
    "torch._inductor.config": ("unsafe_marked_cacheable_functions", "patch"),
    "torch._inductor.output_code": ("OutputCode",),
    "torch.compiler.config": ("cache_key_tag", "force_disable_caches", "patch"),
}


class KeptGraphs:
    """The part that one compilation takes in the cache, under the key that `tag` makes a part of. What the cache has
    goes to `finish`: a graph, and the inputs that are its weights, by position.
    """

    def __init__(
        self,
        tag: str,
        inputs: Sequence[Any],
        finish: Callable[[GraphModule, Mapping[int, torch.Tensor]], Callable[..., Any]],
        functions: Sequence[str],
    ) -> None:
        from trt_dynamo.warm.output_code import Compilation

        self.tag = tag
        self.functions = functions
        self.compilation = Compilation(finish, inputs)

    def kept(self, graph: GraphModule, weights: Mapping[int, torch.Tensor], make: Callable[[], Any]) -> Any:
        """The call that `make` gives, as the cache keeps it: as this graph, which `make` may change."""
        from trt_dynamo.warm.output_code import kept

        entry = kept(graph, weights)
        if entry.why_not:
            log.info("the lowered graph is not kept for a warm start: %s", entry.why_not)
        entry.call = make()
        return entry

    def passed_by(self, compiler: Callable[..., Any]) -> Any:
        """A compiler whose calls are not kept."""
        from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler

        from trt_dynamo.warm.output_code import LoweredCode

        def compile(*args: Any) -> LoweredCode:
            return LoweredCode(why_not="a backward pass follows", call=compiler(*args))

        return SerializableAOTDispatchCompiler(LoweredCode, compile)  # type: ignore[arg-type, unused-ignore]

    def keeping(self, compiler: Callable[..., Any]) -> Any:
        """A compiler that returns what `kept` gives."""
        from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler

        from trt_dynamo.warm.output_code import LoweredCode

        return SerializableAOTDispatchCompiler(LoweredCode, compiler)  # type: ignore[arg-type, unused-ignore]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While it is entered AOTAutograd looks into its cache. Dynamo compiles one graph at a time in a process, so
        torch's settings, which are put back at the end, are changed for nobody else.
        """
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor
        from torch.compiler import config as compiler

        from trt_dynamo.warm.output_code import CURRENT

        safe = {**inductor.unsafe_marked_cacheable_functions, **dict.fromkeys(self.functions, self.tag)}
        token = CURRENT.set(self.compilation)
        try:
            with (
                functorch.patch(bundled_autograd_cache=True),  # type: ignore[attr-defined, unused-ignore]
                inductor.patch(unsafe_marked_cacheable_functions=safe),  # type: ignore[attr-defined, unused-ignore]
                compiler.patch(cache_key_tag=f"{compiler.cache_key_tag}{self.tag}"),  # type: ignore[attr-defined, unused-ignore]
            ):
                yield
        finally:
            CURRENT.reset(token)
        if self.compilation.hits:
            log.info("the lowered graph came from AOTAutograd's cache")


def kept_graphs(
    module: GraphModule,
    inputs: Sequence[Any],
    names: Sequence[str],
    settings: Settings,
    table: Table,
    finish: Callable[[GraphModule, Mapping[int, torch.Tensor]], Callable[..., Any]],
    functions: Sequence[str],
) -> KeptGraphs | None:
    """The part that this graph takes in AOTAutograd's cache, or None. `functions` are those of ours that the graph may
    call in the place of torch's, by module and name.
    """
    if settings.aot_cache == "off":
        return None
    reason = why_no_cache() or why_not(module, inputs, settings, table)
    if reason is not None:
        log.info("the graph takes no part in AOTAutograd's cache: %s", reason)
        return None
    return KeptGraphs(salt_of(module, inputs, names, settings, table), inputs, finish, functions)


def why_no_cache() -> str | None:
    """Why AOTAutograd's cache is not for us, whatever the graph."""
    if (lacking := what_torch_lacks()) is not None:
        return f"torch {torch.__version__} has no {lacking}"
    from torch._functorch import config as functorch
    from torch.compiler import config as compiler

    if compiler.force_disable_caches or not functorch.enable_autograd_cache:
        return "it is turned off"
    if torch._dynamo.config.caching_precompile:  # type: ignore[attr-defined, unused-ignore]
        return "caching_precompile would keep it without its guards"
    return None


@functools.cache
def what_torch_lacks() -> str | None:
    for module, names in NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            return module
        for name in names:
            if not hasattr(found, name):
                return f"{module}.{name}"
    return None
