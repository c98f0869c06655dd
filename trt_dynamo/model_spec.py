"""`FILE:FUNCTION`, by which commands are told of a model. In: the text. Out: the model and its example arguments.

FUNCTION takes no arguments and returns `(model, args)` or `(model, args, kwargs)`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_dynamo.errors import TrtDynamoError
from trt_dynamo.setting_values import nearest


class SpecError(TrtDynamoError):
    """The text names no function, or the function gives no model; the message says which."""


def load_model(spec: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What the function returns, checked. An error inside the user's own code comes out as it is.

    Raises:
        SpecError: as its docstring says.
    """
    function = load_function(spec)
    try:
        result = function()
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is None:  # not raised inside, but by the call
            raise SpecError(f"{spec} must take no arguments: {error}") from None
        raise
    wanted = f"{spec} must return (model, args) or (model, args, kwargs)"
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise SpecError(f"{wanted}, not {describe(result)}")
    model, args, kwargs = result if len(result) == 3 else (*result, {})
    if not callable(model):
        raise SpecError(f"{wanted}; its model, {describe(model)}, cannot be called")
    if not isinstance(args, tuple | list):
        raise SpecError(f"{wanted}; its args must be a tuple, not {describe(args)}")
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise SpecError(f"{wanted}; its kwargs must be a dict with names as keys, not {describe(kwargs)}")
    return model, tuple(args), kwargs


def load_function(spec: str) -> Callable[[], Any]:
    """The function that the spec names, its file run as a module."""
    name, colon, function_name = spec.rpartition(":")
    if not colon or not name or not function_name:
        raise SpecError(f"{spec!r} is not FILE:FUNCTION, for example model.py:make")
    file = Path(name)
    if not file.is_file():
        raise SpecError(f"there is no file {name}")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    if module_spec is None or module_spec.loader is None:
        raise SpecError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: the modules beside it can be imported, and it can be found by its classes.
    sys.path.insert(0, str(file.parent.absolute()))
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    function: Callable[[], Any] | None = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(function_name, names)
        raise SpecError(f"{name} has no function {function_name!r}" + (f"; {hint}" if hint else ""))
    return function


def describe(value: Any) -> str:
    """The kind of a value, with its length where that is what matters."""
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind
