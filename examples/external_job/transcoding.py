"""A job at somebody else's service: start it once, ask now and then whether it is done, and give up after a day."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta

from perdure import App, Rerun, RetryAfter, current, step

app = App("transcoding")


class TranscodingFailed(Exception):
    """The service says that it can't be done."""


@dataclass
class Service:
    """The service: this example plays it. A job needs some looks until it is done."""

    looks_needed: int = 3
    jobs: dict[str, str] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)

    async def start(self, video: str, tag: str) -> str:
        self.jobs[tag] = video
        return tag

    async def find(self, tag: str) -> str | None:
        return tag if tag in self.jobs else None

    async def state(self, job: str) -> str:
        self.looks[job] = self.looks.get(job, 0) + 1
        if self.jobs[job].endswith(".txt"):
            return "failed"
        return "done" if self.looks[job] >= self.looks_needed else "working"


SERVICE = Service()


async def find_job(video: str) -> str:
    """A crash cut the start short: has the service got the job? It keeps the tag that we gave it."""
    job = await SERVICE.find(current().idempotency_key)
    if job is None:
        raise Rerun
    return job


@step(in_doubt=find_job)
async def start_job(video: str) -> str:
    return await SERVICE.start(video, tag=current().idempotency_key)


@step(idempotent=True)
async def wait_for_job(job: str) -> str:
    """One look. `counts=False`: it isn't a failure that it isn't done; the workflow leaves memory in between."""
    state = await SERVICE.state(job)
    if state == "working":
        raise RetryAfter(timedelta(minutes=30), counts=False)
    if state == "failed":
        raise TranscodingFailed(job)
    return f"https://cdn.example.org/{job}"


@app.workflow(timeout=timedelta(days=1))
async def transcode(video: str) -> str:
    return await wait_for_job(await start_job(video))


async def main() -> None:
    SERVICE.looks_needed = 1  # nobody wants to wait for half an hour here
    async with app, app.worker():
        print(await app.run(transcode("cats.mov")))


if __name__ == "__main__":
    asyncio.run(main())
