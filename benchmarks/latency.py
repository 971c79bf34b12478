"""`app.run` of a one-step workflow, the worker in the same process: one caller, beside one durable insert; and many."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import uuid4

import psycopg
import uvloop

from benchmarks.bench import Bench
from benchmarks.figures import Curve, Figure, distribution
from benchmarks.program import TEXT, one_step
from perdure import App

COUNT = 400
CALLERS = 512
EACH = 60
_WARM_UP = 20


def measure(bench: Bench) -> list[Figure | Curve]:
    """In turn: an insert, a run, an insert, ..."""
    inserts: list[float] = []
    runs: list[float] = []
    tails: list[float] = []
    rates: list[float] = []
    all_inserts: list[float] = []
    all_runs: list[float] = []
    for _ in range(bench.repeats):
        insert, run = asyncio.run(_times(bench, bench.fresh_schema()))
        all_inserts += insert
        all_runs += run
        inserts.append(statistics.median(insert))
        runs.append(statistics.median(run))
        tails.append(statistics.quantiles(run, n=100)[98])
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in `perdure worker`
            rates.append(runner.run(_rate(bench, bench.fresh_schema())))
    ratios = [run / insert for run, insert in zip(runs, inserts, strict=True)]
    return [
        Figure(name="one durable insert, p50", unit="ms", values=inserts, better="less"),
        Figure(name="app.run, p50", unit="ms", values=runs, target=2.5, better="less"),
        Figure(name="app.run, p99", unit="ms", values=tails, better="less"),
        Figure(name="app.run / insert", unit="times", values=ratios, target=6, better="less"),
        Figure(name=f"app.run, {CALLERS} callers", unit="workflows/s", values=rates, target=10_000),
        distribution("one durable insert", all_inserts),
        distribution("app.run of one step", all_runs),
    ]


async def _times(bench: Bench, schema: str) -> tuple[list[float], list[float]]:
    inserts: list[float] = []
    runs: list[float] = []
    app = App("benchmarks", include=[one_step], database_url=bench.cluster.url, schema=schema)
    async with app, app.worker(), await psycopg.AsyncConnection.connect(bench.cluster.url, autocommit=True) as plain:
        plain.prepare_threshold = 0
        await plain.execute(f"CREATE TABLE {schema}.plain (id uuid PRIMARY KEY, payload json NOT NULL)")
        count = bench.count(COUNT) + _WARM_UP
        for _ in range(count):
            began = time.perf_counter()
            await plain.execute(f"INSERT INTO {schema}.plain VALUES (%s, %s::json)", (uuid4(), f'"{TEXT}"'))
            inserts.append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            await app.run(one_step(TEXT))
            runs.append((time.perf_counter() - began) * 1000)
        cursor = await plain.execute(f"SELECT count(*) FROM {schema}.workflows WHERE status = 'success'")
        ended = await cursor.fetchone()
        assert ended == (count,), f"{ended} workflows are recorded of {count}"
    return inserts[_WARM_UP:], runs[_WARM_UP:]


async def _rate(bench: Bench, schema: str) -> float:
    """How many a second, with many callers in the worker's own process."""
    app = App("benchmarks", include=[one_step], database_url=bench.cluster.url, schema=schema)
    each = bench.count(EACH)
    async with app, app.worker(concurrency=CALLERS), _left_alone_by_the_collector():

        async def caller(count: int) -> None:
            for _ in range(count):
                await app.run(one_step(TEXT))

        await asyncio.gather(*(caller(2) for _ in range(CALLERS)))  # connections and statements are there
        began = time.perf_counter()
        await asyncio.gather(*(caller(each) for _ in range(CALLERS)))
        return CALLERS * each / (time.perf_counter() - began)


@asynccontextmanager
async def _left_alone_by_the_collector() -> AsyncGenerator[None]:
    """As `perdure worker` does, and how-to/run-workers.md says."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100 * CALLERS, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
