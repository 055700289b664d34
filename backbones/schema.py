"""Type hints as a schema: which arguments a constructor takes, and whether a value fits a hint.

This module imports no torch.
"""

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

__all__ = ["PerStage", "constructor_hints", "constructor_parameters", "in_words", "fits"]

T = TypeVar("T")
# One value for all stages or one a stage; an inner sequence is cycled over the stage's blocks.
PerStage = Union[T, Sequence[Union[T, Sequence[T]]]]


def constructor_parameters(model_class: type) -> dict[str, inspect.Parameter]:
    """Return the constructor arguments of a class by name, annotations as types.

    A constructor that ends in ``**common`` takes its base class's arguments as well.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in model_class.__mro__:
        if "__init__" not in vars(owner):
            continue
        init = vars(owner)["__init__"]
        types_of = typing.get_type_hints(init)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                hint = types_of.get(parameter.name, Any)
                found.setdefault(parameter.name, parameter.replace(annotation=hint))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def constructor_hints(model_class: type) -> tuple[dict[str, Any], set[str]]:
    """Return the type hints of all constructor arguments of a class, and the required ones."""
    parameters = constructor_parameters(model_class)
    required = {name for name, p in parameters.items() if p.default is p.empty}
    return {name: p.annotation for name, p in parameters.items()}, required


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value read from YAML fits a type hint (bool is no int, int is a float)."""
    if hint is Any:
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is not None and issubclass(origin, Sequence):
        items = [part for part in parts if part is not Ellipsis] or [Any]
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        return all(fits(item, items[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def in_words(hint: Any) -> str:
    """Return a type hint in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(part) for part in parts)
    if origin is not None:
        inner = [in_words(part) for part in parts if part is not Ellipsis]
        return "a list of (" + " / ".join(inner) + ")" if inner else "a list"
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return "null" if hint is type(None) else words.get(hint, getattr(hint, "__name__", str(hint)))
