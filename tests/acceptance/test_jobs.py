"""`@app.job`: a workflow that is one step."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest

from acceptance.support import only_step
from perdure import App, Retry, StepTimeout


async def test_a_job_may_be_an_async_function(app: App) -> None:
    @app.job
    async def resize(width: int) -> int:
        return width // 2

    async with app.worker():
        handle = await app.start(resize(10))
        assert await handle.result() == 5
    assert (await only_step(handle)).name == "resize"


async def test_a_job_may_be_a_plain_function_and_runs_in_a_thread(app: App) -> None:
    @app.job
    def thread_of() -> str:
        return threading.current_thread().name

    async with app.worker():
        assert await app.run(thread_of()) != threading.current_thread().name


async def test_a_job_has_a_name_a_queue_and_a_retry_of_its_own(app: App) -> None:
    calls: list[int] = []

    @app.job(name="mail", queue="slow", retry=Retry(max_attempts=2, initial=timedelta(0)))
    def send_mail(to: str) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError(to)
        return to

    async with app.worker():
        handle = await app.start(send_mail("a@example.org"))
        assert await handle.result() == "a@example.org"
    found = await handle.describe()
    assert (found.name, found.queue) == ("mail", "slow")
    assert (await only_step(handle)).attempts == 2


async def test_a_job_that_takes_too_long_times_out(app: App) -> None:
    @app.job(timeout=timedelta(milliseconds=20))
    async def endless() -> None:
        await asyncio.Event().wait()

    async with app.worker():
        with pytest.raises(StepTimeout, match="endless"):
            await app.run(endless())


async def test_a_job_fails_as_its_function_failed(app: App) -> None:
    @app.job
    def divide(by: int) -> float:
        return 1 / by

    async with app.worker():
        with pytest.raises(ZeroDivisionError):
            await app.run(divide(0))
