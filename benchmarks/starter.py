"""A client of perdure that starts a backlog: `python -m benchmarks.starter COUNT`."""

from __future__ import annotations

import asyncio
import sys

from benchmarks.program import TEXT, app, one_step


async def main(count: int) -> None:
    """Start so many one-step workflows."""
    async with app:
        await app.start_many(one_step(TEXT) for _ in range(count))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
