"""Queues share a worker."""

from __future__ import annotations

from perdure import App


async def test_a_long_queue_does_not_starve_a_short_one(app: App) -> None:
    order: list[str] = []

    @app.job
    async def note(name: str) -> None:
        order.append(name)

    await app.start_many([note("long") for _ in range(200)], queue="a")
    short = await app.start(note("short"), queue="z")
    async with app.worker(concurrency=1):
        await short.result()
    assert order.index("short") < 20


async def test_a_queue_that_a_worker_does_not_serve_is_left_alone(app: App) -> None:
    @app.job
    async def note(name: str) -> str:
        return name

    other = await app.start(note("other"), queue="other")
    async with app.worker(queues=["mine"]):
        mine = await app.start(note("mine"), queue="mine")
        assert await mine.result() == "mine"
    assert await other.status() == "pending"
