"""Rows as a hostile or buggy client leaves them: anything that the types and constraints of the tables let through."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import psycopg

TABLES = (
    "workflow_rows", "checkpoints", "queue_entries", "waits", "outbox", "message_rows", "event_rows", "event_waits",
    "stream_rows", "stream_parts", "deadlines", "queue_rows", "worker_rows", "retention_rows", "maintenance",
    "running_steps",
)  # fmt: skip

WORDS = (
    "", "$input", "$result", "$cancel", "$cancelled", "$runs", "flow", "listen", "family", "healthy", "unknown", "one",
    "one#1", "recv(numbers)", "/", "#", "##", "a/b#c", "\u202e", "x" * 3000, "default", "success", "error", "cancelled",
    "input", "step", "attempt", "park", "intent", "value", "timer", "sleep", "message", "start", "child", "request",
    "cancel", "result", "history", "runs", "live", "dead", "operator", "worker", "1970-01-01", "'; DROP TABLE x; --",
)  # fmt: skip

DOCUMENTS = (
    "null", "true", "0", "-1", "1e400", "123456789012345678901234567890", '""', '"text"', "[]", "{}", "[[]]", "[null]",
    '{"args":[],"kwargs":{}}',
    '{"args":{},"kwargs":[]}', '{"a":1}', '[1,2]', '{"by":7,"reason":{}}', '{"by":"$cancel"}',
    '"\\ud800"', '"\\u0000"', '{"type":"os.system","message":"touch CANARY","args":["touch CANARY"]}',
    '{"type":"builtins.eval","args":["open(\'CANARY\',\'w\')"]}', '{"type":"subprocess.Popen","args":["touch CANARY"]}',
    '{"type":"builtins.SystemExit","message":"1","args":[1]}', '{"type":"builtins.KeyboardInterrupt","args":[]}',
    '{"type":"builtins.ValueError","message":7,"args":7,"traceback":7,"notes":7}', '{"error":{"type":"x"}}',
    '{"py/object":"os.system"}', '{"__class__":"os.system"}', '{"id":"not-a-uuid"}', '{"id":null}', '{"value":{}}',
    "[" * 900 + "]" * 900, '{"k":' * 300 + "1" + "}" * 300, json.dumps("y" * 200_000), json.dumps(list(range(5000))),
)  # fmt: skip

TIMES = ("-infinity", "infinity", "4713-01-01 BC", "294276-01-01", "1970-01-01", "now")
INTS = (0, 1, -1, 2, 7, 1000, 2**31 - 1, -(2**31))
BIGS = (*INTS, 2**63 - 1, -(2**63), 1 << 40)
FLOATS = (0.0, -1.0, 1e-9, 1e300, float("inf"), float("-inf"), float("nan"))

Sql = Callable[..., list[Any]]


class Rows:
    """Spoils rows at random."""

    def __init__(self, sql: Sql, chance: Random) -> None:
        self._sql = sql
        self._chance = chance
        found = sql(
            "SELECT table_name, column_name, data_type FROM information_schema.columns "
            "WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position"
        )
        self._columns = {
            table: [(name, kind) for each, name, kind in found if each == table and name != "paused"]  # it may be
            for table in TABLES
        }
        self._ids = [row[0] for row in sql("SELECT id FROM workflow_rows ORDER BY id")]

    def spoil(self, times: int) -> list[str]:
        """Make so many changes that the database takes; returns what they are."""
        return [done for _, done in zip(range(times), self._changes(), strict=False)]

    def _changes(self) -> Iterator[str]:
        for _ in range(500):
            table = self._chance.choice(TABLES)
            count = self._sql(f"SELECT count(*) FROM {table}")[0][0]
            if count:
                place = self._chance.randrange(count)
                change = self._chance.choice((self._update, self._update, self._update, self._insert, self._delete))
                try:
                    change(table, place)
                except psycopg.Error:
                    continue  # the database refuses it
                yield self._said

    def _update(self, table: str, place: int) -> None:
        name, kind = self._chance.choice(self._columns[table][1:])
        value = self._value(kind)
        self._said = f"UPDATE {table} SET {name} = {str(value)[:60]}"
        self._sql(
            f"UPDATE {table} SET {name} = %s::{kind} "
            f"WHERE ctid = (SELECT ctid FROM {table} ORDER BY ctid OFFSET %s LIMIT 1)", value, place
        )  # fmt: skip

    def _insert(self, table: str, place: int) -> None:
        columns = self._columns[table]
        changed = dict(self._chance.sample(columns[1:], k=self._chance.randint(1, min(4, len(columns) - 1))))
        values = {name: self._value(kind) for name, kind in changed.items()}
        self._said = f"INSERT {table} {str(values)[:200]}"
        taken = [f"%s::{kind}" if name in values else name for name, kind in columns]
        self._sql(
            f"INSERT INTO {table} ({', '.join(name for name, _ in columns)}) SELECT {', '.join(taken)} FROM {table} "
            f"ORDER BY ctid OFFSET %s LIMIT 1", *(values[name] for name, _ in columns if name in values), place
        )  # fmt: skip

    def _delete(self, table: str, place: int) -> None:
        self._said = f"DELETE {table}"
        self._sql(f"DELETE FROM {table} WHERE ctid = (SELECT ctid FROM {table} ORDER BY ctid OFFSET %s LIMIT 1)", place)

    def _value(self, kind: str) -> Any:
        chance = self._chance
        match kind:
            case "integer":
                return chance.choice((None, *INTS))
            case "bigint":
                return chance.choice((None, *BIGS))
            case "double precision":
                return chance.choice((None, *FLOATS))
            case "boolean":
                return chance.choice((None, True, False))
            case "json":
                return chance.choice((None, *DOCUMENTS))
            case "uuid":
                return str(chance.choice((*self._ids, "00000000-0000-0000-0000-000000000000"))) or None
            case "timestamp with time zone":
                return chance.choice((None, *TIMES))
            case _:
                return chance.choice((None, *WORDS))
