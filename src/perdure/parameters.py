"""The arguments of a workflow, as JSON by parameter name.

Stored arguments are an object, without defaults, so that they can be read and written in SQL:
`{"order_id": 42, "express": true}`. What `*args` and `**kwargs` took stands under their own names, as an array and an
object. Who doesn't know the code can't know the names of positional arguments, and stores them under `"$args"`:
`{"$args": [42], "express": true}`. Both forms are read.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, NotRequired, Required, cast

from typing_extensions import TypeAliasType, TypedDict, Unpack

from perdure.annotations import ANY, PYDANTIC_CONFIG, Refused, adapter_of, explain, hints_of, validation_errors
from perdure.codec import Shape, shape
from perdure.errors import InvalidArguments, SerializationError

_POSITIONAL: Final = "$args"
_PLAIN: Final = frozenset({str, int, bool, type(None)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signature:
    """What is needed of an `inspect.Signature`, whose own `bind` takes three microseconds."""

    full: inspect.Signature
    names: tuple[str, ...]  # of all parameters but *args and **kwargs
    known: frozenset[str]
    required: frozenset[str]
    positional_only: tuple[str, ...]
    positional: tuple[str, ...]  # those that can be passed by position
    var_positional: str | None
    var_keyword: str | None
    is_simple: bool  # every parameter can be passed by its name

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> _Signature:
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            full = inspect.signature(fn, annotation_format=Format.FORWARDREF)
        else:
            full = inspect.signature(fn)
        named: dict[inspect._ParameterKind, list[str]] = {kind: [] for kind in inspect._ParameterKind}
        for parameter in full.parameters.values():
            named[parameter.kind].append(parameter.name)
        only, either, rest, keyword, rest_by_name = named.values()
        names = (*only, *either, *keyword)
        return cls(
            full=full,
            names=names,
            known=frozenset(names),
            required=frozenset(name for name in names if full.parameters[name].default is inspect.Parameter.empty),
            positional_only=tuple(only),
            positional=(*only, *either),
            var_positional=rest[0] if rest else None,
            var_keyword=rest_by_name[0] if rest_by_name else None,
            is_simple=not (only or rest or rest_by_name),
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What was passed, by parameter name, in the order of the parameters.

        Raises:
            TypeError: The call doesn't fit.
        """
        if self.is_simple and len(args) <= len(self.positional):
            named = dict(zip(self.positional, args, strict=False))
            if kwargs:
                named.update(kwargs)
            is_fitting = (
                len(named) == len(args) + len(kwargs)
                and self.required <= named.keys()
                and (not kwargs or named.keys() <= self.known)
            )
            if is_fitting:
                return {name: named[name] for name in self.names if name in named} if kwargs else named
        return self.full.bind(*args, **kwargs).arguments


class Parameters:
    """What a workflow function takes. Signature and annotations are looked at on first use.

    Example:
        >>> def checkout(order_id: int, *, express: bool = False): ...
        >>> Parameters(checkout, "checkout").dump((42,), {"express": True}, 1000)
        '{"order_id":42,"express":true}'
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._fn = fn
        self._name = name
        self._known_signature: _Signature | None = None
        self._known_hints: dict[str, Any] | None = None
        self._shapes: dict[str, Shape] = {}
        self._encode: Callable[[Any], bytes] | None = None
        self._read: Callable[[str], dict[str, Any]] | None = None

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether a call has the right arguments, whatever their types.

        Raises:
            InvalidArguments: One is missing, unknown or too many.
        """
        self._bind(args, kwargs)

    def dump(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int) -> str:
        """The JSON object of a call.

        Args:
            args: The positional arguments.
            kwargs: The named ones.
            limit: The largest text allowed, in bytes of UTF-8.

        Raises:
            InvalidArguments: The call doesn't fit the signature, or an argument not its annotation.
            SerializationError: JSON can't carry an argument, or they are too large.
        """
        named = self._bind(args, kwargs)
        return self._dump_plain(named, limit) or self._dump_each(named, limit)

    def load(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to call the function with. JSON is taken leniently: `"42"` makes an `int` where one is due.

        Raises:
            InvalidArguments: The text doesn't fit the signature.
            SerializationError: The annotations can't be used.
        """
        read = self._read or self._reader()
        if '"$args"' in text:
            text = self._regrouped(text)
        try:
            named = read(text)
        except Exception as error:
            if self._signature.var_keyword is None:
                self._complain(error)
            try:
                named = read(self._regrouped(text))
            except InvalidArguments:
                raise
            except Exception as second:
                self._complain(second)
        return ((), named) if self._signature.is_simple else self._ungrouped(named)

    @property
    def _signature(self) -> _Signature:
        if self._known_signature is None:
            self._known_signature = _Signature.of(self._fn)
        return self._known_signature

    @property
    def _hints(self) -> dict[str, Any]:
        """The annotation of each parameter; of `*args` and `**kwargs` that of the whole."""
        if self._known_hints is None:
            try:
                found = hints_of(self._fn)
            except Refused as refused:
                where = f"an argument of workflow {self._name!r}"
                raise SerializationError(where, refused.type_name, refused.reason) from refused.__cause__
            hints = {name: found.get(name, ANY) for name in self._signature.full.parameters}
            if (rest := self._signature.var_positional) is not None:
                is_unpacked = typing.get_origin(hints[rest]) is Unpack
                hints[rest] = types.GenericAlias(list, (ANY if is_unpacked else hints[rest],))
            if (rest := self._signature.var_keyword) is not None:
                is_unpacked = typing.get_origin(hints[rest]) is Unpack
                unpacked = typing.get_args(hints[rest])[0] if is_unpacked else None
                hints[rest] = unpacked or types.GenericAlias(dict, (str, hints[rest]))
            self._known_hints = hints
        return self._known_hints

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._signature.bind(args, kwargs)
        except TypeError as error:
            raise InvalidArguments(self._name, str(error)) from None

    def _dump_plain(self, named: dict[str, object], limit: int) -> str | None:
        """All at once, where nothing can be lost; None where one has to look closer."""
        shapes = self._shapes
        for name, value in named.items():
            kind = type(value)
            if kind not in _PLAIN or name not in shapes or kind not in shapes[name].scalars:
                return None
            if isinstance(value, int) and value.bit_length() > 1024:
                return None
        if self._encode is None:
            import pydantic_core

            self._encode = pydantic_core.to_json
        try:
            text = self._encode(named).decode()
        except ValueError:
            return None
        return None if "\\u0000" in text or len(text) * 4 > limit else text

    def _dump_each(self, named: dict[str, Any], limit: int) -> str:
        parts: list[str] = []
        for name, value in named.items():
            if name not in self._shapes:
                self._shapes[name] = shape(self._hints[name])
            if name == self._signature.var_positional:
                value = list(value)
            try:
                text, _ = self._shapes[name].encode(value, limit)
            except Refused as refused:
                self._refuse(name, refused)
            parts.append(f'"{name}":{text}')
        return _within(f"{{{','.join(parts)}}}", limit, self._name)

    def _refuse(self, parameter: str, refused: Refused) -> NoReturn:
        if refused.is_mismatch:
            reason = f"argument {parameter!r} is {refused.type_name}; {refused.reason}"
            raise InvalidArguments(self._name, reason) from refused.__cause__
        where = f"argument {parameter!r} of workflow {self._name!r}"
        raise SerializationError(where, refused.type_name, refused.reason) from refused.__cause__

    def _reader(self) -> Callable[[str], dict[str, Any]]:
        """One validator for all arguments: they are read as a TypedDict that has the parameters as its keys."""
        required, hints = self._signature.required, self._hints
        # The aliases keep Field(...) metadata of an annotation from being taken for that of a key.
        alias: Any = TypeAliasType
        keys: dict[str, Any] = {
            name: (Required if name in required else NotRequired)[alias(name, hint)] for name, hint in hints.items()
        }
        arguments: Any = cast("Any", TypedDict)("Arguments", keys)
        arguments.__pydantic_config__ = {**PYDANTIC_CONFIG, "extra": "forbid"}
        try:
            read: Callable[[str], dict[str, Any]] = adapter_of(arguments).validator.validate_json
        except Refused as refused:
            for name, hint in hints.items():
                try:
                    shape(hint).build()
                except Refused as culprit:
                    self._refuse(name, culprit)
            self._refuse(", ".join(hints), refused)
        self._read = read
        return read

    def _regrouped(self, text: str) -> str:
        """Arguments by parameter name, out of `$args` and of keys that belong under `**kwargs`."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._complain(error)
        if not isinstance(given, dict):
            return text
        named = cast("dict[str, Any]", given)
        if _POSITIONAL in named:
            positional = named.pop(_POSITIONAL)
            if not isinstance(positional, list):
                raise InvalidArguments(self._name, f"{_POSITIONAL!r} must be an array of the positional arguments")
            named = self._bind(tuple(cast("list[object]", positional)), named)
        elif (rest := self._signature.var_keyword) is not None:
            grouped = {name: named.pop(name) for name in [*named] if name in self._hints}
            if named and isinstance(grouped.setdefault(rest, {}), dict):
                grouped[rest].update(named)
            named = grouped
        return json.dumps(named)

    def _ungrouped(self, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What stands under `*args` and `**kwargs`, and what has no name to be passed by, in its place again."""
        signature = self._signature
        rest: list[Any] = named.pop(signature.var_positional, []) if signature.var_positional else []
        more: dict[str, Any] = named.pop(signature.var_keyword, {}) if signature.var_keyword else {}
        by_position = signature.positional if rest else signature.positional_only
        defaults = signature.full.parameters
        args = [named.pop(name) if name in named else defaults[name].default for name in by_position]
        if twice := more.keys() & (signature.known - frozenset(signature.positional_only)):
            raise InvalidArguments(self._name, f"argument {min(twice)!r} is given twice")
        return (*args, *rest), {**named, **more}

    def _complain(self, error: Exception) -> NoReturn:
        found = validation_errors(error) or []
        place: tuple[Any, ...] = found[0]["loc"] if found else ()
        if not place:
            reason = f"they must be a JSON object by parameter name: {explain(error)}"
        elif found[0]["type"] == "missing" and len(place) == 1:
            reason = f"argument {place[0]!r} is missing"
        elif found[0]["type"] == "extra_forbidden" and len(place) == 1:
            known = ", ".join(self._signature.full.parameters) or "no arguments"
            reason = f"there is no parameter {place[0]!r}; it takes {known}"
        else:
            reason = f"argument {explain(error)}"
        raise InvalidArguments(self._name, reason) from error


def dump_untyped(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int) -> str:
    """The arguments of a workflow whose code isn't known here: `{"$args": [42], "express": true}`.

    Raises:
        InvalidArguments: One is named `$args`.
        SerializationError: One doesn't survive JSON exactly, or they are too large.
    """
    if _POSITIONAL in kwargs:
        raise InvalidArguments(name, f"no argument can be named {_POSITIONAL!r}")

    def text_of(value: Any, which: object) -> str:
        return shape(ANY).settle(value, f"argument {which!r} of workflow {name!r}", limit)[0]

    parts = [f"{text_of(key, key)}:{text_of(value, key)}" for key, value in kwargs.items()]
    if args:
        positional = ",".join([text_of(value, place) for place, value in enumerate(args, start=1)])
        parts.insert(0, f'"{_POSITIONAL}":[{positional}]')
    return _within(f"{{{','.join(parts)}}}", limit, name)


def _within(text: str, limit: int, name: str) -> str:
    size = len(text) if text.isascii() else len(text.encode())
    if size > limit:
        reason = f"their JSON takes {size} bytes, and the limit is {limit}; store them elsewhere and pass a reference"
        raise SerializationError(f"the arguments of workflow {name!r}", "dict", reason)
    return text
