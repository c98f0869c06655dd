"""Makes a stub that type checkers can read out of what pybind11-stubgen writes about TensorRT's bindings.

Comes in: the text of the generated stub. Goes out: the text of `tensorrt/__init__.pyi`. What is mended: Python that
does not parse, types that are narrower than what the bindings take (a tuple for Dims, an array for Weights), results
that may be None according to the documentation, and what NVIDIA's package adds in Python.
"""

from __future__ import annotations

import ast
import re
from typing import TypeVar

# What pybind11 converts by itself where the named type is asked for.
ALSO_TAKES = {
    "Dims": "collections.abc.Sequence[int]",
    "Permutation": "collections.abc.Sequence[int]",
    "Weights": "numpy.ndarray[typing.Any, typing.Any]",
}

# What a program derives from, for TensorRT to call: there a parameter is what comes in, not what would be converted.
CALLED_BACK = re.compile(
    r"I(ProgressMonitor|Logger|Profiler|ErrorRecorder|OutputAllocator|DebugListener|Gpu\w*Allocator)"
)

# None on failure, which the documentation does not say.
MAY_FAIL = {
    ("INetworkDefinition", "add_input"),
    ("Builder", "build_serialized_network"),
    ("Builder", "build_engine_with_config"),
    ("ICudaEngine", "create_execution_context"),
    ("ICudaEngine", "serialize"),
}
FAILS = re.compile(r":returns:.*None`?,? (if (it|the layer) (could not|was not)|on failure)", re.DOTALL)

METHODS = {
    "Dims": "def __iter__(self) -> collections.abc.Iterator[int]: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}
ADDED = """
__version__: str
def volume(iterable: collections.abc.Iterable[int]) -> int: ...
def nptype(trt_type: DataType) -> type[numpy.generic[typing.Any]]: ...
"""
# Harmless to a user: an overload that another one swallows, a member that narrows its parent's, a bare list.
HEADER = """# mypy: disable-error-code="overload-overlap, overload-cannot-match, override, assignment, misc, type-arg"
import builtins
import collections.abc
import typing
import numpy
import typing_extensions
"""

Node = TypeVar("Node", bound=ast.AST)


def fix(text: str) -> str:
    """The mended stub.

    Raises:
        SyntaxError: the generated stub holds something new that does not parse.
    """
    text = re.sub(r"(?<=[(, ])in: ", "in_: ", text)
    text = re.sub(r"^( *def \w+)\((.*)\)( -> .*:)$", default_the_rest, text, flags=re.MULTILINE)
    tree = Fixer().visit(ast.parse(text))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return HEADER + ast.unparse(ast.fix_missing_locations(tree)) + ADDED


def default_the_rest(signature: re.Match[str]) -> str:
    """A default for each parameter after the first that has one: `a=None, b` is no Python."""
    seen = False
    parameters = []
    for parameter in split_parameters(signature[2]):
        seen = seen or " = " in parameter
        named = not parameter.startswith(("*", "/"))
        parameters.append(f"{parameter} = ..." if seen and named and " = " not in parameter else parameter)
    return f"{signature[1]}({', '.join(parameters)}){signature[3]}"


def split_parameters(text: str) -> list[str]:
    """The parameters of a signature, cut at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def either(left: ast.expr, right: str) -> ast.expr:
    return ast.BinOp(left, ast.BitOr(), expression(right))


class Annotations(ast.NodeTransformer):
    """Mends one annotation: what no checker knows becomes Any, `bool` is the type and not TensorRT's constant."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return expression("typing.Any") if node.value is ... else node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "capsule":
            return expression("typing.Any")
        return expression("builtins.bool") if node.id == "bool" else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value).endswith("Literal"):
            return node
        self.generic_visit(node)
        return node


class Parameters(Annotations):
    """Mends a parameter's annotation: it takes all that pybind11 converts."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        mended = super().visit_Name(node)
        return either(mended, ALSO_TAKES[node.id]) if node.id in ALSO_TAKES else mended

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "list":
            node.value = expression("collections.abc.Sequence")
        return super().visit_Subscript(node)


class Fixer(ast.NodeTransformer):
    """Mends the classes and functions of a stub."""

    def __init__(self) -> None:
        self.scope: list[str] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()
        node.body = [part for item in node.body for part in settable(item)]
        if node.name in METHODS:
            node.body += ast.parse(METHODS[node.name]).body
        return without_text(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = Annotations().visit(node.annotation)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        fails = FAILS.search(ast.get_docstring(node) or "") or (*self.scope[-1:], node.name) in MAY_FAIL
        if node.returns is not None:
            node.returns = Annotations().visit(node.returns)
            node.returns = either(node.returns, "None") if fails else node.returns
        else:
            node.returns = expression("typing.Any")
        self.fix_parameters(node)
        if node.name == "__eq__":  # `object` is what Python itself says
            node.decorator_list = []
            node.args = ast.parse("def f(self, other: object, /): ...").body[0].args  # type: ignore[attr-defined]
        return without_text(node)

    def fix_parameters(self, node: ast.FunctionDef) -> None:
        """Mends the annotations; what has no type is Any, what may be left out as None says so."""
        arguments = node.args
        defaults = [*[None] * (len(arguments.args) - len(arguments.defaults)), *arguments.defaults]
        for position, (argument, default) in enumerate(zip(arguments.args, defaults, strict=True)):
            if argument.annotation is not None:
                mended = Parameters().visit(argument.annotation)
                argument.annotation = incoming(mended) if CALLED_BACK.fullmatch(".".join(self.scope)) else mended
            elif self.scope == [] or position or is_static(node):
                argument.annotation = expression("typing.Any")
            if isinstance(default, ast.Constant) and default.value is None and argument.annotation is not None:
                argument.annotation = either(argument.annotation, "None")
        for rest in (arguments.vararg, arguments.kwarg):
            if rest is not None:
                rest.annotation = expression("typing.Any")
        if arguments.args and arguments.args[0].arg == "self":
            arguments.args[0].annotation = None


def incoming(annotation: ast.expr) -> ast.expr:
    """The type of what TensorRT itself hands over."""
    return expression(ast.unparse(annotation).replace("typing.SupportsInt", "int"))


def settable(item: ast.stmt) -> list[ast.stmt]:
    """An attribute that takes more than it gives, as a property; any other statement as it is."""
    if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
        return [item]
    name, kind = item.target.id, ast.unparse(item.annotation)
    if kind not in ALSO_TAKES:
        return [item]
    return ast.parse(
        f"@property\ndef {name}(self) -> {kind}: ...\n"
        f"@{name}.setter\ndef {name}(self, value: {kind} | {ALSO_TAKES[kind]}) -> None: ...\n"
    ).body


def is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)


def without_text(node: Node) -> Node:
    """The node without its docstring: NVIDIA's words stay with NVIDIA."""
    body = [item for item in node.body if not (isinstance(item, ast.Expr) and is_text(item.value))]  # type: ignore[attr-defined]
    node.body = without_repeats(body) or [ast.Expr(ast.Constant(...))]  # type: ignore[attr-defined]
    return node


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def without_repeats(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements without their doubles (overloads alike in Python); a lone overload is a plain function."""
    kept = list({ast.unparse(item): item for item in body}.values())
    names = [item.name for item in kept if isinstance(item, ast.FunctionDef)]
    for item in kept:
        if isinstance(item, ast.FunctionDef) and names.count(item.name) == 1:
            item.decorator_list = [mark for mark in item.decorator_list if ast.unparse(mark) != "typing.overload"]
    return kept
