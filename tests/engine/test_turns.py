"""A worker at rest looks at one thing at a time, and so holds one connection for all that it looks at."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from perdure import App, Client, Invocation, step
from perdure.engine.claimer import Claimer
from perdure.engine.loop import Loop, Turns
from perdure.engine.parents import Parents
from perdure.engine.recovery import Recovery
from perdure.engine.timers import Timers

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


@pytest.mark.parametrize(("many", "pace"), [(2, 1), (1, 2)])
async def test_where_many_workers_live_each_looks_half_as_often_for_what_others_find_as_well(
    app: App, monkeypatch: pytest.MonkeyPatch, many: int, pace: int
) -> None:
    shared, own = {Claimer.name, Recovery.name}, {Timers.name, Parents.name}
    expected = shared | own if pace == 1 else shared
    all_seen = asyncio.Event()
    seen: set[str] = set()
    wait = Loop._wait

    async def watched(self: Loop, seconds: float) -> None:
        if 0.7 * pace <= seconds / self.interval <= 1.3 * pace:  # else it hasn't counted yet, or it wasn't its turn
            seen.add(self.name)
        if seen >= expected:
            all_seen.set()
        await wait(self, seconds)

    monkeypatch.setattr(Loop, "_wait", watched)
    monkeypatch.setattr("perdure.engine.recovery._MANY", many)
    async with app.worker(lease=LONG), asyncio.timeout(20):
        await all_seen.wait()
    assert seen & (shared | own) == expected


async def test_a_turn_without_end_holds_up_nobody() -> None:
    turns = Turns()
    async with turns.turn():
        async with asyncio.timeout(20), turns.turn():
            assert turns.is_taken
        assert turns.is_taken
    assert not turns.is_taken
