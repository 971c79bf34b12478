"""Starts, without anybody who runs them: from many callers at once, and many in one call."""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.program import TEXT, one_step
from perdure import Client

CALLERS = 64
COUNT = 20_000


def measure(bench: Bench) -> list[Figure]:
    """In turn: each caller its own start, again and again; and one call for all of them."""
    alone: list[float] = []
    together: list[float] = []
    for _ in range(bench.repeats):
        alone.append(asyncio.run(_rate(bench, many=False)))
        together.append(asyncio.run(_rate(bench, many=True)))
    return [
        Figure(name=f"start, {CALLERS} callers", unit="workflows/s", values=alone, target=12_000),
        Figure(name="start_many", unit="workflows/s", values=together, target=30_000),
    ]


async def _rate(bench: Bench, *, many: bool) -> float:
    count, schema = bench.count(COUNT), bench.fresh_schema()
    async with Client(bench.cluster.url, schema=schema) as client:
        await client.start(one_step(TEXT))  # connections and statements are there
        began = time.perf_counter()
        if many:
            await client.start_many(one_step(TEXT) for _ in range(count))
        else:
            await asyncio.gather(*(_start(client, count // CALLERS) for _ in range(CALLERS)))
        rate = (count if many else count // CALLERS * CALLERS) / (time.perf_counter() - began)
    with bench.connect() as connection:
        connection.execute(f"DROP SCHEMA {schema} CASCADE")
    return rate


async def _start(client: Client, count: int) -> None:
    for _ in range(count):
        await client.start(one_step(TEXT))
