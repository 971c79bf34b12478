"""One workflow that starts ten thousand children and waits for them, beside as many workflows without a parent.

The children are jobs of one step. One worker process. What tells is the ratio: what it costs that they are children.
Then a client keeps starting parents with twenty children each, for a while: on new tables, and beside a transaction
that is open throughout (see `ageing.py`); the children count.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks import ageing
from benchmarks.bench import Bench
from benchmarks.figures import Curve, Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, fan_out, job
from perdure import Client, Handle
from perdure.config import DATABASE_URL

COUNT = 10_000
_WAYS = ("gather", "map")


def measure(bench: Bench) -> list[Figure | Curve]:
    return [*_fan_outs(bench), *ageing.compare(bench, "family", {"families": ageing.fresh, "pinned": ageing.pinned})]


def _fan_outs(bench: Bench) -> list[Figure]:
    """Alternating: each way to fan out, and the same without a parent."""
    rates: dict[str, list[float]] = {way: [] for way in (*_WAYS, "alone")}
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        with role("worker", 1000, env={DATABASE_URL: bench.cluster.url, SCHEMA: schema}):
            for way in rates:
                rates[way].append(asyncio.run(_rate(bench, schema, way)))
    ratios = [children / alone for children, alone in zip(rates["gather"], rates["alone"], strict=True)]
    return [
        Figure(name="children, gather", unit="children/s", values=rates["gather"], target=3000),
        Figure(name="children, map(concurrency=1000)", unit="children/s", values=rates["map"], target=3000),
        Figure(name="the same jobs without a parent", unit="workflows/s", values=rates["alone"]),
        Figure(name="children / without a parent", unit="times", values=ratios),
    ]


async def _rate(bench: Bench, schema: str, way: str) -> float:
    count = bench.count(COUNT)
    async with Client(bench.cluster.url, schema=schema) as client:
        began = time.perf_counter()
        if way == "alone":
            handles: list[Handle[Any]] = await client.start_many([job(number) for number in range(count)])
            await asyncio.gather(*(handle.result() for handle in handles))
        else:
            assert await client.run(fan_out(count, way)) == count
        return count / (time.perf_counter() - began)
