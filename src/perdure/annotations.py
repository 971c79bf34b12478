"""Type annotations: resolved, described in messages, and handed to pydantic.

pydantic is imported where the first adapter is made, so that `import perdure` stays light.
"""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Callable
from functools import partial
from types import NoneType, UnionType
from typing import Any, Final, cast

import typing_extensions
from typing_extensions import TypeAliasType

ANY: Final[Any] = Any
"""The annotation of what has none: a value must survive JSON exactly."""

# JSON bytes are base64, both ways. inf and nan are written as bare constants, which no other value can produce, so that
# they can be found again; the default writes null, which a field `float | None` would take back.
PYDANTIC_CONFIG: Final = {"ser_json_bytes": "base64", "val_json_bytes": "base64", "ser_json_inf_nan": "constants"}

_NUMBERS: Final = itertools.count(1)
SCALARS: Final[frozenset[type]] = frozenset({str, int, float, bool, NoneType})


class Refused(Exception):
    """A value that a shape doesn't take. Whoever knows what the value was for makes a public error of it.

    Attributes:
        type_name: The type of the culprit.
        reason: Why, and what to do.
        is_mismatch: The value is no instance of the annotation (otherwise JSON can't carry it).
    """

    def __init__(self, type_name: str, reason: str, *, is_mismatch: bool = False) -> None:
        super().__init__(type_name, reason)
        self.type_name = type_name
        self.reason = reason
        self.is_mismatch = is_mismatch


def hints_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, resolved.

    Raises:
        Refused: They name what doesn't exist where the function was defined.
    """
    target = inspect.unwrap(fn)
    while isinstance(target, partial):
        target = inspect.unwrap(target.func)
    if not (inspect.isroutine(target) or isinstance(target, type)):
        target = type(target).__call__
    try:
        return typing_extensions.get_type_hints(target, include_extras=True)
    except Exception as error:
        raise Refused(
            getattr(target, "__qualname__", "function"),
            f"its annotations can't be resolved ({explain(error)}); import what they name at run time too, "
            "not only under TYPE_CHECKING, and define it at the top level of a module",
        ) from error


def adapter_of(annotation: Any) -> Any:
    """The pydantic `TypeAdapter` of an annotation, with bytes as base64.

    Raises:
        Refused: pydantic knows nothing about such a type.
    """
    from pydantic import TypeAdapter

    try:
        # The alias is only there to carry the configuration, which pydantic takes for no bare dataclass or model. Its
        # name is used once: pydantic knows an alias by name and address, and takes a new one at the address of an old
        # one for the same.
        payload: Any = cast("Any", TypeAliasType)(f"Payload{next(_NUMBERS)}", annotation)
        adapter = cast("Any", TypeAdapter)(payload, config=PYDANTIC_CONFIG)
        _ = adapter.serializer.to_json, adapter.validator.validate_json  # raises if a name in it isn't defined yet
        return adapter
    except Exception as error:
        raise Refused(
            describe(annotation),
            f"the annotation can't be read as JSON ({explain(error)}); use a dataclass, a model, a TypedDict or "
            "another type that pydantic knows, or pass an id in its place",
        ) from error


def is_any(annotation: Any) -> bool:
    """The annotation says nothing."""
    return annotation is Any or annotation is object or annotation is inspect.Parameter.empty


def type_name(value: Any) -> str:
    """The type of a value, as messages have it: `str`, `shop.orders.Order`."""
    return describe(type(value))


def describe(annotation: Any) -> str:
    """An annotation, as messages have it."""
    if annotation is None or annotation is NoneType:
        return "None"
    return inspect.formatannotation(annotation)


def explain(error: BaseException) -> str:
    """One line about what went wrong, of pydantic or not: `items.0.cents: input should be a valid integer`."""
    if (found := validation_errors(error)) is not None:
        place = "".join(f"{part}: " for part in [".".join(map(str, found[0]["loc"]))] if part)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        message: str = found[0]["msg"]
        return f"{place}{message[:1].lower()}{message[1:]}{more}"
    text = str(error).strip().partition("\n")[0].removeprefix("Error serializing to JSON: ")
    return text or type(error).__name__


def validation_errors(error: BaseException) -> list[Any] | None:
    """What pydantic found, if it is pydantic that complains."""
    if type(error).__name__ != "ValidationError":
        return None
    found: list[Any] = cast("Any", error).errors(include_url=False, include_input=False, include_context=False)
    return found


def scalars_of(annotation: Any) -> frozenset[type]:
    """The types whose exact instances can't lose anything under this annotation."""
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    known = [
        kind for kind in SCALARS if any(kind is member or (member is None and kind is NoneType) for member in members)
    ]
    if len(known) == len(members) and not (int in known and float in known):  # between those two a union may choose
        return frozenset(known)
    return frozenset()


def mentions_any(schema: object) -> bool:
    """Whether pydantic's description of an annotation has a place where anything may stand."""
    if isinstance(schema, dict):
        parts = cast("dict[object, object]", schema)
        return parts.get("type") == "any" or any(map(mentions_any, parts.values()))
    return isinstance(schema, (list, tuple)) and any(map(mentions_any, cast("list[object]", schema)))
