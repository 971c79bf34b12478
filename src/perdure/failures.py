"""Exceptions as records that can be stored and shown, and the exceptions that are raised again from them.

A record is a JSON object:

    {"type": "shop.errors.CardDeclined", "message": "...", "args": [...], "state": {...}, "traceback": "...",
     "attempts": 3, "steps": ["charge"]}

`args` and `state` (the exception's `__dict__`) stand there only if they survive JSON exactly; `steps` are the keys of
the steps that it came from, if any. A class is only ever
found in a `Catalogue`, which the code fills; what a row says can choose among those, and bring nothing in. No exception
is so strange, and no row so spoilt, that something here raises.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import traceback
import typing
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast
from uuid import UUID

from perdure import errors
from perdure.errors import ConfigurationError, StepFailed, WorkflowCancelled, WorkflowFailed

_KIB: Final = 1024
_MOST_MESSAGE: Final = 8 * _KIB
_MOST_TRACEBACK: Final = 16 * _KIB
_MOST_ARGS: Final = 32 * _KIB  # holds a StepFailed, which has both of the above among its arguments
_MOST_STATE: Final = 8 * _KIB
_DEEPEST: Final = 32
_MOST_CHILDREN: Final = 10
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_STEP: Final = "__perdure_step__"
_MOST_CAUSES: Final = 100
_OWN_FRAMES: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep


def qualified_name(cls: type) -> str:
    """The name of a class in records: `shop.errors.CardDeclined`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def record(error: BaseException, attempts: int = 1) -> str:
    """The JSON text of what is kept of an exception: at most about 64 KiB, whatever it holds.

    Args:
        error: What was raised.
        attempts: How many attempts were made until it was final.
    """
    kept: dict[str, Any] = {
        "type": _clipped(qualified_name(type(error)), 512),
        "message": _clipped(_message(error), _MOST_MESSAGE),
        "args": _exact(_args(error), _MOST_ARGS),
        "state": _exact(_state(error), _MOST_STATE),
        "traceback": _clipped(_traceback(error), _MOST_TRACEBACK, from_end=True),
        "attempts": attempts,
        "steps": [key for key, _ in steps(error)] or None,
    }
    return json.dumps({name: value for name, value in kept.items() if value is not None}, ensure_ascii=False)


def of_step(error: Exception, key: str, attempts: int) -> Exception:
    """The error, marked as the failure of that step, which made so many attempts."""
    try:
        vars(error)[_STEP] = (key, attempts)
    except Exception:  # a class of its author's own making
        pass
    return error


def from_child(payload: str, id: UUID) -> str:
    """The record of a child's failure, as its parent keeps it: it says whose it is."""
    return json.dumps({**_row(payload), "workflow_id": str(id)}, ensure_ascii=False)


def of_child(catalogue: Catalogue, payload: str, key: str) -> Exception:
    """What a parent gets of a child that didn't succeed: a failure of the child's own steps is the child's."""
    error = catalogue.rebuild(payload, WorkflowFailed)
    if isinstance(error, StepFailed):
        error = WorkflowFailed(error.type, error.message, error.traceback, error.attempts)
    return of_step(error, key, 1)


def steps(error: BaseException) -> list[tuple[str, int]]:
    """The steps whose failures led to this error, and how many attempts each made: itself, its causes, its group."""
    found: dict[str, int] = {}
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen or len(seen) > _MOST_CAUSES:
            continue
        seen.add(id(one))
        try:
            mark = vars(one).get(_STEP)
            if isinstance(mark, tuple):
                key, attempts = cast("tuple[str, int]", mark)
                found[key] = attempts
                continue  # what is behind it is the body's own affair
            waiting += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                waiting += cast("Any", one).exceptions
        except Exception:  # a class of its author's own making
            continue
    return list(found.items())


class Catalogue:
    """The exception classes that may be rebuilt: the built-in ones, perdure's own, and those that the code names.

    Example:
        >>> Catalogue([]).rebuild(record(KeyError("sku")), StepFailed)
        KeyError('sku')
    """

    def __init__(self, extra: Iterable[type[Exception]] = ()) -> None:
        """Take in `extra`, the classes of `@step(raises=...)` and `App(errors=...)`.

        Raises:
            ConfigurationError: One of them is no class of exceptions, or not one that may be caught as `Exception`.
        """
        self._classes: Mapping[str, type[Exception]] = {
            **_KNOWN,
            **{qualified_name(_checked(cls)): cls for cls in extra},
        }

    def extended(self, more: Iterable[type[Exception]]) -> Catalogue:
        """A catalogue of these classes and `more`; this one stays as it is.

        Raises:
            ConfigurationError: As above.
        """
        return Catalogue([*self._classes.values(), *more])

    def rebuild(
        self, recorded: str | Mapping[str, Any], fallback: type[StepFailed] | type[WorkflowFailed]
    ) -> StepFailed | WorkflowFailed | Exception:
        """The exception of a record, to be raised; its recorded traceback is among its notes.

        A class that isn't in the catalogue, or can't be made from what was recorded, gives `fallback`. So does
        `StopIteration`, which Python doesn't let pass through a coroutine.
        """
        row = _row(recorded)
        name, message, trace = (_text(row.get(key), "") for key in ("type", "message", "traceback"))
        error: Exception | None = None
        cls = self._classes.get(name)
        if cls is not None and not issubclass(cls, (StopIteration, StopAsyncIteration)):
            error = _rebuilt(cls, row.get("args"), row.get("state"), message)
        if error is None:
            attempts = row.get("attempts")
            error = fallback(name or "unknown", message, trace, attempts if type(attempts) is int else 1)
        if trace:
            BaseException.add_note(error, f"recorded traceback:\n{trace}")
        return error


_KNOWN: Final[Mapping[str, type[Exception]]] = {
    qualified_name(cls): cls
    for cls in (*vars(builtins).values(), *vars(errors).values())
    if isinstance(cls, type) and issubclass(cls, Exception) and not cls.__name__.startswith("_")
}


def _checked(cls: type[Exception]) -> type[Exception]:
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        raise ConfigurationError(
            f"{cls!r} is no class of exceptions; name subclasses of Exception in raises= and errors="
        )
    return cls


# --- Writing ------------------------------------------------------------------------------------------------------


def _message(error: BaseException) -> str:
    try:
        if isinstance(error, StepFailed | WorkflowFailed) and not isinstance(error, WorkflowCancelled):
            return f"{error.type}: {error.message}"  # without the advice to whoever reads its text in a traceback
        message = str(error)
        if isinstance(error, BaseExceptionGroup):
            children: tuple[BaseException, ...] = cast("Any", error).exceptions[:_MOST_CHILDREN]
            texts = [f"{qualified_name(type(child))}: {_message(child)}" for child in children]
            message = f"{message}: {'; '.join(texts)}"
    except BaseException:  # code of the exception's author, which may do anything; its traceback is still recorded
        return "<its text can't be shown: str() failed>"
    return message


def _args(error: BaseException) -> list[Any] | None:
    try:
        args: list[Any] = list(error.args)
    except Exception:
        return None
    if isinstance(error, OSError) and isinstance(error.filename, str) and type(error).__module__ == builtins.__name__:
        args.append(error.filename)  # its constructor keeps it elsewhere
        if isinstance(error.filename2, str):
            args += [None, error.filename2]
    if type(error).__module__ == errors.__name__:
        return [_plain(arg) for arg in args]
    return _unpacked(error, args)


def _unpacked(error: BaseException, args: list[Any]) -> list[Any]:
    """The arguments of the built-in errors whose own ones are no JSON: `_packed` makes them again."""
    if isinstance(error, SyntaxError) and len(args) == 2 and isinstance(args[1], tuple):
        return [args[0], list(cast("tuple[object, ...]", args[1]))]
    if type(error) is UnicodeDecodeError:
        return [error.encoding, b64encode(error.object).decode(), error.start, error.end, error.reason]
    return args


def _packed(cls: type[Exception], args: list[Any]) -> list[Any]:
    if issubclass(cls, SyntaxError) and len(args) == 2 and isinstance(args[1], list):
        return [args[0], tuple(cast("list[object]", args[1]))]
    if cls is UnicodeDecodeError:
        return [args[0], b64decode(args[1]), *args[2:]]
    return args


def _plain(arg: object) -> object:
    """An argument of one of perdure's errors as JSON; rebuilding knows its type from the constructor."""
    if isinstance(arg, UUID):
        return str(arg)
    return list(cast("tuple[object, ...]", arg)) if isinstance(arg, tuple) else arg


def _state(error: BaseException) -> dict[str, Any] | None:
    if type(error).__module__ == errors.__name__:
        return None  # their arguments say it all
    try:
        state = {name: value for name, value in vars(error).items() if not name.startswith("__")}
    except Exception:
        return None
    return state or None


def _traceback(error: BaseException) -> str:
    """As Python prints it, causes and groups included, without the frames of perdure itself."""
    try:
        found = traceback.TracebackException.from_exception(error, lookup_lines=False, compact=True)
        _hide_own_frames(found)
        return "".join(found.format())
    except Exception as failure:
        return f"{qualified_name(type(error))}: <its traceback can't be shown: {type(failure).__name__}>\n"


def _hide_own_frames(found: traceback.TracebackException) -> None:
    waiting: list[traceback.TracebackException | None] = [found]
    while waiting:
        if (one := waiting.pop()) is not None:
            kept = [frame for frame in one.stack if not frame.filename.startswith(_OWN_FRAMES)]
            one.stack = traceback.StackSummary.from_list(kept)
            waiting += [one.__cause__, one.__context__, *(one.exceptions or ())]


def _clipped(text: str, most: int, *, from_end: bool = False) -> str:
    """The text without what PostgreSQL can't store, cut to about `most` bytes of JSON, with a note about what went."""
    kept = text[-most:] if from_end else text[:most]
    kept = _UNSTORABLE.sub("\ufffd", kept)
    while (size := len(json.dumps(kept, ensure_ascii=False).encode())) > most + 2:
        length = len(kept) * most // size
        kept = kept[len(kept) - length :] if from_end else kept[:length]
    if len(kept) == len(text):
        return kept
    note = f"... ({len(text) - len(kept)} of {len(text)} characters cut)"
    return f"{note}\n{kept}" if from_end else f"{kept}{note}"


def _exact(value: Any, most: int) -> Any:
    """The value, if JSON carries it exactly, in no more than `most` bytes; else None."""
    try:
        if value is not None and _is_exact(value, 0) and len(json.dumps(value, ensure_ascii=False).encode()) <= most:
            return value
    except Exception:  # an int of more digits than Python prints
        pass
    return None


def _is_exact(value: object, depth: int) -> bool:
    if type(value) is str:
        return _UNSTORABLE.search(value) is None
    if type(value) is float:
        return math.isfinite(value)
    if depth > _DEEPEST:
        return False
    if type(value) is list:
        return all(_is_exact(item, depth + 1) for item in cast("list[object]", value))
    if type(value) is dict:
        items = cast("dict[object, object]", value).items()
        return all(type(key) is str and _is_exact(key, depth) and _is_exact(item, depth + 1) for key, item in items)
    return value is None or type(value) is int or type(value) is bool


# --- Reading ------------------------------------------------------------------------------------------------------


def _row(recorded: str | Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        row: Any = json.loads(recorded) if isinstance(recorded, str) else recorded
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, Mapping):
        return cast("Mapping[str, Any]", row)
    return {"message": "the record of the failure can't be read"}


def _text(value: object, otherwise: str) -> str:
    return value if isinstance(value, str) else otherwise


def _rebuilt(cls: type[Exception], args: Any, state: Any, message: str) -> Exception | None:
    """An instance with what was recorded; None if there is not enough to make one."""
    given: list[Any] | None = cast("list[object]", args) if isinstance(args, list) else None
    attributes = cast("dict[str, Any]", state) if isinstance(state, dict) else {}
    if given is None and not attributes:
        return None
    error = _called(cls, given)
    if error is None and cls.__module__ not in (builtins.__name__, errors.__name__):
        error = _bare(cls, [message] if given is None else given)
    if error is None:
        return None
    try:
        # What the constructor made of `args` may be other than what it made of its own arguments, as in pickling.
        vars(error).update({name: value for name, value in attributes.items() if not name.startswith("__")})
        return error
    except Exception:
        return None


def _called(cls: type[Exception], args: list[Any] | None) -> Exception | None:
    if args is None:
        return None
    try:
        if cls.__module__ == errors.__name__:
            args = _typed(cls, args)
        args = _packed(cls, args)
        error = cls(*args)
        if not isinstance(error, OSError):
            error.args = tuple(args)
        str(error)
    except Exception:
        return None
    return error if isinstance(error, cls) else None


def _bare(cls: type[Exception], args: list[Any]) -> Exception | None:
    try:
        error = cls.__new__(cls)
        error.args = tuple(args)
    except Exception:
        return None
    return error if isinstance(error, cls) else None


def _typed(cls: type[Exception], args: list[Any]) -> list[Any]:
    """The arguments of one of perdure's errors, as its constructor has them."""
    hints = [hint for name, hint in typing.get_type_hints(cls.__init__).items() if name != "return"]
    for place, hint in enumerate(hints[: len(args)]):
        if hint is UUID:
            args = [*args[:place], UUID(args[place]), *args[place + 1 :]]
        elif typing.get_origin(hint) is tuple:
            args = [*args[:place], tuple(args[place]), *args[place + 1 :]]
    return args
