"""What the server does for every hot statement, on tables of every size and with every state of the statistics.

A plan that is good today and quadratic after the next ANALYZE is the largest factor there is, so statements are written
in forms that leave no choice, and this is the proof: each is run as the engine runs it (binary arrays, prepared), with
custom and with generic plans, on tables that are empty, small and large, never and freshly analysed, and with the plans
that were cached while the tables were still empty. What counts is what was touched, not how long it took: rows and
pages are bounded by the size of the batch, whatever the size of the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import Connection, RawCursor

from perdure import embedded
from perdure.embedded import Cluster
from perdure.model.ids import first_id
from perdure.store import arrays, migrations
from perdure.store.arrays import BigInts, Floats, Ints, Texts, Times, Uuids
from perdure.store.statements import SHARD, in_schema, statements

BATCH = 100
MODES = ("force_custom_plan", "force_generic_plan")
LARGE = (
    "workflow_rows",
    "checkpoints",
    "queue_entries",
    "waits",
    "deadlines",
    "message_rows",
    "event_rows",
    "event_waits",
    "outbox",
    "stream_rows",
    "stream_parts",
)

ME = UUID("01900000-0000-7000-8000-aaaaaaaaaaaa")
DEAD = UUID("01900000-0000-7000-8000-dddddddddddd")
NAMES = Texts(f"work-{number}" for number in range(10))
LONG_AGO = datetime(2025, 1, 1, tzinfo=UTC)


# --- the tables -------------------------------------------------------------------------------------------------------

# Workflows 1 to N are in the queue; each STRIDE-th of them is running, by me and by a dead worker in turns, so that
# what one worker holds lies all over the tables. The next N / 10 have ended, a tenth of them in error; the next N / 10
# wait, half of them for a worker that knows them, the others for the year 2100, but for a few that are due.
_FILL = """
CREATE FUNCTION pg_temp.id(n int8) RETURNS uuid IMMUTABLE LANGUAGE sql
    AS $$ SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid $$;
CREATE FUNCTION pg_temp.at(n int8) RETURNS timestamptz IMMUTABLE LANGUAGE sql
    AS $$ SELECT timestamptz '2025-01-01 00:00:00+00' + n * interval '1 second' $$;

INSERT INTO perdure.workflow_rows (shard, id, name, key, queue, parent_id, attributes, created_at)
SELECT 1, pg_temp.id(n), 'work-' || n % 10, CASE WHEN n % 10 = 0 THEN 'key-' || n END, 'default',
       CASE WHEN n % 10 = 1 THEN pg_temp.id(n - 1) END,
       CASE WHEN n % 100 = 0 THEN '{{"customer": 1}}'::json END, pg_temp.at(n)
FROM generate_series(1, {rows} + {rows} / 10 + {rows} / 10) AS n;

INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
SELECT 1, pg_temp.id(n), '$input', 'input', 0, 'success', '{{}}', pg_temp.at(n)
FROM generate_series(1, {rows} + {rows} / 10) AS n;

INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
SELECT 1, pg_temp.id(n), '$result', 'result', 2147483647, CASE WHEN n % 10 = 5 THEN 'error' ELSE 'success' END, '1',
       pg_temp.at(n)
FROM generate_series({rows} + 1, {rows} + {rows} / 10) AS n;

INSERT INTO perdure.queue_entries (shard, workflow_id, queue, name, enqueued_at, worker_id, epoch, started_at)
SELECT 1, pg_temp.id(n), 'default', 'work-' || n % 10, pg_temp.at(n),
       CASE WHEN n % ({stride} * 2) = 0 THEN '{me}'::uuid WHEN n % {stride} = 0 THEN '{dead}'::uuid END,
       CASE WHEN n % {stride} = 0 THEN 1 ELSE 0 END, CASE WHEN n % {stride} = 0 THEN pg_temp.at(n) END
FROM generate_series(1, {rows}) AS n;

INSERT INTO perdure.waits (shard, workflow_id, waiting_for, wake_at, queue, name, hears, awaits_child, enqueued_at,
                           created_at)
SELECT 1, pg_temp.id(n), CASE WHEN n % 2 = 0 THEN 'start' ELSE 'worker' END,
       CASE WHEN n % 200 = 0 THEN pg_temp.at(n) WHEN n % 2 = 0 THEN timestamptz '2100-01-01' END,
       'default', 'work-' || n % 10, n % 4 = 0, n % 4 = 0, pg_temp.at(n), pg_temp.at(n)
FROM generate_series({rows} + {rows} / 10 + 1, {rows} + {rows} / 10 + {rows} / 10) AS n;

INSERT INTO perdure.outbox (shard, id, target_id, created_at)
SELECT 1, gen_random_uuid(), pg_temp.id(n), pg_temp.at(n)
FROM generate_series({rows}, {rows} + {rows} / 10 + {rows} / 10) AS n;

INSERT INTO perdure.deadlines (shard, workflow_id, due_at)
SELECT 1, pg_temp.id(n), CASE WHEN n % 1000 = 0 THEN pg_temp.at(n) ELSE timestamptz '2100-01-01' END
FROM generate_series(1, {rows}) AS n;

INSERT INTO perdure.message_rows (shard, workflow_id, place, id, topic, payload, created_at)
SELECT 1, pg_temp.id(n), 65536, pg_temp.id(n), 'topic', '1', pg_temp.at(n)
FROM generate_series(1, {rows} + {rows} / 10) AS n;

INSERT INTO perdure.event_rows (shard, workflow_id, name, number, id, payload, created_at)
SELECT 1, pg_temp.id(n / 2), 'event', n % 2, pg_temp.id(n), '1', pg_temp.at(n)
FROM generate_series(2, {rows}) AS n;

INSERT INTO perdure.stream_rows (shard, workflow_id, name, number, part, payload, created_at)
SELECT 1, pg_temp.id(n / 4 * 10), 'stream', n % 4, n % 4 / 2, '1', pg_temp.at(n)
FROM generate_series(4, {rows} / 4) AS n;

INSERT INTO perdure.stream_parts (shard, workflow_id, name, part, key, epoch, attempt, first)
SELECT 1, pg_temp.id(n / 2 * 10), 'stream', n % 2, 'work', 1, 1 + n % 2, n % 2 * 2
FROM generate_series(2, {rows} / 4) AS n;

INSERT INTO perdure.event_waits (shard, workflow_id, name, waiter_id, created_at)
SELECT 1, pg_temp.id(n), 'event', pg_temp.id(n + 1), pg_temp.at(n)
FROM generate_series(1, {rows}) AS n;

INSERT INTO perdure.retention_rows (shard, name, keep_seconds)
SELECT 1, 'work-' || n, CASE WHEN n % 2 = 0 THEN 86400 END FROM generate_series(1, least({rows}, 10)) AS n;

INSERT INTO perdure.queue_rows (shard, name, created_at)
SELECT 1, 'default', pg_temp.at(n) FROM generate_series(1, least({rows}, 1)) AS n;

INSERT INTO perdure.worker_rows (shard, id, status, app, version, host, pid, names, concurrency, lease_seconds,
                                 started_at, heartbeat_at, expires_at, held_since)
SELECT 1, CASE n WHEN 1 THEN '{me}'::uuid WHEN 2 THEN '{dead}'::uuid ELSE gen_random_uuid() END,
       CASE n WHEN 2 THEN 'dead' ELSE 'live' END, 'tests', '1', 'here', n, '["work-1", "work-2"]', 100, 10,
       pg_temp.at(n), pg_temp.at(n), timestamptz '2100-01-01', pg_temp.at(n)
FROM generate_series(1, least({rows}, 20)) AS n;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What stands in the tables, for the parameters."""

    rows: int

    @property
    def stride(self) -> int:
        """Each so many workflows, one is running."""
        return 100 if self.are_large else 5

    @property
    def are_large(self) -> bool:
        return self.rows > 10_000

    def id(self, number: int) -> UUID:
        return UUID(f"01900000-0000-7000-8000-{number:012x}")

    def fill(self) -> str:
        return _FILL.format(rows=self.rows, stride=self.stride, me=ME, dead=DEAD)

    @property
    def _step(self) -> int:
        """From one of mine to the next, so that a batch of them lies all over the tables."""
        return self.stride * 2 * max(1, self.rows // (self.stride * 2) // BATCH)

    def mine(self) -> Uuids:
        """Running, held by me, with epoch 1."""
        return Uuids(self.id(number * self._step) for number in range(1, BATCH + 1))

    def ended(self) -> Uuids:
        step = max(1, self.rows // 10 // BATCH)
        return Uuids(self.id(self.rows + number * step) for number in range(1, BATCH + 1))

    def new(self) -> Uuids:
        return Uuids(self.id(10**9 + number) for number in range(BATCH))


# --- the statements ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A statement with parameters, and what it may touch.

    Attributes:
        statement: The name of the statement.
        params: Its parameters, for tables of some size.
        uses: The indexes that it may read on large tables.
        scans: The large tables that it may read from end to end.
        pages: How many pages it may touch for each of the batch.
        rows: How many rows may pass through all nodes of its plan for each of the batch.
        batch: For how many it works.
        label: What distinguishes it from other cases of that statement.
    """

    statement: str
    params: Callable[[Tables], Sequence[Any]]
    uses: frozenset[str] = frozenset()
    scans: frozenset[str] = frozenset()
    pages: int = 12
    rows: int = 12
    batch: int = BATCH
    label: str = ""

    def __str__(self) -> str:
        return f"{self.statement} {self.label}".strip()


def _case(
    statement: str, params: Callable[[Tables], Sequence[Any]], uses: str = "", scans: Iterable[str] = (), **options: Any
) -> Case:
    return Case(statement=statement, params=params, uses=frozenset(uses.split()), scans=frozenset(scans), **options)


def _checkpoints(ids: Uuids) -> tuple[Any, ...]:
    """The columns $6 to $16 of `record`: one step for each workflow."""
    count = len(ids)
    return (
        ids,
        BigInts([1] * count),
        Texts(["work"] * count),
        Texts(["step"] * count),
        Ints([1] * count),
        Texts(["success"] * count),
        Texts(["1"] * count),
        BigInts([7] * count),
        Ints([1] * count),
        Floats([0.1] * count),
        Floats([None] * count),
    )


def _record(tables: Tables) -> Sequence[Any]:
    ids = tables.mine()
    return (SHARD, ME, ids, BATCH, "v1", *_checkpoints(ids))


def _complete(tables: Tables) -> Sequence[Any]:
    ids = tables.mine()
    going, ending = Uuids(ids[: BATCH // 2]), Uuids(ids[BATCH // 2 :])
    count = len(ending)
    return (
        SHARD, ME, going, len(going), "v1", *_checkpoints(ids), ending, count, Texts(["success"] * count),
        Texts(["2"] * count), BigInts([1] * count), Ints([0] * count), Times([LONG_AGO] * count),
    )  # fmt: skip


def _settle(tables: Tables) -> Sequence[Any]:
    """A third goes on, with timers and children; a third ends; a third suspends, half of it sets something aside."""
    ids = tables.mine()
    third = BATCH // 3
    going, ending, leaving = Uuids(ids[:third]), Uuids(ids[third : 2 * third]), Uuids(ids[2 * third :])
    count, left = len(ending), len(leaving)
    return (
        SHARD, ME, going, len(going), "v1", *_checkpoints(ids), ending, count, Texts(["success"] * count),
        Texts(["2"] * count), BigInts([1] * count), Ints([0] * count), Times([LONG_AGO] * count), leaving, left,
        BigInts([0] * left), Texts(["timer"] * left), Floats([60.0] * left), Uuids(leaving[: left // 2]),
        Texts(["$input"] * (left // 2)), going, BigInts([1] * len(going)), Texts(["poll#t"] * len(going)),
        Ints([1] * len(going)), Floats([60.0] * len(going)), Ints(n % 2 for n in range(left)),
        Ints(n % 2 for n in range(left)),
        *_children(tables, going), Uuids(ending), *_entries(going),
    )  # fmt: skip


def _children(tables: Tables, parents: Uuids) -> tuple[Any, ...]:
    count = len(parents)
    return (
        Uuids(tables.new()[:count]), Texts(["work-1"] * count), Texts(["default"] * count), Ints([0] * count),
        Texts([None] * count), Texts([None] * count), Texts(["{}"] * count), Texts(["v1"] * count), parents,
        Ints(n % 2 for n in range(count)), Floats(60.0 if n % 2 else None for n in range(count)),
        Times([None] * count), Floats(60.0 if n % 3 else None for n in range(count)), Times([None] * count),
    )  # fmt: skip


def _entries(ids: Uuids) -> tuple[Any, ...]:
    count = len(ids)
    return (
        ids, Texts(["tokens"] * count), BigInts([7] * count), Ints([1] * count), Texts(["1"] * count),
        ids, BigInts([1] * count), Texts(["tokens"] * count), Ints([1] * count), Texts(["work"] * count),
        Ints([1] * count), BigInts([7] * count),
    )  # fmt: skip


def _waiting(tables: Tables) -> Uuids:
    step = max(1, tables.rows // 10 // BATCH)
    return Uuids(tables.id(tables.rows + tables.rows // 10 + number * step) for number in range(1, BATCH + 1))


def _imported(tables: Tables) -> Sequence[Any]:
    count = BATCH
    return (
        SHARD, tables.id(10**9), "work-1", None, "default", 0, None, "v1", None, LONG_AGO, False, 1,
        Texts(f"step-{n}" for n in range(count)), Texts(["step"] * count), Ints([1] * count),
        Texts(["success"] * count), Texts(["1"] * count), BigInts([1] * count), Ints([1] * count),
        Ints([None] * count), Texts(["v1"] * count), Times([None] * count), Times([None] * count),
        Times([LONG_AGO] * count), BigInts([1] * count), BigInts(range(count)),
        Uuids(UUID(int=n) for n in range(count)), Texts(["topic"] * count), Texts(["1"] * count),
        Uuids([None] * count), Times([LONG_AGO] * count),
        Texts(["event"] * count), BigInts(range(count)), Uuids(UUID(int=n) for n in range(count)),
        Texts(["1"] * count), Times([LONG_AGO] * count),
        Texts(["stream"] * count), BigInts(range(count)), Ints(range(count)), Texts(["1"] * count),
        Times([LONG_AGO] * count),
        Texts(["stream"] * count), Ints(range(count)), Texts([""] * count), BigInts([1] * count), Ints([1] * count),
        BigInts(range(count)), Ints([0] * count),
    )  # fmt: skip


def _start(tables: Tables) -> tuple[Any, ...]:
    count = BATCH
    return (
        SHARD, tables.new(), Texts(["work-1"] * count), Texts(["default"] * count), Ints([0] * count),
        Texts([None] * count), Texts([None] * count), Texts(["{}"] * count), Texts(["v1"] * count),
    )  # fmt: skip


def _start_keyed(tables: Tables) -> Sequence[Any]:
    """A third under new keys, a third under keys that are taken, a third delayed."""
    keys = [f"new-{n}" if n % 3 == 0 else f"key-{n * 10}" if n % 3 == 1 else None for n in range(BATCH)]
    return (
        *_start(tables), Texts(keys), Floats(60.0 if key is None else None for key in keys), Times([None] * BATCH),
        "1s", Floats(60.0 if n % 2 else None for n in range(BATCH)), Uuids([None] * BATCH), Ints([0] * BATCH),
    )  # fmt: skip


def _page(status: str | None, before: UUID | None = None, **given: Any) -> tuple[Any, ...]:
    filters = ("name", "queue", "key_prefix", "since", "until", "attributes")
    return (SHARD, before, *(given.get(column) for column in filters), status, BATCH)


_ENTRY, _PENDING, _WAIT = "queue_entries_pkey", "queue_entries_pending", "waits_pkey"
_HELD = "queue_entries_running"
_KIN = "workflow_rows_parent"
_ROW, _KEY, _CHECKPOINT = "workflow_rows_pkey", "workflow_rows_key", "checkpoints_pkey"
_FAILED = "checkpoints_failed_results"
_ASKED = "checkpoints_requests"
_DEADLINE = "deadlines_pkey"
_MESSAGE = "message_rows_pkey message_rows_id"
_STREAM, _PARTS = "stream_rows_pkey", "stream_parts_pkey"
_EVENT, _EVENT_WAIT = "event_rows_pkey event_rows_id", "event_waits_pkey"


def _cancel(ids: Uuids) -> Sequence[Any]:
    return (SHARD, ids, "$cancel", "{}", "$cancel#2", "cancelled", "{}")


def _sent(ids: Uuids) -> Sequence[Any]:
    count = len(ids)
    new = Uuids(UUID(int=number) for number in range(count))
    return (
        SHARD, ids, new, ids, BigInts([0] * count), Texts(["topic"] * count), Texts(["1"] * count),
        Uuids([None] * count), True,
    )  # fmt: skip


CASES = (
    # what the writer does
    _case("record", _record, _ENTRY, pages=20),
    _case("complete", _complete, _ENTRY, pages=25, rows=16),
    _case("settle", _settle, f"{_ENTRY} {_CHECKPOINT}", pages=80, rows=40),
    # parents and children
    _case(
        "wake_parents",
        lambda t: (SHARD, BATCH, first_id(None)),
        f"{_ENTRY} {_WAIT} {_CHECKPOINT} {_ROW} outbox_pkey",
        scans={"outbox"},
        pages=80,
        rows=40,
    ),
    _case("child_results", lambda t: (SHARD, t.ended()), f"{_ROW} {_CHECKPOINT}", pages=20),
    _case("descendants", lambda t: (SHARD, t.mine()), f"{_KIN} {_CHECKPOINT}", pages=30, rows=20),
    _case("ancestors", lambda t: (SHARD, t.mine()[0]), _ROW, batch=1, pages=40, rows=40),
    _case("failed_children", lambda t: (SHARD, t.ended(), "why"), f"{_CHECKPOINT} {_KIN} {_FAILED}", pages=40, rows=20),
    _case("recorded", lambda t: (SHARD, ME, t.mine(), Texts(["$input"] * BATCH), BigInts([1] * BATCH)), _CHECKPOINT),
    _case("fence", lambda t: (SHARD, ME, t.mine()[0], 1), _ENTRY, batch=1),
    _case("record_in_transaction", lambda t: (SHARD, ME, t.mine()[0], 1, "v1", "work", 1, "1", 7, 1, 0.1), batch=1),
    _case("recorded_step", lambda t: (SHARD, t.mine()[0], "$input"), _CHECKPOINT, batch=1),
    # what the claimer and the timers do
    _case(
        "claim",
        lambda t: (SHARD, ME, "default", NAMES, BATCH, None, "1"),
        f"{_PENDING} {_ENTRY} {_CHECKPOINT}",
        pages=40,
    ),
    _case(
        "claim",
        lambda t: (SHARD, ME, "default", Texts(["work-3"]), BATCH, Texts(["1", "2"]), "1"),
        f"{_PENDING} {_ENTRY} {_CHECKPOINT}",
        pages=40,
        rows=40,
        label="of one name in ten",
    ),
    _case(
        "claim_further",
        lambda t: (
            *(SHARD, ME, "default", NAMES, BATCH, None, "1", Ints([7, 0])),
            *(Times([LONG_AGO, LONG_AGO + timedelta(seconds=t.rows // 2)]), Uuids([t.id(1), t.id(t.rows // 2)])),
        ),
        f"{_PENDING} {_ENTRY} {_CHECKPOINT}",
        pages=40,
        rows=20,
    ),
    _case("pending_queues", lambda t: (SHARD,), _PENDING, batch=1, pages=20),
    _case("register_queue", lambda t: (SHARD, "default"), batch=1),
    _case("load", lambda t: (SHARD, t.ended()), _CHECKPOINT),
    _case("held", lambda t: (SHARD, ME), _HELD, batch=5000, pages=3, rows=3),
    _case("held_among", lambda t: (SHARD, ME, t.mine()), _ENTRY),
    _case("release", lambda t: (SHARD, ME, t.mine(), BigInts([1] * BATCH), 0), _ENTRY, pages=30),
    _case("wake_due", lambda t: (SHARD, BATCH, None), f"waits_due {_WAIT}", pages=40, rows=20),
    _case("wake_due", lambda t: (SHARD, BATCH, LONG_AGO), f"waits_due {_WAIT}", pages=40, rows=20, label="since then"),
    _case(
        "next_due", lambda t: (SHARD, None, first_id(None)), "waits_due deadlines_due outbox_pkey", batch=1, pages=20
    ),
    _case("due_deadlines", lambda t: (SHARD, BATCH, None), "deadlines_due"),
    _case("forget_deadlines", lambda t: (SHARD, t.mine()), _DEADLINE),
    _case("park_unknown", lambda t: (SHARD, "default", BATCH), f"{_PENDING} {_ENTRY}", pages=40, rows=40),
    # Where half of the table is parked, reading it until the batch is full is as good as the index.
    _case("unpark", lambda t: (SHARD, NAMES, BATCH), f"waits_for_worker {_WAIT}", pages=40, scans={"waits"}),
    _case("unknown_names", lambda t: (SHARD, "default", NAMES, BATCH), _PENDING),
    # leases and recovery; some of these read all of the twenty workers
    _case(
        "register_worker",
        lambda t: (SHARD, t.id(10**9), "tests", "1", "here", 1, None, "[]", 100, 10.0, False),
        batch=1,
    ),
    _case(
        "heartbeat",
        lambda t: (SHARD, ME, None),
        f"{_HELD} {_ENTRY}",
        batch=5000,
        pages=3,
        rows=3,
    ),
    _case("heartbeat", lambda t: (SHARD, ME, t.mine()), f"{_HELD} {_ENTRY}", label="among some"),
    _case("end_worker", lambda t: (SHARD, ME, "stopped"), batch=20),
    _case("bury", lambda t: (SHARD, ME), batch=20),
    _case("ended_workers", lambda t: (SHARD, 60.0), batch=20),
    _case("fallen", lambda t: (SHARD,), _HELD, batch=20, pages=30),
    _case("recover", lambda t: (SHARD, DEAD, BATCH), f"{_HELD} {_ENTRY} {_CHECKPOINT}", pages=40, rows=80),
    _case(
        "running_steps",
        lambda t: (
            SHARD,
            ME,
            t.mine(),
            Texts(["work"] * BATCH),
            BigInts([1] * BATCH),
            Ints([1] * BATCH),
            Floats([1.0] * BATCH),
        ),
    ),
    _case("forget_workers", lambda t: (SHARD, 10.0), batch=20),
    # what clients do
    _case("start", lambda t: (*_start(t), None), pages=40),
    _case("start", lambda t: (*_start(t), ME), pages=40, label="and run at once"),
    _case("start_keyed", _start_keyed, pages=40, rows=40),
    _case("holders", lambda t: (SHARD, Texts(["work-0"] * BATCH), Texts(f"key-{n * 10}" for n in range(BATCH))), _KEY),
    _case("release_key", lambda t: (SHARD, "work-0", "key-10"), f"{_KEY} {_CHECKPOINT}", batch=1),
    _case("started", lambda t: (SHARD, t.mine()), _ROW),
    _case("results", lambda t: (SHARD, t.ended()), _CHECKPOINT),
    _case("describe", lambda t: (t.ended(),), f"{_ROW} {_CHECKPOINT} {_FAILED} {_ENTRY} {_WAIT}", pages=40, rows=25),
    _case(
        "describe",
        lambda t: (t.mine(),),
        f"{_ROW} {_CHECKPOINT} {_FAILED} {_ENTRY} {_WAIT}",
        pages=40,
        rows=25,
        label="of mine",
    ),
    # what operators do
    _case("cancel", lambda t: _cancel(t.mine()), f"{_ENTRY} {_WAIT}", pages=40, rows=30),
    _case("cancel", lambda t: _cancel(_waiting(t)), f"{_ENTRY} {_WAIT}", pages=40, rows=30, label="of the waiting"),
    _case("terminate", lambda t: (SHARD, t.mine(), "{}"), f"{_ENTRY} {_WAIT}", pages=40, rows=30),
    _case(
        "resume_ended",
        lambda t: (SHARD, t.ended(), "r"),
        f"{_CHECKPOINT} {_ASKED} {_ROW} {_DEADLINE} {_MESSAGE}",
        pages=60,
        rows=40,
    ),
    _case("outcomes", lambda t: (SHARD, t.ended()[0]), _CHECKPOINT, batch=1),
    _case(
        "fork",
        lambda t: (SHARD, t.ended()[0], t.id(10**9), None, Texts(["$input"]), Texts(["1"]), "v1"),
        f"{_CHECKPOINT} {_ROW} {_FAILED}",
        batch=1,
        pages=120,
        rows=60,
    ),
    _case(
        "rewind",
        lambda t: (SHARD, t.ended(), "r", None, Texts(["work"]), Texts(["1"])),
        f"{_CHECKPOINT} {_ASKED} {_ROW} {_DEADLINE} {_MESSAGE}",
        pages=60,
        rows=40,
    ),
    _case(
        "resume_parked",
        lambda t: (SHARD, _waiting(t), "r"),
        f"{_CHECKPOINT} {_ASKED} {_ENTRY} {_WAIT}",
        pages=40,
        rows=20,
    ),
    _case("resume_imported", lambda t: (SHARD, _waiting(t)), _WAIT, pages=40, rows=20),
    _case("resumed", lambda t: (SHARD, t.ended(), "r"), _CHECKPOINT),
    _case("states", lambda t: (SHARD, t.ended()), f"{_ROW} {_ENTRY} {_WAIT} {_CHECKPOINT}", pages=40),
    _case(
        "requests",
        lambda t: (SHARD, ME, t.mine(), BigInts([0] * BATCH)),
        f"{_ENTRY} {_CHECKPOINT} {_ASKED} {_MESSAGE}",
        pages=16,
        rows=16,
    ),
    _case("send", lambda t: _sent(t.mine()), f"{_ENTRY} {_WAIT} {_MESSAGE}", pages=40, rows=30),
    _case("send", lambda t: _sent(_waiting(t)), f"{_ENTRY} {_WAIT} {_MESSAGE}", pages=60, rows=40, label="to waiting"),
    _case(
        "refuse_message",
        lambda t: (SHARD, t.mine()[0], t.mine()[0], "$answer", t.id(10**9), "{}"),
        f"{_MESSAGE} {_EVENT}",
        batch=1,
        pages=80,
    ),
    _case("sent", lambda t: (SHARD, t.mine()[0], t.mine()[0]), _MESSAGE, batch=1),
    _case("messages", lambda t: (SHARD, t.mine()), _MESSAGE),
    _case("set_event", lambda t: (SHARD, t.mine()[0], "event", t.id(10**9), "1"), _EVENT, batch=1, pages=40),
    _case("event_set", lambda t: (SHARD, t.mine()[0], t.id(10**9)), _EVENT, batch=1),
    _case("event", lambda t: (SHARD, t.mine()[0], "event"), _EVENT, batch=1),
    _case("set_attributes", lambda t: (SHARD, t.mine()[0], '{"a": 1}'), _ROW, batch=1, pages=40),
    _case(
        "begin_anew",
        lambda t: (SHARD, ME, t.mine()[0], 1, "{}", "v1", False),
        f"{_ENTRY} {_CHECKPOINT} {_MESSAGE} {_PARTS}",
        batch=1,
        pages=120,
        rows=40,
    ),
    _case("stream", lambda t: (SHARD, t.mine()[0], "stream", 0, 100), _STREAM, batch=1, pages=20),
    _case("stream_parts", lambda t: (SHARD, t.mine()[0], "stream", 0), f"{_PARTS} {_CHECKPOINT}", batch=1, pages=30),
    _case("stream_end", lambda t: (SHARD, t.mine()[0], "stream"), f"{_STREAM} {_PARTS}", batch=1, pages=20),
    _case("await_event", lambda t: (SHARD, t.mine()[0], "event", t.id(10**9)), _EVENT_WAIT, batch=1, pages=40),
    _case("event_waiters", lambda t: (SHARD, t.mine()[0], "event"), _EVENT_WAIT, batch=1),
    _case("forget_event_waiters", lambda t: (SHARD, t.mine()[0], "event", t.mine()), _EVENT_WAIT, pages=20),
    _case(
        "delete_ended",
        lambda t: (SHARD, t.ended()),
        f"{_CHECKPOINT} {_ROW} {_DEADLINE} {_MESSAGE} {_EVENT} {_EVENT_WAIT} {_STREAM} {_PARTS}",
        pages=60,
        rows=36,
    ),
    _case(
        "expired", lambda t: (SHARD, t.id(t.rows), BATCH, 60.0, None, None), f"{_ROW} {_CHECKPOINT}", pages=20, rows=40
    ),
    _case("keep", lambda t: (SHARD, NAMES, Floats([1.0] * len(NAMES)))),
    _case("take_job", lambda t: (SHARD, "retention", 60.0), batch=1),
    _case("put_job", lambda t: (SHARD, "retention", None, 60.0), batch=1),
    _case("export_row", lambda t: (SHARD, t.ended()[0]), _ROW, batch=1),
    _case("export_checkpoints", lambda t: (SHARD, t.ended()[0]), _CHECKPOINT, batch=1),
    _case("export_messages", lambda t: (SHARD, t.mine()[0]), _MESSAGE, batch=1),
    _case("export_events", lambda t: (SHARD, t.mine()[0]), _EVENT, batch=1),
    _case("export_entries", lambda t: (SHARD, t.mine()[0]), _STREAM, batch=1, pages=20, rows=30),
    _case("export_parts", lambda t: (SHARD, t.mine()[0]), _PARTS, batch=1),
    _case("import", _imported, pages=50, rows=20),
    _case("steps", lambda t: (t.ended()[0],), f"{_CHECKPOINT} {_ASKED}", batch=1, pages=40, rows=30),
    _case("page_all", lambda t: _page(None), _ROW, rows=30),
    _case("page_all", lambda t: _page(None, t.id(t.rows // 2)), _ROW, rows=30, label="in the middle"),
    _case(
        "page_all", lambda t: _page(None, t.id(t.rows // 2), name="work-1"), _ROW, pages=40, rows=50, label="of a name"
    ),
    _case(
        "page_children",
        lambda t: (*_page(None), t.mine()[0]),
        f"{_KIN} {_ROW} {_ENTRY} {_WAIT} {_CHECKPOINT}",
        rows=30,
    ),
    _case("page_failed", lambda t: _page("error"), f"{_FAILED} {_ROW}", rows=30),
    _case(
        "page_failed",
        lambda t: _page("error", t.id(t.rows + t.rows // 20)),
        f"{_FAILED} {_ROW}",
        rows=30,
        label="in the middle",
    ),
    _case("page_active", lambda t: _page("pending"), f"{_ENTRY} {_ROW}", rows=30, label="of the pending"),
    _case(
        "page_active",
        lambda t: _page("pending", t.id(t.rows // 2)),
        f"{_ENTRY} {_ROW}",
        rows=30,
        label="of the pending, in the middle",
    ),
    _case("page_active", lambda t: _page("running"), f"{_HELD} {_ROW}", batch=10_000, label="of the running"),
    _case("page_active", lambda t: _page("waiting"), f"{_WAIT} {_ROW}", rows=30, label="of the waiting"),
)

# What has no case, and why.
UNPLANNED = {
    "probe": "reads no table",
    "clock": "reads no table",
    "notify": "reads no table",
    "dead_rows": "reads no table",
    "installation": "reads a table of one row",
}


MORE_BEFORE_17 = 1.4
"""How many more pages its indexes may take."""


# --- plans ------------------------------------------------------------------------------------------------------------


class Plan:
    """A plan as it was executed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.root: dict[str, Any] = json.loads(text)["Plan"]
        self.nodes = list(_nodes(self.root))

    @property
    def pages(self) -> int:
        """How often a page was touched. A CTE that writes may run after the node that it hangs on."""
        return sum(max(0, _blocks(node) - sum(map(_blocks, node.get("Plans", ())))) for node in self.nodes)

    @property
    def rows(self) -> float:
        """How many rows passed through its nodes, or were looked at and thrown away."""
        return sum(
            node["Actual Loops"] * sum(node[kind] for kind in node if kind == "Actual Rows" or "Rows Removed" in kind)
            for node in self.nodes
        )

    @property
    def indexes(self) -> frozenset[str]:
        """The indexes of large tables that were read."""
        return frozenset(
            node["Index Name"]
            for node in self.nodes
            if "Index Name" in node and node["Actual Loops"] and node["Index Name"].startswith(LARGE)
        )

    @property
    def scanned(self) -> frozenset[str]:
        """The large tables that are read from end to end, if it comes to that."""
        return frozenset(
            node["Relation Name"]
            for node in self.nodes
            if node["Node Type"] == "Seq Scan" and node["Relation Name"].startswith(LARGE)
        )

    def faults(self, case: Case, tables: Tables, server_version: int) -> Iterator[str]:
        """What is wrong with it."""
        # On small tables a scan is right, as often as there are nodes, but not once for each of the batch.
        rows = case.rows * case.batch + (0 if tables.are_large else 20 * max(tables.rows, 20))
        pages = case.pages * case.batch + (0 if tables.are_large else 200)
        if server_version < 170_000:
            pages = int(pages * MORE_BEFORE_17)
        if self.rows > rows:
            yield f"{self.rows:.0f} rows pass through it, {rows} would be much"
        if self.pages > pages:
            yield f"it touches {self.pages} pages, {pages} would be much"
        if tables.are_large:
            if self.scanned - case.scans:
                yield f"it scans {', '.join(self.scanned - case.scans)}"
            if self.indexes - case.uses:
                yield f"it reads {', '.join(self.indexes - case.uses)}"


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _blocks(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


class Explainer:
    """Runs statements as the engine does, on one connection, and shows with what plan the server did it."""

    def __init__(self, url: str, schema: str) -> None:
        self._schema = schema
        self._statements = statements(schema)
        self._plans: list[str] = []
        self.connection: Connection[Any] = psycopg.connect(url, autocommit=True, cursor_factory=RawCursor)
        self.connection.prepare_threshold = 0
        self.connection.prepared_max = None
        arrays.register(self.connection.adapters)
        self.connection.add_notice_handler(lambda notice: self._plans.append(notice.message_primary or ""))
        for setting in (
            "LOAD 'auto_explain'",
            "SET auto_explain.log_min_duration = 0",
            "SET auto_explain.log_level = notice",
            "SET auto_explain.log_format = json",
            "SET auto_explain.log_analyze = on",
            "SET auto_explain.log_buffers = on",
            "SET auto_explain.log_timing = off",
            *(
                ["SET auto_explain.log_parameter_max_length = 0"]
                if self.connection.info.server_version >= 160_000
                else []
            ),
            "SET search_path = ''",
        ):
            self.connection.execute(setting)

    def in_schema(self, text: str) -> bytes:
        return in_schema(text, self._schema).encode()

    def run(self, text: str) -> None:
        """Run SQL without parameters."""
        psycopg.ClientCursor(self.connection).execute(self.in_schema(text))

    def of(self, case: Case, tables: Tables, mode: str) -> Plan:
        return self.plan(self._statements[case.statement].text, case.params(tables), mode)

    def plan(self, text: bytes, params: Sequence[Any], mode: str) -> Plan:
        """Execute it, and undo what it did."""
        with self.connection.transaction(force_rollback=True):
            self.connection.execute(f"SET LOCAL plan_cache_mode = {mode}")
            self._plans.clear()
            self.connection.cursor(binary=True).execute(text, params)
            self.connection.execute("SHOW plan_cache_mode")  # the plan is shown when the next statement begins
            (found,) = (text for text in self._plans if text.startswith("duration"))
        return Plan(found[found.index("{") :])

    def faults(self, state: str, tables: Tables, modes: Sequence[str] = MODES) -> list[str]:
        """What is wrong with the plans of all statements."""
        version = self.connection.info.server_version
        return [
            f"{state}, {mode}: {case}: {fault}"
            for case in CASES
            for mode in modes
            for fault in self.of(case, tables, mode).faults(case, tables, version)
        ]


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    """A server of its own: nothing is vacuumed or analysed behind our back, and nothing of it must last."""
    settings = {
        "autovacuum": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_wal_size": "16GB",
        "shared_buffers": "512MB",
    }
    with embedded.temporary(settings) as cluster:
        yield cluster


@pytest.fixture
def explain(server: Cluster, schema: str) -> Iterator[Callable[[], Explainer]]:
    """New connections for a schema of the test, which is migrated and empty."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(migrations.script(schema))
    opened: list[Explainer] = []

    def connect() -> Explainer:
        opened.append(Explainer(server.url, schema))
        return opened[-1]

    yield connect
    for explainer in opened:
        explainer.connection.close()


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rows", [0, 1_000, 100_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_no_statement_costs_more_than_its_batch_whatever_the_size_of_the_tables_and_their_statistics(
    rows: int, explain: Callable[[], Explainer]
) -> None:
    tables = Tables(rows=rows)
    old = explain()
    for table in LARGE:
        old.run(f"ALTER TABLE perdure.{table} SET UNLOGGED")
    old.faults("empty", tables)
    old.run(tables.fill())

    faults = old.faults("cached while empty", tables, ["force_generic_plan"])
    faults += explain().faults("never analysed", tables)
    old.run("ANALYZE")
    faults += explain().faults("analysed", tables)

    assert not faults, "\n".join(faults)


def test_a_queue_that_was_drained_and_vacuumed_keeps_its_plans(explain: Callable[[], Explainer]) -> None:
    tables = Tables(rows=3_000)
    explainer = explain()
    explainer.run(tables.fill())
    explainer.run("DELETE FROM perdure.queue_entries")
    explainer.run("VACUUM (ANALYZE) perdure.queue_entries")

    for case in CASES:
        scanned = explainer.of(case, tables, "force_generic_plan").scanned
        assert "queue_entries" not in scanned, f"{case} scans it"


def test_every_statement_has_a_case_or_a_reason_to_have_none() -> None:
    assert {case.statement for case in CASES} | set(UNPLANNED) == {statement.name for statement in statements()}
    assert not {case.statement for case in CASES} & set(UNPLANNED)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(
            "SELECT name FROM perdure.workflow_rows WHERE shard + 0 = $1 AND cardinality($2::uuid[]) > 0",
            "it scans workflow_rows",
            id="a scan",
        ),
        pytest.param(
            "SELECT key FROM perdure.workflow_rows WHERE shard = $1 AND name = 'work-1' AND key = 'key-1'"
            " AND cardinality($2::uuid[]) > 0",
            "it reads workflow_rows_key",
            id="another index",
        ),
        pytest.param(
            "SELECT (SELECT count(*) FROM unnest($2::uuid[]) AS other (id) WHERE other.id < item.id AND $1::int4 = 1)"
            " FROM unnest($2::uuid[]) AS item (id)",
            "rows pass through it",
            id="a quadratic list",
        ),
        pytest.param(
            "SELECT count(*) FROM perdure.workflow_rows WHERE shard = $1 AND cardinality($2::uuid[]) > 0",
            "pages",
            id="too many pages",
        ),
    ],
)
def test_a_bad_plan_is_found(text: str, fault: str, explain: Callable[[], Explainer]) -> None:
    tables = Tables(rows=20_000)
    explainer = explain()
    explainer.run(tables.fill())
    case = _case("bad", lambda t: (SHARD, t.mine()), "workflow_rows_pkey", pages=1)

    plan = explainer.plan(explainer.in_schema(text), case.params(tables), "force_custom_plan")

    assert any(fault in found for found in plan.faults(case, tables, 180_000)), plan.text
