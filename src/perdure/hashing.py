"""What a step was called with, as a number that replay compares: the arguments themselves are not stored.

The hash must be the same in every process and for years, so it is taken of a text that is made here: no library's
encoding, no `hash()`, no order of a set, no address. The text is JSON with sorted keys. What has no JSON form (clients,
sessions, `self`) counts by its type's name alone, because two processes never have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from json.encoder import encode_basestring_ascii
from pathlib import PurePath
from typing import Any, Final, cast
from uuid import UUID

_MOST: Final = 64 * 1024
_DEEPEST: Final = 64  # also ends what contains itself
_BY_STR: Final = (UUID, Decimal, PurePath)


def arguments_hash(fn_parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """A signed number of 64 bits (PostgreSQL's `int8`) for the arguments of a call.

    Passing an argument by position or by name makes no difference; leaving a default out does. Only the first 64 KiB
    of the text count. Never raises.

    Args:
        fn_parameters: The names of the parameters that can be passed by position, in order.
        args: The positional arguments, as they were passed.
        kwargs: The named ones.
    """
    try:
        text = _object_text(_by_name(fn_parameters, args, kwargs))
    except Exception:  # a property that raises, a dict that changes: whatever an argument may be
        text = " ".join(_type_text(value) for value in (*args, *(kwargs[name] for name in sorted(kwargs))))
    digest = blake2b(text[:_MOST].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    named = dict(zip(names, args, strict=False))
    if len(args) > len(names):
        named["*"] = args[len(names) :]
    if kwargs:
        for name, value in kwargs.items():
            # Taken already: a positional-only parameter, whose name `**kwargs` may use again.
            named["**" + name if name in named else name] = value
    return named


def _object_text(named: dict[str, Any]) -> str:
    if len(named) == 1:
        ((name, value),) = named.items()
        if type(value) is str:  # the commonest call by far
            return f'{{"{name}":{encode_basestring_ascii(value[:_MOST])}}}'
    parts = [f'"{name}":{_text(value)}' for name, value in sorted(named.items())]
    return "{" + ",".join(parts) + "}"


def _text(value: object) -> str:
    if type(value) is str:
        return encode_basestring_ascii(value[:_MOST])
    if type(value) is int:
        return _int_text(value)
    if value is None or type(value) in (bool, float):
        return repr(value)
    pieces: list[str] = []
    size = 0
    for piece in _pieces(value, 0):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST:
            break
    return "".join(pieces)


def _pieces(value: object, depth: int) -> Iterator[str]:
    """The text of a value bit by bit, so that the walk through a large one can end early."""
    if value is None or isinstance(value, (bool, float)):
        yield repr(value) if value is None or isinstance(value, bool) else float.__repr__(value)
    elif isinstance(value, Enum):
        yield from _pieces(value.value, depth + 1)
    elif isinstance(value, str):
        yield encode_basestring_ascii(value[:_MOST])
    elif isinstance(value, int):
        yield _int_text(value)
    elif depth > _DEEPEST:
        yield _type_text(value)
    elif isinstance(value, (list, tuple)):
        yield "["
        for item in cast("list[object]", value):
            yield from _pieces(item, depth + 1)
            yield ","
        yield "]"
    elif isinstance(value, (set, frozenset)):
        yield "[" + ",".join(sorted(map(_text, cast("set[object]", value)))) + "]"
    elif isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        yield from _sorted_pieces({_text(key): item for key, item in items}, depth)
    elif isinstance(value, (bytes, bytearray)):
        yield f'"{value[:_MOST].hex()}"'
    elif isinstance(value, (date, time)):
        yield f'"{value.isoformat()}"'
    elif isinstance(value, timedelta):
        yield f'"{value.days}d {value.seconds}s {value.microseconds}us"'
    elif isinstance(value, _BY_STR):
        yield encode_basestring_ascii(str(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _sorted_pieces({_text(field.name): getattr(value, field.name) for field in fields(value)}, depth)
    elif hasattr(cast("object", type(value)), "__pydantic_fields__"):
        yield from _sorted_pieces({_text(name): item for name, item in vars(value).items()}, depth)
    else:
        yield _type_text(value)


def _sorted_pieces(named: Mapping[str, Any], depth: int) -> Iterator[str]:
    yield "{"
    for name in sorted(named):
        yield name + ":"
        yield from _pieces(named[name], depth + 1)
        yield ","
    yield "}"


def _int_text(value: int) -> str:
    return int.__repr__(value) if value.bit_length() < 1024 else int.__format__(value, "x")  # repr refuses 4300 digits


def _type_text(value: object) -> str:
    kind = type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
