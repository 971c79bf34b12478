"""What was a Celery app: the same tasks as jobs, and a chain as a workflow. The README has both side by side."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from perdure import App, Retry


class NotThere(Exception):
    """The upload hasn't arrived."""


app = App("images", errors=[NotThere])

UPLOADED: set[str] = set()


@app.job(retry=Retry(max_attempts=4, initial=timedelta(seconds=10), factor=2, retry_on=(NotThere,)))
def fetch(name: str) -> str:
    if name not in UPLOADED:
        raise NotThere(name)
    return f"/tmp/{name}"


@app.job
def resize(path: str, width: int) -> str:
    return f"{path}@{width}"


@app.workflow
async def thumbnails(name: str, widths: list[int]) -> list[str]:
    """chain(fetch, group(resize...)) is Python."""
    path = await fetch(name)
    return list(await asyncio.gather(*(resize(path, width) for width in widths)))


def callers() -> list[str]:
    """What called `delay`, `apply_async(countdown=)` and `apply_async(eta=)` before."""
    app.blocking.start(resize("/tmp/a.png", 64))
    app.blocking.start(resize("/tmp/b.png", 64), delay=timedelta(minutes=10))
    app.blocking.start(resize("/tmp/c.png", 64), start_at=datetime.now(UTC) + timedelta(days=1))
    return app.blocking.run(thumbnails("cat.png", [64, 128]))


if __name__ == "__main__":
    UPLOADED.add("cat.png")

    async def main() -> None:
        async with app, app.worker():
            print(await asyncio.to_thread(callers))

    asyncio.run(main())
