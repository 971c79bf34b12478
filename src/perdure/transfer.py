"""A workflow as JSON, out of one database and into another: for a bug report, a test, a move.

    {"perdure": 1, "workflow": {"id": ..., "name": ..., ...}, "checkpoints": [{"key": "$input", ...}, ...],
     "messages": [{"place": ..., "topic": ..., ...}, ...], "events": [...], "entries": [...], "parts": [...]}

Entries are those of its streams, and parts say who wrote them. What an older version exported has fewer lists.
Payloads stand in it as they are stored: what a codec encrypted stays so. What hadn't ended when it was exported waits
for an operator where it is imported, because it may still run where it came from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import psycopg

from perdure.codec import has_nul
from perdure.errors import KeyConflict, SerializationError, WorkflowNotFound
from perdure.model.keys import INPUT, RESULT, check_name
from perdure.store.arrays import BigInts, Ints, Texts, Times, Uuids, columns
from perdure.store.database import Database, Interrupted
from perdure.store.statements import SHARD

FORMAT = 1
_ROW = ("id", "name", "key", "queue", "priority", "partition", "deadline", "version", "attributes", "created_at")
_CHECKPOINT: dict[str, Callable[..., Any]] = {
    "key": Texts,
    "kind": Texts,
    "position": Ints,
    "status": Texts,
    "payload": Texts,
    "args_hash": BigInts,
    "attempts": Ints,
    "recoveries": Ints,
    "version": Texts,
    "started_at": Times,
    "wake_at": Times,
    "created_at": Times,
    "epoch": BigInts,
}
_LISTS: dict[str, dict[str, Callable[..., Any]]] = {
    "messages": {
        "place": BigInts,
        "id": Uuids,
        "topic": Texts,
        "payload": Texts,
        "sender_id": Uuids,
        "created_at": Times,
    },
    "events": {"name": Texts, "number": BigInts, "id": Uuids, "payload": Texts, "created_at": Times},
    "entries": {"name": Texts, "number": BigInts, "part": Ints, "payload": Texts, "created_at": Times},
    "parts": {
        "name": Texts,
        "part": Ints,
        "key": Texts,
        "epoch": BigInts,
        "attempt": Ints,
        "first": BigInts,
        "is_void": Ints,
    },
}
"""What else hangs on a workflow, and may be none."""
_JSON = ("payload", "attributes")
_TIMES = ("deadline", "created_at", "started_at", "wake_at")
_IDS = ("id", "sender_id")
_TYPES: dict[str, type] = {"is_void": bool} | dict.fromkeys(
    (
        "priority",
        "position",
        "args_hash",
        "attempts",
        "recoveries",
        "epoch",
        "place",
        "number",
        "part",
        "attempt",
        "first",
    ),
    int,
)
"""What isn't a text."""
_CALLED: dict[type, str] = {int: "number", bool: "true or false", str: "text"}
_OPTIONAL = ("sender_id", "partition", "deadline", "version", "attributes", "recoveries", "started_at", "wake_at")


async def exported(database: Database, id: UUID) -> dict[str, Any]:
    """The workflow, its checkpoints, and what hangs on it.

    Raises:
        WorkflowNotFound: There is no such workflow.
    """
    rows = await database.fetch("export_row", SHARD, id)
    if not rows:
        raise WorkflowNotFound(id)
    checkpoints = await database.fetch("export_checkpoints", SHARD, id)
    if not checkpoints:  # deleted in between
        raise WorkflowNotFound(id)
    lists = {name: await database.fetch(f"export_{name}", SHARD, id) for name in _LISTS}
    return {
        "perdure": FORMAT,
        "workflow": {name: _out(name, getattr(rows[0], name)) for name in _ROW},
        "checkpoints": _rows_out(checkpoints, _CHECKPOINT),
        **{name: _rows_out(rows, _LISTS[name]) for name, rows in lists.items()},
    }


async def imported(database: Database, text: Mapping[str, Any]) -> UUID:
    """Insert what `exported` gave; returns the workflow's id.

    Raises:
        SerializationError: It isn't what `exported` gives.
        KeyConflict: It is there already, or its key is taken.
    """
    given, params = _params(text)
    id: UUID = params[1]
    in_doubt = False

    async def attempt() -> bool:
        nonlocal in_doubt
        try:
            if await database.attempt("import", *params):
                return True
            return in_doubt and bool(await database.attempt("started", SHARD, Uuids([id])))  # it was ours
        except Interrupted as interruption:
            in_doubt |= interruption.outcome_unknown
            raise

    try:
        inserted = await database.persist(attempt)
    except (psycopg.Error, struct.error) as error:
        raise _malformed(error) from error
    if not inserted:
        raise KeyConflict(given["name"], given["key"] or str(id), id)
    return id


def identity(text: Mapping[str, Any]) -> tuple[UUID, str, str | None]:
    """The id, the name and the key of what `exported` gave.

    Raises:
        SerializationError: It isn't what `exported` gives.
    """
    given, params = _params(text)
    return params[1], given["name"], given["key"]


def _params(text: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The workflow's row, and the parameters of the statement."""
    try:
        if text["perdure"] != FORMAT:
            raise ValueError(f"its format is {text['perdure']!r}, and this version reads {FORMAT}")
        row = text["workflow"]
        given = {name: None if name == "key" and row.get(name) is None else _in(name, row.get(name)) for name in _ROW}
        id = cast("UUID", given["id"])
        check_name("workflow", given["name"])
        check_name("queue", given["queue"])
        rows = _rows_in(text["checkpoints"], _CHECKPOINT)
        lists = {name: _rows_in(text.get(name, ()), _LISTS[name]) for name in _LISTS}
        kinds = {key: kind for key, kind, *_ in rows}
        if kinds.get(INPUT) != "input" or kinds.get(RESULT, "result") != "result":
            raise ValueError("its checkpoints don't begin with the input, or don't end with a result")
        epochs = [cast("int", row[-1]) for row in rows] + [cast("int", part[3]) for part in lists["parts"]]
        params = (
            SHARD, id, given["name"], given["key"], given["queue"], given["priority"], given["partition"],
            given["version"], given["attributes"], given["created_at"], RESULT in kinds, max([1, *epochs]),
            *columns(rows, tuple(_CHECKPOINT.values())),
            *(column for name in _LISTS for column in columns(lists[name], tuple(_LISTS[name].values()))),
        )  # fmt: skip
        return given, params
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _malformed(error) from error


def _malformed(error: Exception) -> SerializationError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; give what 'perdure workflow export' wrote"
    return SerializationError("the workflow to be imported", "JSON", reason)


def _rows_out(rows: Iterable[Any], kinds: Iterable[str]) -> list[dict[str, Any]]:
    return [{name: _out(name, getattr(row, name)) for name in kinds} for row in rows]


def _rows_in(given: Any, kinds: Iterable[str]) -> list[tuple[Any, ...]]:
    return [tuple(_in(name, each.get(name)) for name in kinds) for each in given]


def _out(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _JSON:
        return json.loads(value)
    if name in _TIMES:
        return cast("datetime", value).astimezone(UTC).isoformat()
    return str(value) if isinstance(value, UUID) else value


def _in(name: str, value: Any) -> Any:
    """A value as the statement takes it."""
    if value is None and name in _OPTIONAL:
        return None
    if name in _JSON:
        text = json.dumps(value, ensure_ascii=False)
        if has_nul(text):  # it would be stored, and then no view that shows it could be read
            raise ValueError(f"its {name} holds a NUL character, which PostgreSQL can't store")
        if name == "attributes" and not isinstance(value, dict):
            raise TypeError("its attributes are no object")
        return text
    expected = _TYPES.get(name, str)
    if type(value) is not expected:
        raise TypeError(f"its {name} is no {_CALLED[expected]}: {value!r}")
    if name in _IDS:
        return UUID(cast("str", value))
    if name not in _TIMES:
        return value
    time = datetime.fromisoformat(cast("str", value))
    if time.tzinfo is None:
        raise ValueError(f"its {name} has no time zone: {value!r}")
    return time
