"""Models that NVIDIA's ModelOpt quantized: its quantizers become `trt_dynamo::fake_quantize` ops in the graph.

ModelOpt has an op, `tensorrt::quantize_op`, for most of them. For integers on a CPU it computes in Python and looks at
the values, which ends Dynamo's graph at each quantizer; Dynamo traces our op in the place of that function. ModelOpt
itself is not loaded, and computes as before: nothing happens before Dynamo meets it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from trt_dynamo.operators.fake_quantize import fake_quantize

log = logging.getLogger(__name__)

PACKAGE = "modelopt"
QUANTIZERS = "modelopt.torch.quantization.tensor_quant"
FUNCTION = "_tensor_quant"

SCHEMA = ("input", "amax", "num_bits", "exponent_bits", "unsigned", "narrow_range")


def quantized_integers(
    inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """ModelOpt's function of the same parameters, without a look at the values."""
    result: Tensor = fake_quantize(inputs, amax, num_bits, 0, unsigned, narrow_range)
    return result


def replaced_function() -> Callable[..., Any] | None:
    """ModelOpt's function, where it is loaded and means what it does in ModelOpt 0.47. Earlier ones gave out codes."""
    function = getattr(sys.modules.get(QUANTIZERS), FUNCTION, None)
    if function is None:
        return None
    try:
        result = function(*(torch.ones(size, device="cpu") for size in (2, 1)), 8, False, True)
    except Exception as error:  # noqa: BLE001  whatever another version does: its models run with ended graphs
        result = error
    if isinstance(result, Tensor) and result.tolist() == [1, 1]:
        return function  # type: ignore[no-any-return]
    log.info("ModelOpt's integer quantizers end graphs: %s is not what is known of it", FUNCTION)
    return None


def teach_dynamo() -> None:
    """Has Dynamo trace our op in the place of ModelOpt's function; called when it first meets ModelOpt."""
    tell_truth_value()
    function = replaced_function()
    if function is None:
        return
    try:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(quantized_integers)
    except ValueError as error:  # somebody else has taught it
        log.info("ModelOpt's integer quantizers are left to Dynamo: %s", error)


def tell_truth_value() -> None:
    """Gives what ModelOpt calls for a module's weight the truth value that it has: it is never empty. Torch 2.11 asks
    for it where the object has no attributes yet and `__len__` fails, and so compiles no model with such modules.
    """
    kind = getattr(sys.modules.get("modelopt.torch.opt.dynamic"), "_FoldedCallback", None)
    if kind is not None and not hasattr(kind, "__bool__"):
        kind.__bool__ = lambda self: True


def wait_for_modelopt() -> None:
    """Asks Dynamo to call us when it meets ModelOpt, as it does for packages whose functions it must know."""
    import torch._dynamo.decorators  # noqa: F401  it completes trace_rules
    from torch._dynamo import trace_rules

    wait, waiting = (getattr(trace_rules, name, None) for name in ("add_module_init_func", "_lazy_module_init"))
    if wait is None or waiting is None:
        log.info(
            "this torch does not say when Dynamo meets a package: ModelOpt's integer quantizers end graphs on CPUs"
        )
    elif PACKAGE not in waiting:
        wait(PACKAGE, teach_dynamo)


wait_for_modelopt()


def quantized(
    input: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unsigned: bool, narrow_range: bool
) -> Tensor:
    """ModelOpt's op of the same parameters."""
    result: Tensor = fake_quantize(input, amax, num_bits, exponent_bits, unsigned, narrow_range)
    return result


def assign(module: object, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """While it is entered, `torch.export` can trace ModelOpt's quantizers, where ModelOpt is loaded; what it makes has
    no op of ModelOpt's, and can be read without it.
    """
    utils, module = (sys.modules.get(name) for name in ("modelopt.torch.quantization.utils", QUANTIZERS))
    ours: dict[str, Any] = {FUNCTION: quantized_integers} if replaced_function() is not None else {}
    if hasattr(module, "quantize_op") and taken_apart():
        ours["quantize_op"] = quantized
    theirs = {name: getattr(module, name) for name in ours}
    with getattr(utils, "export_torch_mode", contextlib.nullcontext)():
        assign(module, ours)
        try:
            yield
        finally:
            assign(module, theirs)


def taken_apart() -> dict[OpOverload, Callable[..., Any]]:
    """ModelOpt's op, where it is registered, to ours: for AOTAutograd's table."""
    packet = getattr(torch.ops.tensorrt, "quantize_op", None)
    op = getattr(packet, "default", None)
    if op is None or tuple(argument.name for argument in op._schema.arguments) != SCHEMA:
        return {}
    return {op: fake_quantize}
