"""A worker of perdure: `python -m benchmarks.worker CONCURRENCY`; ends when its stdin does."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from benchmarks.program import app


async def main(concurrency: int) -> None:
    """Say so, work, and stop in order."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def parent_is_done() -> None:
        loop.remove_reader(0)
        stop.set()

    loop.add_reader(0, parent_is_done)
    async with app, app.worker(concurrency=concurrency, grace=timedelta(seconds=5)):
        print("works", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
