"""PgQueuer, with a job that does nothing: a job queue, which records neither steps nor results.

What was tuned, after reading its code (1.6.0): `batch_size` is how many jobs are fetched, and how many outcomes are
written, in one statement; 10 by default.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
from pgqueuer import AsyncpgDriver, Job, Queries, QueueManager

from benchmarks.peers import Peer, main, until_stdin_ends
from benchmarks.program import TEXT

_BATCH = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How it is run."""

    batch: int = 10


SETTINGS = {"default": Setting(), "tuned": Setting(batch=200)}
PEER = Peer(
    does="no-op job",
    count=20_000,
    settings=tuple(SETTINGS),
    left="SELECT count(*) FROM pgqueuer",
    drained="""
        SELECT extract(epoch FROM max(created) FILTER (WHERE status = 'successful')
                                  - min(created) FILTER (WHERE status = 'picked'))::float8,
               count(*) FILTER (WHERE status = 'successful')
        FROM pgqueuer_log
        """,
)


@asynccontextmanager
async def _queries(url: str) -> AsyncIterator[Queries]:
    connection = await asyncpg.connect(dsn=url)
    try:
        yield Queries(AsyncpgDriver(connection))
    finally:
        await connection.close()


async def start(url: str, setting: Setting, count: int) -> None:
    """Fill the queue, as a client."""
    async with _queries(url) as queries:
        await queries.install()
        for first in range(0, count, _BATCH):
            size = min(_BATCH, count - first)
            await queries.enqueue(["nothing"] * size, [TEXT.encode()] * size, [0] * size)


async def work(url: str, setting: Setting) -> None:
    """Be a worker until stdin ends."""
    async with _queries(url) as queries:
        manager = QueueManager(queries)

        @manager.entrypoint("nothing")
        async def nothing(job: Job) -> None:
            pass

        working = asyncio.create_task(manager.run(batch_size=setting.batch))
        await until_stdin_ends()
        manager.shutdown.set()
        await working


if __name__ == "__main__":
    main(SETTINGS, start, work)
