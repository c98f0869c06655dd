"""Sizes that went through floats, such as `ceil(2 * n / 3.0)` or `floor(1.5 * n)`, as whole numbers.

In: a sympy expression of torch's rounding functions. Out: an expression of whole numbers that is equal for every size,
or None. It is equal because what stands under the rounding is one correctly rounded division of numbers that float64
holds exactly; sums and products of whole numbers and halves (quarters, ...) are such numbers.
"""

from __future__ import annotations

from typing import TypeAlias

import sympy
from torch.utils._sympy import functions as F

QUOTIENTS = (F.FloatTrueDiv, F.IntTrueDiv)
LARGEST = 2**20  # of the numbers in the expression, so that products with sizes stay below 2**53

Halves: TypeAlias = tuple[sympy.Expr, int]  # a whole number, and the power of two that it is divided by


def whole(expression: sympy.Expr) -> sympy.Expr | None:
    """`expression`, which rounds a float to a whole number, without floats."""
    if not isinstance(expression, F.CeilToInt | F.FloorToInt):
        return None
    found = division(expression.args[0])
    if found is None:
        return None
    dividend, divisor = found
    if divisor.is_negative:
        dividend, divisor = -dividend, -divisor
    if isinstance(expression, F.FloorToInt):
        return quotient(dividend, divisor)
    return -quotient(-dividend, divisor)


def division(expression: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Dividend and divisor, whole numbers, of what is rounded once at most: a division by a power of two rounds
    nothing.
    """
    above, below = expression.args if isinstance(expression, QUOTIENTS) else (expression, sympy.Integer(1))
    b = halves(below)
    if b is None or b[0].is_zero is not False:
        return None
    if isinstance(above, QUOTIENTS):
        first = division(above) if b[0].is_Integer and abs(int(b[0])).bit_count() == 1 else None
        return None if first is None else (first[0] * b[1], first[1] * b[0])
    a = halves(above)
    return None if a is None else (a[0] * b[1], b[0] * a[1])


def quotient(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return dividend if divisor == 1 else F.FloorDiv(dividend, divisor)


def halves(expression: sympy.Expr) -> Halves | None:
    """What float64 holds exactly, as a whole number over a power of two, or None."""
    if isinstance(expression, F.ToFloat):
        return halves(expression.args[0])
    if expression.is_Float or expression.is_Rational:
        above, below = float(expression).as_integer_ratio()
        return (sympy.Integer(above), below) if max(abs(above), below) <= LARGEST else None
    if isinstance(expression, sympy.Add | sympy.Mul):
        return combined(expression)
    return (expression, 1) if expression.is_integer and not expression.has(sympy.Float) else None


def combined(expression: sympy.Expr) -> Halves | None:
    """A sum or a product."""
    result: Halves = (sympy.Integer(0), 1) if expression.is_Add else (sympy.Integer(1), 1)
    for argument in expression.args:
        other = halves(argument)
        if other is None:
            return None
        (a, b), (c, d) = result, other
        result = (a * d + c * b, b * d) if expression.is_Add else (a * c, b * d)
        if result[1] > LARGEST:
            return None
    return result
