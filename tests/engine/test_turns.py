"""A worker at rest looks at one thing at a time, and so holds one connection for all that it looks at."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from perdure import App, Client, Invocation, step
from perdure.engine.claimer import Claimer
from perdure.engine.loop import Turns

from .support import FaultyDatabase, start

LONG = timedelta(seconds=60)
SOON = timedelta(seconds=20)


async def _turns_of_the_loop() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_what_looks_now_and_then_takes_turns(app: App, faulty: FaultyDatabase) -> None:
    async with app.worker(lease=LONG) as worker:
        held = faulty.hold_answer("next_due")
        async with asyncio.timeout(20):
            await held.happened.wait()
        faulty.sent.clear()
        for part in (worker._claimer, worker._recovery):
            part.wake()
        await _turns_of_the_loop()
        sent = list(faulty.sent)
        held.leave.set()
    assert set(sent) <= {"notify"}, "the listener tries whether it hears; nothing else goes beside a turn"


async def test_a_hint_does_not_wait_for_a_turn(app: App, client: Client, faulty: FaultyDatabase) -> None:
    @step
    async def work() -> str:
        return "done"

    @app.workflow
    async def flow() -> str:
        return await work()

    async with app.worker(lease=LONG):
        await app.run(flow())  # the queue is known, and the worker hears
        held = faulty.hold_answer("next_due")
        async with asyncio.timeout(20):
            await held.happened.wait()
        handle = await client.start(Invocation("flow"))
        assert await handle.result(timeout=SOON) == "done"
        assert not held.leave.is_set()
        held.leave.set()


async def test_a_hint_that_comes_while_a_claim_is_under_way_is_heard(
    app: App, faulty: FaultyDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    for constant in ("_POLL_SECONDS", "_DEAF_POLL_SECONDS"):
        monkeypatch.setattr(f"perdure.engine.claimer.{constant}", 3600.0)
    async with app.worker(lease=LONG) as worker:
        held = faulty.hold_answer("claim")
        worker.hint("q")
        async with asyncio.timeout(20):
            await held.happened.wait()  # it has found nothing, and all free slots are kept for its answer
        (id,) = await start(faulty)
        worker.hint("q")
        held.leave.set()
        assert await app.handle(id).result(timeout=SOON) == "done"


@pytest.mark.parametrize(("many", "seconds"), [(2, 1.0), (1, 2.0)])
async def test_where_many_workers_live_each_polls_half_as_often(
    app: App, monkeypatch: pytest.MonkeyPatch, many: int, seconds: float
) -> None:
    as_expected = asyncio.Event()
    tick = Claimer.tick

    async def watched(self: Claimer) -> float | None:
        pause = await tick(self)
        if pause == seconds:  # else it doesn't hear yet, or hasn't counted yet, or it wasn't its turn
            as_expected.set()
        return pause

    monkeypatch.setattr(Claimer, "tick", watched)
    monkeypatch.setattr("perdure.engine.recovery._MANY", many)
    async with app.worker(lease=LONG), asyncio.timeout(20):
        await as_expected.wait()


async def test_a_turn_without_end_holds_up_nobody() -> None:
    turns = Turns()
    async with turns.turn():
        async with asyncio.timeout(20), turns.turn():
            assert turns.is_taken
        assert turns.is_taken
    assert not turns.is_taken
