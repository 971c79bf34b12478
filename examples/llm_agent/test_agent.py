"""The agent does what a human allows, and says each sentence once, whatever breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from agent import DELETED, MODEL, agent, app, read
from perdure import Handle, Status


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    DELETED.clear()
    MODEL.breaks_down = 0
    yield
    MODEL.breaks_down = 0


SAID = "I look at the disk first. The logs are large. I would delete them. Done."


async def test_what_a_human_approves_is_done(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(agent("the disk is full"))
        await kit.idle()
        assert await handle.get_event("asks", type=str) == "delete {'path': '/var/log'}"
        assert await handle.ask("approval", True, type=str) == "thank you"
        assert (await handle.result())[-2:] == ["tool: /var/log is deleted", "model: Done."]
        assert await read(handle.id) == SAID
    assert DELETED == ["/var/log"]


@pytest.mark.parametrize("answers", [True, False])
async def test_what_nobody_approves_is_not_done(perdure_app: Any, answers: bool) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(agent("the disk is full"))
        await kit.idle()
        if answers:
            await handle.ask("approval", False, type=str)
        else:
            await kit.clock.advance(timedelta(days=1))
        assert "tool: the human said no" in await handle.result()
    assert DELETED == []


async def test_a_model_that_hangs_up_begins_its_sentence_anew(perdure_app: Any) -> None:
    MODEL.breaks_down = 2
    async with perdure_app(app) as kit:
        handle = await app.start(agent("the disk is full"))
        reading = asyncio.create_task(read(handle.id))
        for _ in range(3):
            await kit.idle()
            await kit.clock.advance(timedelta(seconds=1))
        await handle.ask("approval", True)
        assert await reading == SAID


async def test_a_crash_in_a_dangerous_tool_waits_for_a_human(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:

        async def approve(handle: Handle[list[str]]) -> None:
            await kit.idle()
            if (await handle.describe()).status is Status.WAITING:
                await handle.send("approval", True)
                await kit.idle()
            if (await handle.describe()).waiting_for == "operator":
                await handle.resume()

        await kit.crash_everywhere(agent("the disk is full"), drive=approve)
    assert set(DELETED) == {"/var/log"}
