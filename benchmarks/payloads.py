"""Arguments and results of a MiB each: how many bytes a second, what the worker needs, and what the queue does.

The worker needs memory for those that are under way, not for those that wait; and the queue's table is as small as
ever, because no payload is in it.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import resident_mib, role
from benchmarks.program import SCHEMA, echo_back
from perdure import Client
from perdure.config import DATABASE_URL

COUNT = 400
CONCURRENCY = 10
MIB = 1 << 20
_CALLERS = 8


def measure(bench: Bench) -> list[Figure]:
    """Started beforehand, then run; each returns its argument."""
    started: list[float] = []
    drained: list[float] = []
    memory: list[float] = []
    tables: list[float] = []
    for _ in range(bench.repeats):
        count, schema = bench.count(COUNT), bench.fresh_schema()
        env = {DATABASE_URL: bench.cluster.url, SCHEMA: schema}
        began = time.perf_counter()
        asyncio.run(_start(bench, schema, count))
        started.append(count * MIB / 1e6 / (time.perf_counter() - began))
        with bench.connect() as connection, role("worker", CONCURRENCY, env=env) as worker:
            before, most = resident_mib(worker.pid), 0.0
            while connection.execute(f"SELECT count(*) FROM {schema}.queue_entries").fetchall() != [(0,)]:
                most = max(most, resident_mib(worker.pid))
                time.sleep(0.05)
            ((seconds, ended),) = connection.execute(
                f"""
                SELECT extract(epoch FROM max(completed_at) - min(started_at))::float8, count(*)
                FROM {schema}.workflows WHERE status = 'success'
                """
            ).fetchall()
            assert ended == count, f"{ended} of {count} are recorded"
            ((table,),) = connection.execute(
                f"SELECT pg_total_relation_size('{schema}.queue_entries') / {count}.0"
            ).fetchall()
        with bench.connect() as connection:
            connection.execute(f"DROP SCHEMA {schema} CASCADE")
        drained.append(2 * count * MIB / 1e6 / seconds)
        memory.append(most - before)
        tables.append(float(table))
    return [
        Figure(name="arguments written by clients", unit="MB/s", values=started),
        Figure(name="arguments read and results written", unit="MB/s", values=drained, target=50),
        Figure(name=f"memory that {CONCURRENCY} at once add, most", unit="MiB", values=memory,
               target=CONCURRENCY * 16, better="less", note="argument and result, as text and as values"),
        Figure(name="the queue's table, with its indexes", unit="bytes/workflow", values=tables, target=2048,
               better="less"),
    ]  # fmt: skip


async def _start(bench: Bench, schema: str, count: int) -> None:
    text = "x" * (MIB - 2)
    async with Client(bench.cluster.url, schema=schema) as client:

        async def caller() -> None:
            for _ in range(count // _CALLERS):
                await client.start(echo_back(text))

        await asyncio.gather(*(caller() for _ in range(_CALLERS)))
