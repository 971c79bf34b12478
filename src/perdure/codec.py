"""Payloads: values become JSON text by their type annotation, and come back as what they were.

A `Shape` is what one annotation says about its values. The rule it keeps: what replay will read is what was given, or
the value is refused before anything is written. Three ways lead to "nothing was lost", the cheapest first:

1. The value is exactly a `str`, `int`, `float`, `bool` or `None`, and the annotation says so.
2. Encoded and decoded, it is the same down to the type of every element (compared by `marshal`, which runs in C).
3. It is an instance of its annotation in pydantic's strict sense, encodes without a warning, and what comes back is
   equal, or encodes to the same bytes and has lost no field on the way.
"""

from __future__ import annotations

import inspect
import json
import marshal
import math
import re
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from typing import Any, Final, NoReturn, Protocol, cast

from perdure.annotations import (
    ANY,
    SCALARS,
    Refused,
    adapter_of,
    describe,
    explain,
    hints_of,
    is_any,
    mentions_any,
    scalars_of,
    type_name,
)
from perdure.errors import SerializationError

_JSON_TYPES: Final = SCALARS | {list, dict}
_WORTH_MARSHALLING: Final = frozenset({list, dict, tuple})
_SURELY_READABLE: Final = 4000  # digits; from 4300 on an int may be written that can't be read
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def has_nul(text: str) -> bool:
    """Whether JSON holds a NUL character: `json` takes it, and `jsonb`, as which the views show it, doesn't."""
    return "\\u0000" in text and _NUL.search(text) is not None


class Codec(Protocol):
    """What stands between payloads and the database: compression, encryption.

    JSON text in, JSON text out, because the columns are of type `json` (a JSON string is JSON text too). `decode` must
    give back what `encode` was given, also after keys were rotated, and for rows that were written before the codec was
    put in. Both are called on the event loop, once per payload.
    """

    def encode(self, text: str) -> str:
        """The text that is stored in place of `text`."""
        ...

    def decode(self, text: str) -> str:
        """The text that `encode` was given."""
        ...


class Shape:
    """How the values of one annotation become JSON text, and come back.

    Attributes:
        annotation: What it was made from, once it has been used.
        scalars: The types whose exact instances can't lose anything, once it has been used; empty before.

    The annotation is looked at on first use. `Any`, `object` and no annotation at all mean that values must survive
    JSON exactly. Bytes are base64, except in pydantic models, whose own configuration holds.

    Example:
        >>> Shape(set[int]).settle({42}, "the result of step 'ids'", 1000)
        ('[42]', {42})
    """

    __slots__ = ("_decode", "_encode", "_holds_any", "_is_exact", "_resolve", "_strict", "annotation", "scalars")

    annotation: Any
    _encode: Callable[[Any], bytes]
    _decode: Callable[[str | bytes], Any]
    _strict: tuple[Callable[[Any], Any], Callable[[Any], bytes]]  # is it an instance; encode, a warning is an error
    _is_exact: bool
    _holds_any: bool

    def __init__(self, annotation: Any = ANY) -> None:
        self._resolve: Callable[[], Any] | None = lambda: annotation
        self.scalars: frozenset[type] = frozenset()

    @classmethod
    def deferred(cls, resolve: Callable[[], Any]) -> Shape:
        """A shape whose annotation is asked for at first use, because it may name what isn't defined yet."""
        shape = cls()
        shape._resolve = resolve
        return shape

    def settle(self, value: Any, where: str, limit: int) -> tuple[str, Any]:
        """The JSON text of `value`, and the value as everyone will see it who reads the text back.

        Args:
            value: What is to be stored.
            where: What it is for, such as "the result of step 'charge'".
            limit: The largest text allowed, in bytes of UTF-8.

        Raises:
            SerializationError: JSON can't carry it there and back, or it is no instance of the annotation.
        """
        try:
            return self.encode(value, limit)
        except Refused as refused:
            raise SerializationError(where, refused.type_name, refused.reason) from refused.__cause__

    def dump(self, value: Any, where: str, limit: int) -> str:
        """The JSON text of `value`, as `settle` has it."""
        return self.settle(value, where, limit)[0]

    def load(self, text: str | bytes) -> Any:
        """The value of a JSON text, leniently: the string `"42"` makes an `int` where the annotation says so.

        Raises:
            ValueError: The text doesn't fit the annotation; one line says where.
            SerializationError: The annotation itself can't be used.
        """
        if self._resolve is not None:
            try:
                self.build()
            except Refused as refused:
                raise SerializationError("a stored value", refused.type_name, refused.reason) from refused.__cause__
        try:
            return self._decode(text)
        except Exception as error:
            raise ValueError(explain(error)) from error

    def encode(self, value: object, limit: int) -> tuple[str, Any]:
        """What `settle` does, for callers that say in their own words what the value was for.

        Raises:
            Refused: As above.
        """
        kind = type(value)
        if self._resolve is not None:
            self.build()
        try:
            raw = self._encode(value)
        except Exception as error:
            self._refuse(value, error)
        if len(raw) > limit:
            raise Refused(
                type_name(value),
                f"its JSON takes {len(raw)} bytes, and the limit is {limit}; store it elsewhere and pass a reference",
            )
        text = raw.decode()
        if kind in self.scalars and (kind is not int or len(raw) <= _SURELY_READABLE):
            decoded = value
            if isinstance(value, float) and not math.isfinite(value):
                raise _not_finite(value)
        else:
            try:
                decoded = self._decode(raw)
            except Exception as error:
                self._refuse(value, error)
            if kind not in _WORTH_MARSHALLING or not _is_identical(value, decoded):
                self._judge(value, decoded, raw)
            if "Infinity" in text or "NaN" in text:  # the same bytes come back, so only the text shows it
                json.loads(text, parse_constant=lambda _: _raise(_not_finite(value)))
        if has_nul(text):
            raise Refused(type_name(value), "it holds a NUL character, which PostgreSQL can't store; remove it")
        return text, decoded

    def build(self) -> None:
        """Look at the annotation now.

        Raises:
            Refused: Nothing can be made of it.
        """
        resolve = self._resolve
        if resolve is None:
            return
        annotation = resolve()
        adapter = adapter_of(annotation)
        to_json, validator = adapter.serializer.to_json, adapter.validator
        self.annotation = annotation
        # Warnings cost a microsecond: the fast way looks at what comes back instead.
        self._encode = partial(to_json, warnings=False)
        self._decode = validator.validate_json
        self._strict = (partial(validator.validate_python, strict=True), partial(to_json, warnings="error"))
        self._holds_any = mentions_any(adapter.core_schema)
        self._is_exact = is_any(annotation)
        self.scalars = SCALARS if self._is_exact else scalars_of(annotation)
        self._resolve = None  # last, so that a second thread never sees a half-built shape

    def _refuse(self, value: Any, error: Exception) -> NoReturn:
        """Say why `value` couldn't be encoded, or its text not be decoded."""
        if not self._is_exact:
            self._check_instance(value)
        else:
            with suppress(RecursionError):  # it holds itself, or is nested as deep: that is why
                _refuse_inexact(value)
        raise Refused(type_name(value), f"JSON can't carry it: {explain(error)}") from error

    def _check_instance(self, value: Any) -> None:
        validate, encode = self._strict
        try:
            validate(value)
        except Exception as error:
            raise self._mismatch(value, explain(error)) from error
        try:
            encode(value)
        except Exception as error:
            try:
                self._encode(value)
            except Exception:
                return  # an instance perhaps, but JSON can't carry it: the caller knows why
            raise self._mismatch(value, "it, or a part of it, is something else") from error

    def _mismatch(self, value: Any, reason: str) -> Refused:
        return Refused(type_name(value), f"it should be {describe(self.annotation)}: {reason}", is_mismatch=True)

    def _judge(self, value: Any, decoded: Any, raw: bytes) -> None:
        """Refuse `value` unless `decoded`, which isn't exactly the same, is as good."""
        if self._is_exact:
            _refuse_inexact(value)
            raise Refused(type_name(value), "it comes back from JSON changed; annotate it with its type")
        self._check_instance(value)
        try:
            is_equal = bool(decoded == value)
            if is_equal and type(decoded) is type(value):
                return
            if not is_equal and self._encode(decoded) != raw:
                raise Refused(type_name(value), "decoded and encoded again it is something else; check its validators")
            _refuse_loss(value, decoded, self._holds_any)
        except Refused:
            raise
        except Exception as error:
            raise Refused(type_name(value), f"it can't be compared with what comes back: {explain(error)}") from error


@lru_cache(maxsize=1024)
def _shared(annotation: Any) -> Shape:
    return Shape(annotation)


def shape(annotation: Any) -> Shape:
    """The shape of an annotation, made once."""
    try:
        return _shared(annotation)
    except TypeError:  # unhashable, such as Annotated[int, []]
        return Shape(annotation)


def result_shape(fn: Callable[..., Any]) -> Shape:
    """The shape of what `fn` returns, or of what the awaitable gives that it returns.

    Raises (at first use):
        SerializationError: The annotations can't be resolved.
    """

    def resolve() -> Any:
        annotation = hints_of(fn).get("return", ANY)
        if annotation is NoReturn or annotation is typing.Never:
            return ANY
        origin = typing.get_origin(annotation) or annotation
        if inspect.iscoroutinefunction(fn) or origin not in (Awaitable, Coroutine):
            return annotation
        arguments = typing.get_args(annotation)
        return arguments[-1] if arguments else ANY

    return Shape.deferred(resolve)


def _is_identical(value: Any, decoded: Any) -> bool:
    """The same down to the exact type of every element; False also where marshal doesn't know one."""
    try:
        return marshal.dumps(value, 2) == marshal.dumps(decoded, 2)  # later versions encode object identity too
    except ValueError:
        return False


def _refuse_inexact(value: object, path: str = "") -> None:
    """Find the first part of a value that JSON has no exact form for."""
    if type(value) not in _JSON_TYPES:
        held = f"value{path} is" if path else "this is"
        raise Refused(
            type_name(value),
            f"{held} no plain JSON, and would come back changed; annotate it with its type, or pass JSON",
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise _not_finite(value)
    if isinstance(value, dict):
        for key, item in cast("dict[object, object]", value).items():
            if type(key) is not str:
                raise Refused(
                    type_name(key),
                    f"a key of value{path} is no str, and would come back as one; annotate it as dict[...]",
                )
            _refuse_inexact(item, f"{path}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(cast("list[object]", value)):
            _refuse_inexact(item, f"{path}[{index}]")


def _refuse_loss(before: object, after: object, holds_any: bool, path: str = "value") -> None:
    """Refuse what came back as less: a subclass as its base, a dict without some keys, nan as null.

    Other types may come back where the annotation says so (a list for the tuple that was given for a `Sequence`), but
    under `Any` it never does.
    """
    held = _fields(before)
    if type(before) is not type(after):
        is_kept = isinstance(before, type(after)) or before == after
        is_number = isinstance(before, int)  # as a float, which has digits for 53 bits only
        if held is not None or hasattr(after, "_fields") or ((holds_any or is_number) and not is_kept):
            raise Refused(
                type_name(before),
                f"{path} would come back as {type_name(after)}; annotate the type it has, or convert it first",
            )
    if isinstance(before, float) and not math.isfinite(before):
        raise _not_finite(before)
    if held is not None:
        kept = _fields(after) or {}
        for name in held.keys() & kept.keys():
            _refuse_loss(held[name], kept[name], holds_any, f"{path}.{name}")
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        items, others = cast("Mapping[object, object]", before), cast("Mapping[object, object]", after)
        if len(items) != len(others) or (holds_any and items.keys() != others.keys()):
            raise Refused(type_name(before), f"{path} would come back with other keys; annotate all of them")
        for key in items.keys() & others.keys():
            _refuse_loss(items[key], others[key], holds_any, f"{path}[{key!r}]")
    elif isinstance(before, Set) and before != after:
        for item in cast("Set[object]", before):
            _refuse_loss(item, item, holds_any, f"an element of {path}")
        raise Refused(type_name(before), f"{path} would come back with other elements")
    elif isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        pairs = zip(cast("list[object]", before), cast("list[object]", after), strict=True)
        for index, pair in enumerate(pairs):
            _refuse_loss(*pair, holds_any, f"{path}[{index}]")


def _fields(value: object) -> Mapping[str, Any] | None:
    """What a model or a dataclass holds; None for other values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in fields(value)}
    if hasattr(type(value), "__pydantic_fields__"):
        return {**vars(value), **(getattr(value, "__pydantic_extra__", None) or {})}
    return None


def _not_finite(value: Any) -> Refused:
    return Refused(type_name(value), "inf and nan have no JSON form; use None or a string in their place")


def _raise(error: Exception) -> NoReturn:
    raise error
