"""One workflow of a thousand steps, one after the other: each waits until the one before is durable.

So the disk's latency counts, and a durable insert of one row, taken right before and after, says what that was. Pure
steps don't wait, and workflows beside each other share commits.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.bench import Bench
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, TEXT, many_steps, pure_steps
from perdure import Client
from perdure.config import DATABASE_URL

STEPS = 1000
PURE_STEPS = 5_000
TOGETHER = 40
_INSERTS = 200
_SPAN = 49
_ENDS = range(_SPAN, STEPS, _SPAN + 1)


def measure(bench: Bench) -> list[Figure | Curve]:
    """The steps return the clock, so the workflow's result says when each began."""
    rates: list[float] = []
    slopes: list[float] = []
    inserts: list[float] = []
    pure: list[float] = []
    together: list[float] = []
    costs: list[list[float]] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            asyncio.run(_stamps(bench, schema))  # connections and statements are there
            times = _inserts(bench, schema)
            stamps = asyncio.run(_stamps(bench, schema))
            inserts.append(statistics.median(times + _inserts(bench, schema)))
            pure.append(asyncio.run(_pure(bench, schema)))
            together.append(asyncio.run(_together(bench, schema)))
        rates.append((STEPS - 1) / (stamps[-1] - stamps[0]) * 1e9)
        costs.append([(stamps[end] - stamps[end - _SPAN]) / _SPAN / 1e6 for end in _ENDS])
        slopes.append((stamps[-1] - stamps[-101]) / (stamps[100] - stamps[0]))
        with bench.connect() as connection:
            ((recorded,),) = connection.execute(f"SELECT count(*) FROM {schema}.workflow_steps").fetchall()
            wanted = (2 + TOGETHER) * STEPS + PURE_STEPS
            assert recorded == wanted, f"{recorded} steps are recorded of {wanted}"
    ratios = [1000 / rate / insert for rate, insert in zip(rates, inserts, strict=True)]
    return [
        Figure(name="one durable insert, p50", unit="ms", values=inserts, better="less"),
        Figure(name="sequential steps", unit="steps/s", values=rates, target=900),
        Figure(name="one step / insert", unit="times", values=ratios, better="less"),
        Figure(name="last hundred / first hundred", unit="times", values=slopes, target=1.2, better="less"),
        Figure(name="sequential pure steps", unit="steps/s", values=pure, target=10_000),
        Figure(name=f"steps of {TOGETHER} workflows at once", unit="steps/s", values=together, target=18_000),
        Curve(
            name="one step",
            x=_ENDS,
            y=[statistics.median(cost) for cost in zip(*costs, strict=True)],
            across="steps before it",
            up="ms",
        ),
    ]


async def _stamps(bench: Bench, schema: str) -> list[int]:
    async with Client(bench.cluster.url, schema=schema) as client:
        return await client.run(many_steps(STEPS))


async def _pure(bench: Bench, schema: str) -> float:
    async with Client(bench.cluster.url, schema=schema) as client:
        return await client.run(pure_steps(PURE_STEPS))


async def _together(bench: Bench, schema: str) -> float:
    async with Client(bench.cluster.url, schema=schema) as client:
        handles = await client.start_many(many_steps(STEPS) for _ in range(TOGETHER))
        stamps = [stamp for handle in handles for stamp in await handle.result()]
    return len(stamps) / (max(stamps) - min(stamps)) * 1e9


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
