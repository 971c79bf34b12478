"""Workflows that sleep: what they add to a worker's memory, and how late they wake, with many asleep.

They are started, run to their sleep and leave memory, like any other. How late one wakes is read from the database:
when its next step began, against when its timer was due, both by the database's clock.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench, Connection
from benchmarks.figures import Figure
from benchmarks.processes import resident_mib, role
from benchmarks.program import SCHEMA, nap
from perdure import Client
from perdure.config import DATABASE_URL

FEW, MANY = 100_000, 1_000_000
_WAKING = 200
_NAP_SECONDS = 3.0
_LONG = 30 * 86_400.0


def measure(bench: Bench) -> list[Figure]:
    """Let more and more of them sleep, on one worker; once, because it takes its time."""
    added: list[float] = []
    lateness: list[float] = []
    few, many = bench.count(FEW), bench.count(MANY)
    schema = bench.fresh_schema()
    with (
        role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}) as worker,
        bench.connect() as connection,
    ):
        _sleep(bench, connection, schema, few // 10)  # the worker is warm
        before = resident_mib(worker.pid)
        _sleep(bench, connection, schema, few)
        added.append(resident_mib(worker.pid) - before)
        for _ in range(bench.repeats):
            lateness += _lateness(bench, connection, schema)
        _sleep(bench, connection, schema, many)
        memory = resident_mib(worker.pid)
        late_among_many = _lateness(bench, connection, schema)
    return [
        Figure(name=f"memory that {few:,} add", unit="MiB", values=added, target=10, better="less"),
        Figure(name=f"late, with {few:,} asleep, p50", unit="ms", values=[_part(lateness, 0.5)], better="less"),
        Figure(name=f"late, with {few:,} asleep, most", unit="ms", values=[max(lateness)], target=200, better="less"),
        Figure(name=f"memory with {many:,} asleep (RSS)", unit="MiB", values=[memory], target=200, better="less"),
        Figure(name=f"late, with {many:,} asleep, most", unit="ms", values=[max(late_among_many)], better="less"),
    ]


def _sleep(bench: Bench, connection: Connection, schema: str, count: int) -> None:
    """So many are asleep in the end."""
    missing = count - _asleep(connection, schema)
    asyncio.run(_start(bench, schema, missing, _LONG))
    while _asleep(connection, schema) < count:
        time.sleep(0.1)


async def _start(bench: Bench, schema: str, count: int, seconds: float) -> None:
    async with Client(bench.cluster.url, schema=schema) as client:
        for first in range(0, count, 10_000):
            await client.start_many([nap(seconds) for _ in range(min(10_000, count - first))])


def _asleep(connection: Connection, schema: str) -> int:
    ((count,),) = connection.execute(f"SELECT count(*) FROM {schema}.waits WHERE waiting_for = 'timer'").fetchall()
    return int(count)


def _lateness(bench: Bench, connection: Connection, schema: str) -> list[float]:
    """By how many ms workflows began their step after the end of their sleep."""
    asyncio.run(_start(bench, schema, _WAKING, _NAP_SECONDS))
    text = f"""
        SELECT date_part('epoch', step.started_at - timer.wake_at) * 1000
        FROM {schema}.checkpoints AS step
        JOIN {schema}.checkpoints AS timer USING (shard, workflow_id)
        WHERE step.key = 'clock' AND timer.kind = 'timer' AND step.created_at > now() - interval '1 minute'
        ORDER BY step.created_at DESC
        LIMIT {_WAKING}
    """
    woken = f"SELECT count(*) FROM {schema}.waits WHERE wake_at < now() + interval '1 day'"
    while connection.execute(woken).fetchall() != [(0,)] or connection.execute(
        f"SELECT count(*) FROM {schema}.queue_entries"
    ).fetchall() != [(0,)]:
        time.sleep(0.1)
    return [float(late) for (late,) in connection.execute(text).fetchall()]


def _part(values: list[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)]
