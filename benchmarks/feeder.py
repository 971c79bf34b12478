"""Keeps a backlog of workflows: `python -m benchmarks.feeder BATCHES KIND`; it ends when its stdin does.

So many batches of a thousand are under way, of one step each (`one_step`), or the children of others (`family`). When
the last workflow of the oldest has ended, the next one is started. Each time it prints how many have ended, and the
monotonic clock.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque

from benchmarks.program import FAMILY, TEXT, app, family, one_step
from perdure import Handle

BATCH = 1_000


async def main(batches: int, kind: str) -> None:
    """Start, wait, start."""
    print("works", flush=True)
    over = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    last: deque[Handle[str] | Handle[int]] = deque()
    ended = 0
    async with app:
        while not over.done():
            while len(last) < batches:
                if kind == "family":
                    last.append((await app.start_many(family(TEXT) for _ in range(BATCH // FAMILY)))[-1])
                else:
                    last.append((await app.start_many(one_step(TEXT) for _ in range(BATCH)))[-1])
            await last.popleft().result()
            ended += BATCH
            print(ended, time.monotonic(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
