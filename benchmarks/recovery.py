"""A worker dies with 1 000 workflows running: how long until another one runs them all.

From the SIGKILL to the last entry that the other worker holds; the lease is the usual one.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench, Connection
from benchmarks.figures import Figure
from benchmarks.processes import role
from benchmarks.program import SCHEMA, stand_still
from perdure import Client
from perdure.config import DATABASE_URL

COUNT = 1000
_LEASE_SECONDS = 10.0


def measure(bench: Bench) -> list[Figure]:
    """One worker takes them all; the other one comes when nothing is left to take, and waits for one lease."""
    seconds: list[float] = []
    for _ in range(bench.repeats):
        schema = bench.fresh_schema()
        env = {DATABASE_URL: bench.cluster.url, SCHEMA: schema}
        with bench.connect() as connection, role("worker", COUNT, env=env) as first:
            asyncio.run(_start(bench, schema))
            dying = _worker(connection, schema, first.pid)
            while _held(connection, schema, dying) < COUNT:
                time.sleep(0.05)
            with role("worker", COUNT, env=env) as second:
                taking_over = _worker(connection, schema, second.pid)
                time.sleep(_LEASE_SECONDS + 1)
                began = time.monotonic()
                first.kill()
                while _held(connection, schema, taking_over) < COUNT:
                    time.sleep(0.02)
                seconds.append(time.monotonic() - began)
                second.kill()  # what it holds stands still for ever
    return [
        Figure(
            name=f"{COUNT:,} workflows, from SIGKILL to all claimed",
            unit="s",
            values=seconds,
            target=_LEASE_SECONDS + 2,
            better="less",
            note=f"the lease is {_LEASE_SECONDS:g} s",
        )
    ]


async def _start(bench: Bench, schema: str) -> None:
    async with Client(bench.cluster.url, schema=schema) as client:
        await client.start_many([stand_still() for _ in range(COUNT)])


def _held(connection: Connection, schema: str, worker: str) -> int:
    query = f"SELECT count(*) FROM {schema}.queue_entries WHERE worker_id = %s"
    ((count,),) = connection.execute(query.encode(), [worker]).fetchall()
    return int(count)


def _worker(connection: Connection, schema: str, pid: int) -> str:
    ((id,),) = connection.execute(f"SELECT id FROM {schema}.worker_rows WHERE pid = %s".encode(), [pid]).fetchall()
    return str(id)
