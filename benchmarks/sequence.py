"""One workflow of a thousand steps, one after the other: each waits until the one before is durable.

So the disk's latency counts, and a durable insert of one row, taken right before and after, says what that was.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, TEXT, many_steps
from perdure import Client
from perdure.config import DATABASE_URL

STEPS = 1000
_INSERTS = 200


def measure(bench: Bench) -> list[Figure]:
    """The steps return the clock, so the workflow's result says when each began."""
    rates: list[float] = []
    slopes: list[float] = []
    inserts: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            asyncio.run(_stamps(bench, schema))  # connections and statements are there
            times = _inserts(bench, schema)
            stamps = asyncio.run(_stamps(bench, schema))
            inserts.append(statistics.median(times + _inserts(bench, schema)))
        rates.append((STEPS - 1) / (stamps[-1] - stamps[0]) * 1e9)
        slopes.append((stamps[-1] - stamps[-101]) / (stamps[100] - stamps[0]))
        with bench.connect() as connection:
            ((recorded,),) = connection.execute(f"SELECT count(*) FROM {schema}.workflow_steps").fetchall()
            assert recorded == 2 * STEPS, f"{recorded} steps are recorded of {2 * STEPS}"
    ratios = [1000 / rate / insert for rate, insert in zip(rates, inserts, strict=True)]
    return [
        Figure(name="one durable insert, p50", unit="ms", values=inserts, better="less"),
        Figure(name="sequential steps", unit="steps/s", values=rates, target=500),
        Figure(name="one step / insert", unit="times", values=ratios, better="less"),
        Figure(name="last hundred / first hundred", unit="times", values=slopes, target=1.2, better="less"),
    ]


async def _stamps(bench: Bench, schema: str) -> list[int]:
    async with Client(bench.cluster.url, schema=schema) as client:
        return await client.run(many_steps(STEPS))


def _inserts(bench: Bench, schema: str) -> list[float]:
    """How many ms a durable insert of one row takes, so many times."""
    times: list[float] = []
    with bench.connect() as connection:
        connection.execute(f"CREATE TABLE IF NOT EXISTS {schema}.plain (payload json NOT NULL)")
        for _ in range(_INSERTS):
            began = time.perf_counter()
            connection.execute(f"INSERT INTO {schema}.plain VALUES (%s::json)", (f'"{TEXT}"',))
            times.append((time.perf_counter() - began) * 1000)
    return times
