"""The jobs do what the tasks did."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from perdure import Status
from tasks import UPLOADED, NotThere, app, callers, fetch, resize, thumbnails


@pytest.fixture(autouse=True)
def _uploads() -> None:
    UPLOADED.clear()
    UPLOADED.add("cat.png")


async def test_a_chain_and_a_group_are_a_workflow(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        assert await kit.run(thumbnails("cat.png", [64, 128])) == ["/tmp/cat.png@64", "/tmp/cat.png@128"]


async def test_a_task_is_tried_again_as_before(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(fetch("late.png"))
        await kit.clock.advance(timedelta(seconds=5))
        UPLOADED.add("late.png")
        assert await kit.finish(handle) == "/tmp/late.png"
        failing = await app.start(fetch("never.png"))
        with pytest.raises(NotThere, match=r"never\.png"):
            await kit.finish(failing)
        (info,) = await failing.steps()
        assert info.attempts == 4


async def test_countdown_and_eta_are_delay_and_start_at(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(resize("/tmp/b.png", 64), delay=timedelta(minutes=10))
        await kit.clock.advance(timedelta(minutes=9))
        assert await handle.status() is Status.WAITING
        await kit.clock.advance(timedelta(minutes=1))
        assert await handle.result() == "/tmp/b.png@64"


async def test_the_callers_need_no_event_loop(perdure_app: Any) -> None:
    async with perdure_app(app):
        assert await asyncio.to_thread(callers) == ["/tmp/cat.png@64", "/tmp/cat.png@128"]
        await asyncio.to_thread(app.blocking.close)
