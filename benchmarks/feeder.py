"""Keeps a backlog of one-step workflows: `python -m benchmarks.feeder BATCHES`; it ends when its stdin does.

So many batches of a thousand are under way: when the last workflow of the oldest has ended, the next one is started.
Each time it prints how many have ended, and the monotonic clock.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque

from benchmarks.program import TEXT, app, one_step
from perdure import Handle

BATCH = 1_000


async def main(batches: int) -> None:
    """Start, wait, start."""
    print("works", flush=True)
    over = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    last: deque[Handle[str]] = deque()
    ended = 0
    async with app:
        while not over.done():
            while len(last) < batches:
                last.append((await app.start_many(one_step(TEXT) for _ in range(BATCH)))[-1])
            await last.popleft().result()
            ended += BATCH
            print(ended, time.monotonic(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
