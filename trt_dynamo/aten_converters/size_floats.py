"""Python floats that were made of symbolic sizes, such as `1 / x.shape[0]` or `x.shape[-1] ** 0.5`, in the network."""

from __future__ import annotations

import sympy
import torch
from torch.utils._sympy import functions as F

from trt_dynamo.aten_converters.network import Network, Tensor
from trt_dynamo.errors import Unsupported

DIVISIONS = (F.FloatTrueDiv, F.IntTrueDiv)
POWERS = (sympy.Pow, F.FloatPow, F.PowByNatural)
ROOT = getattr(F, "OpaqueUnaryFn_sqrt")  # noqa: B009  made at run time, so that no checker knows it


def size_float(net: Network, value: torch.SymFloat) -> Tensor:
    """The float as a float32 tensor of rank 0, which torch's promotion treats as it does a Python float.

    Raises:
        Unsupported: it is made in another way than by arithmetic and square roots, or not of sizes alone.
    """
    return computed(net, value.node.expr)


def computed(net: Network, expression: sympy.Expr) -> Tensor:
    if expression.is_number:
        return net.scalar(float(expression), torch.float32)
    if expression.is_integer and not isinstance(expression, F.ToFloat):
        return net.size_tensor(expression, torch.float32)
    if isinstance(expression, F.ToFloat):
        return net.size_tensor(expression.args[0], torch.float32)
    if isinstance(expression, ROOT):
        return net.unary("SQRT", computed(net, expression.args[0]))
    names = {DIVISIONS: "DIV", POWERS: "POW", (sympy.Add,): "SUM", (sympy.Mul,): "PROD"}
    name = next((name for kinds, name in names.items() if isinstance(expression, kinds)), None)
    if name is None:
        raise Unsupported(f"the float {expression}, which was made of sizes")
    result, *others = (computed(net, argument) for argument in expression.args)
    for other in others:
        result = net.elementwise(name, result, other)
    return result
