"""Ten thousand workflows at once on one worker: what they need of its memory."""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import resident_mib, role
from benchmarks.program import SCHEMA, stand_still
from perdure import Client
from perdure.config import DATABASE_URL

COUNT = 10_000


def measure(bench: Bench) -> list[Figure]:
    """All of them stand in the body of a step."""
    memory: list[float] = []
    for _ in range(bench.repeats):
        count, schema = bench.count(COUNT), bench.fresh_schema()
        with (
            role("worker", count, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}) as worker,
            bench.connect() as connection,
        ):
            asyncio.run(_start(bench, schema, count))
            running = f"SELECT count(*) FROM {schema}.running_steps"
            while connection.execute(running).fetchall() != [(count,)]:
                time.sleep(0.2)
            memory.append(resident_mib(worker.pid))
    return [Figure(name=f"memory with {bench.count(COUNT):,} running (RSS)", unit="MiB", values=memory, target=250,
                   better="less")]  # fmt: skip


async def _start(bench: Bench, schema: str, count: int) -> None:
    async with Client(bench.cluster.url, schema=schema) as client:
        await client.start_many(stand_still() for _ in range(count))
