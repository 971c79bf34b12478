"""Procrastinate, with a job that does nothing: a job queue, which records neither steps nor results.

What was tuned, after reading its documentation (3.10.0): one job at a time by default; more at once, with as many
connections, is as far as its settings go: each job is fetched, and finished, in a statement of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from procrastinate import App, PsycopgConnector

from benchmarks.peers import Peer, main, until_stdin_ends
from benchmarks.program import TEXT

_BATCH = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How it is run."""

    concurrency: int = 1
    pool: int = 4


SETTINGS = {"default": Setting(), "tuned": Setting(concurrency=20, pool=20)}
PEER = Peer(
    does="no-op job",
    count=1_000,
    settings=tuple(SETTINGS),
    left="SELECT count(*) FROM procrastinate_jobs WHERE status <> 'succeeded'",
    drained="""
        SELECT extract(epoch FROM max(at) FILTER (WHERE type = 'succeeded')
                                  - min(at) FILTER (WHERE type = 'started'))::float8,
               count(*) FILTER (WHERE type = 'succeeded')
        FROM procrastinate_events
        """,
)


def _app(url: str, setting: Setting) -> App:
    app = App(connector=PsycopgConnector(conninfo=url, min_size=1, max_size=setting.pool))

    @app.task(name="nothing")
    async def nothing(text: str) -> None:
        pass

    return app


async def start(url: str, setting: Setting, count: int) -> None:
    """Fill the queue, as a client."""
    app = _app(url, setting)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for first in range(0, count, _BATCH):
            await app.tasks["nothing"].batch_defer_async(*[{"text": TEXT}] * min(_BATCH, count - first))


async def work(url: str, setting: Setting) -> None:
    """Be a worker until stdin ends."""
    app = _app(url, setting)
    async with app.open_async():
        working = asyncio.create_task(
            app.run_worker_async(concurrency=setting.concurrency, install_signal_handlers=False)
        )
        await until_stdin_ends()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


if __name__ == "__main__":
    main(SETTINGS, start, work)
