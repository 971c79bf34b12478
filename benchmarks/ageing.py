"""What becomes of the throughput where queues on PostgreSQL break down.

A worker works off what a client keeps starting, for a while, in each of these:

- *fresh*: new tables;
- *pinned*: somebody holds a transaction open throughout, so that nothing that dies can be removed;
- *full*: a million workflows have ended before;
- *retention*: they ended so long ago that they are being removed meanwhile;
- *sleeping*: a hundred thousand sleep.

The rate counts in the last third of the time, when what grows has grown; `--seconds 600` is the long form.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import Popen

from benchmarks.bench import Bench, Connection
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA
from perdure.config import DATABASE_URL
from perdure.store import migrations

Condition = Callable[[Bench, Connection, str], contextlib.AbstractContextManager[None]]

FULL, ASLEEP = 1_000_000, 100_000
_BATCHES = 6
_CONCURRENCY = 1_000
_CHUNK = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Aged:
    """What was seen.

    Attributes:
        rate: Workflows a second, in the last third.
        dead: Dead rows of the queue and when, throughout.
        pages: Pages that a claim touched, on average.
        seen: How many had ended by when, throughout.
    """

    rate: float
    dead: list[tuple[int, float]]
    pages: float
    seen: list[tuple[int, float]]


def measure(bench: Bench) -> list[Figure | Curve]:
    """All of them in turn, and over again."""
    conditions = {"fresh": fresh, "pinned": pinned, "full": _full, "retention": _retention, "sleeping": _sleeping}
    return compare(bench, "one_step", conditions)


def compare(bench: Bench, kind: str, conditions: dict[str, Condition]) -> list[Figure | Curve]:
    """What becomes of workflows of that kind in each of the conditions, and how that compares with the first."""
    seen: dict[str, list[Aged]] = {name: [] for name in conditions}
    for _ in range(bench.repeats):
        for name, condition in conditions.items():
            seen[name].append(_aged(bench, condition, kind))
    first = next(iter(conditions))
    figures: list[Figure | Curve] = []
    for name, all in seen.items():
        figures.append(Figure(name=name, unit="workflows/s", values=[one.rate for one in all]))
        if name != first:
            ratios = [one.rate / other.rate for one, other in zip(all, seen[first], strict=True)]
            figures.append(Figure(name=f"{name} / {first}", unit="times", values=ratios, target=0.8))
        figures.append(Figure(name=f"{name}: a claim", unit="pages", values=[one.pages for one in all], better="less"))
        figures.append(
            Figure(name=f"{name}: the queue", unit="dead rows", values=[one.dead[-1][0] for one in all], better="less")
        )
        figures.append(_over_time(name, all[-1].seen))
        figures.append(_dead_over_time(name, all[-1].dead))
    return figures


def _over_time(name: str, seen: list[tuple[int, float]]) -> Curve:
    """Throughput in each twentieth of the time."""
    began = seen[0][1]
    chosen = [seen[place * (len(seen) - 1) // 20] for place in range(21)]
    pairs = list(itertools.pairwise(chosen))
    rates = [(after[0] - before[0]) / max(0.001, after[1] - before[1]) for before, after in pairs]
    return Curve(
        name=name, x=[after[1] - began for _, after in pairs], y=rates, across="seconds", up="workflows ended a second"
    )


def _dead_over_time(name: str, dead: list[tuple[int, float]]) -> Curve:
    return Curve(
        name=name,
        x=[at - dead[0][1] for _, at in dead],
        y=[count for count, _ in dead],
        across="seconds",
        up="dead rows of the queue",
    )


def _aged(bench: Bench, condition: Condition, kind: str) -> Aged:
    schema = bench.fresh_schema()
    env = {DATABASE_URL: bench.cluster.url, SCHEMA: schema}
    with bench.connect() as connection:
        connection.execute(migrations.script(schema).encode())
        with condition(bench, connection, schema), role("worker", _CONCURRENCY, env=env):
            connection.execute("SELECT pg_stat_statements_reset()")
            with role("feeder", _BATCHES, kind, env=env) as feeder:
                seen, dead = _seen(feeder, bench.seconds, lambda: _dead_rows(connection, schema))
            pages = _pages_of_a_claim(connection, schema)
        connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
    last = [each for each in seen if each[1] > seen[-1][1] - bench.seconds / 3]
    rate = (last[-1][0] - last[0][0]) / (last[-1][1] - last[0][1])
    return Aged(rate=rate, dead=dead, pages=pages, seen=seen)


def _seen(
    feeder: Popen[str], seconds: float, dead_rows: Callable[[], int]
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """How many had ended by when, as the feeder says; and how many rows of the queue were dead."""
    assert feeder.stdout is not None
    seen: list[tuple[int, float]] = []
    dead: list[tuple[int, float]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, at = feeder.stdout.readline().split()
        seen.append((int(ended), float(at)))
        if not dead or time.monotonic() > dead[-1][1] + seconds / 60:
            dead.append((dead_rows(), time.monotonic()))
    dead.append((dead_rows(), time.monotonic()))
    threading.Thread(target=feeder.stdout.read, daemon=True).start()  # it says what it still says to nobody
    return seen, dead


def _dead_rows(connection: Connection, schema: str) -> int:
    ((dead,),) = connection.execute(
        "SELECT n_dead_tup FROM pg_stat_user_tables WHERE schemaname = %s AND relname = 'queue_entries'", [schema]
    ).fetchall()
    return int(dead)


def _pages_of_a_claim(connection: Connection, schema: str) -> float:
    ((pages,),) = connection.execute(
        """
        SELECT sum(shared_blks_hit + shared_blks_read)::float8 / sum(calls)
        FROM pg_stat_statements
        WHERE query LIKE %s AND query LIKE '%%SKIP LOCKED%%' AND query LIKE '%%epoch = epoch + %%'
        """,
        [f'%UPDATE "{schema}".queue_entries%'],
    ).fetchall()
    return float(pages or 0)


# --- the conditions ---------------------------------------------------------------------------------------------------


@contextmanager
def fresh(bench: Bench, connection: Connection, schema: str) -> Generator[None]:
    """New tables."""
    yield


@contextmanager
def pinned(bench: Bench, connection: Connection, schema: str) -> Generator[None]:
    """A transaction is open throughout."""
    with bench.connect() as other, other.transaction():
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT count(*) FROM pg_class")
        yield


@contextmanager
def _full(bench: Bench, connection: Connection, schema: str) -> Generator[None]:
    _end_many(connection, schema, bench.count(FULL), "1 hour")
    yield


@contextmanager
def _retention(bench: Bench, connection: Connection, schema: str) -> Generator[None]:
    _end_many(connection, schema, bench.count(FULL), "1 year")
    yield


@contextmanager
def _sleeping(bench: Bench, connection: Connection, schema: str) -> Generator[None]:
    connection.execute(
        f"""
        WITH born AS MATERIALIZED (SELECT gen_random_uuid() AS id FROM generate_series(1, {bench.count(ASLEEP)})),
        opened AS (
            INSERT INTO {schema}.workflow_rows (shard, id, name, queue, created_at)
            SELECT 1, id, 'nap', 'default', now() FROM born
        ), given AS (
            INSERT INTO {schema}.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
            SELECT 1, id, '$input', 'input', 0, 'success', '{{}}', now() FROM born
        )
        INSERT INTO {schema}.waits
            (shard, workflow_id, waiting_for, wake_at, queue, name, enqueued_at, epoch, created_at)
        SELECT 1, id, 'timer', now() + interval '30 days', 'default', 'nap', now(), 1, now() FROM born
        """.encode()
    )
    yield


def _end_many(connection: Connection, schema: str, count: int, age: str) -> None:
    """So many workflows of one step have ended, that long ago."""
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        connection.execute(
            f"""
            WITH ended AS MATERIALIZED (
                SELECT (lpad(to_hex((extract(epoch FROM now() - interval '{age}') * 1000)::int8), 12, '0')
                        || '7' || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid AS id
                FROM generate_series({first + 1}, {first + size}) AS n
            ), opened AS (
                INSERT INTO {schema}.workflow_rows (shard, id, name, queue, created_at)
                SELECT 1, id, 'one_step', 'default', now() - interval '{age}' FROM ended
            )
            INSERT INTO {schema}.checkpoints
                (shard, workflow_id, key, kind, position, status, payload, started_at, created_at)
            SELECT 1, ended.id, item.key, item.kind, item.position, 'success', to_json(repeat('x', 98)),
                   now() - interval '{age}', now() - interval '{age}'
            FROM ended, (VALUES ('$input', 'input', 0), ('echo', 'step', 1), ('$result', 'result', 2147483647))
                            AS item (key, kind, position)
            """.encode()
        )
