"""Entries that steps write to streams, each a word of text, by one worker process; and a reader who follows one.

The time is from the start of the workflows to their results; all entries are durable then.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.figures import Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, talk
from perdure import Client
from perdure.config import DATABASE_URL

COUNT = 40_000
_WORKFLOWS = 20


def measure(bench: Bench) -> list[Figure]:
    """Twenty workflows at once, with one step each that writes."""
    rates: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 100, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            rates.append(asyncio.run(_rate(bench, schema)))
    return [Figure(name="stream entries, one worker", unit="entries/s", values=rates, target=10_000)]


async def _rate(bench: Bench, schema: str) -> float:
    each = bench.count(COUNT) // _WORKFLOWS
    async with Client(bench.cluster.url, schema=schema) as client:
        began = time.perf_counter()
        handles = await client.start_many([talk(each) for _ in range(_WORKFLOWS)])
        read = [entry async for entry in handles[0].read_stream("words")]
        await asyncio.gather(*(handle.result() for handle in handles))
        assert len(read) == each
        return each * _WORKFLOWS / (time.perf_counter() - began)
