"""Sagas: what was done is undone, in reverse, wherever it fails and whatever crashes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import SOON, Gate, hold, interrupted, served
from perdure import App, DeadlineExceeded, Retry, Status, WorkflowCancelled, saga, sleep, step, telemetry

Sql = Callable[..., list[Any]]
QUICK = Retry(max_attempts=2, initial=timedelta(milliseconds=1))
DAY = timedelta(days=1)


class World:
    """What the steps of a trip do."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.broken: set[str] = set()
        self.gate: Gate | None = None


@step
async def book(world: World, what: str) -> str:
    world.log.append(f"book {what}")
    if what in world.broken:
        raise ValueError(f"no {what} left")
    return what


@step
async def undo(world: World, what: str) -> None:
    if world.gate is not None:
        await world.gate.passed()
    world.log.append(f"undo {what}")
    if f"undo {what}" in world.broken:
        raise ValueError(f"{what} can't be undone")


def declare_trip(app: App, world: World, *, waits: bool = False, **policy: Any) -> Any:
    @app.workflow
    async def trip() -> str:
        async with saga(**policy) as s:
            for what in ("flight", "hotel", "car"):
                await book(world, what)
                s.compensate(undo, world, what)
            if waits:
                await sleep(DAY)
        return "booked"

    return trip


async def test_what_succeeds_is_not_undone(app: App) -> None:
    world = World()
    trip = declare_trip(app, world)
    async with app.worker():
        assert await app.run(trip()) == "booked"
    assert world.log == ["book flight", "book hotel", "book car"]


async def test_what_was_done_is_undone_in_reverse_and_the_error_goes_on(app: App) -> None:
    world = World()
    world.broken.add("car")
    trip = declare_trip(app, world)
    async with app.worker():
        handle = await app.start(trip())
        with pytest.raises(ValueError, match="no car left"):
            await handle.result(timeout=SOON)
    assert world.log == ["book flight", "book hotel", "book car", "undo hotel", "undo flight"]
    assert [each.key for each in await handle.steps()] == ["book", "book#2", "book#3", "undo", "undo#2"]


async def test_a_cancelled_workflow_undoes_what_it_did(app: App, events: Any) -> None:
    world = World()
    trip = declare_trip(app, world, waits=True)
    async with app.worker():
        handle = await app.start(trip())
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
    assert world.log[3:] == ["undo car", "undo hotel", "undo flight"]


async def test_so_does_one_whose_time_is_over(app: App) -> None:
    world = World()
    trip = declare_trip(app, world, waits=True)
    async with app.worker():
        handle = await app.start(trip(), timeout=timedelta(seconds=0.5))
        with pytest.raises(DeadlineExceeded):
            await handle.result(timeout=SOON)
    assert world.log[3:] == ["undo car", "undo hotel", "undo flight"]


async def test_a_worker_that_dies_amid_the_compensations_leaves_the_rest_to_the_next(app: App) -> None:
    world = World()
    world.broken.add("car")
    gate = world.gate = Gate()
    async with interrupted(app, declare_trip(app, world)(), gate) as handle:
        assert "undo hotel" not in world.log
    with pytest.raises(ValueError, match="no car left"):
        await served(app, handle)
    assert world.log.count("book car") == 1
    assert world.log[-2:] == ["undo hotel", "undo flight"]


async def test_a_run_that_is_over_undoes_nothing(app: App, events: Any) -> None:
    """It left memory, or its worker let it go: the saga goes on in the next run."""
    world = World()
    gate = Gate()

    @app.workflow
    async def trip() -> None:
        async with saga() as s:
            await book(world, "flight")
            s.compensate(undo, world, "flight")
            await sleep(timedelta(seconds=3))
            await hold(gate)

    async with interrupted(app, trip(), gate) as handle:
        assert events.of(telemetry.WorkflowSuspended)
    await served(app, handle)
    assert world.log == ["book flight"]


async def test_a_compensation_is_tried_again_and_then_parked_for_an_operator(app: App, events: Any, sql: Sql) -> None:
    world = World()
    world.broken |= {"car", "undo hotel"}
    trip = declare_trip(app, world, retry=QUICK)
    async with app.worker():
        handle = await app.start(trip())
        await events.wait_for(telemetry.WorkflowSuspended)
        assert sql("SELECT status, waiting_for FROM workflows") == [("waiting", "operator")]
        assert world.log[3:] == ["undo hotel"] * 2
        world.broken.discard("undo hotel")
        await handle.resume()
        with pytest.raises(ValueError, match="no car left"):
            await handle.result(timeout=SOON)
    assert world.log[3:] == ["undo hotel"] * 3 + ["undo flight"]


async def test_a_compensation_that_may_fail_does_not_keep_the_others_from_it(app: App) -> None:
    world = World()
    world.broken |= {"car", "undo hotel"}
    trip = declare_trip(app, world, retry=QUICK, on_exhausted="fail")
    async with app.worker():
        handle = await app.start(trip())
        with pytest.raises(ValueError, match="hotel can't be undone"):
            await handle.result(timeout=SOON)
    assert world.log[3:] == ["undo hotel", "undo hotel", "undo flight"]
    assert await handle.status() is Status.ERROR


async def test_a_second_cancel_does_not_cut_a_compensation_short(app: App, events: Any) -> None:
    world = World()
    gate = world.gate = Gate()
    trip = declare_trip(app, world, waits=True)
    async with app.worker():
        handle = await app.start(trip())
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel()
        await gate.reached()
        await handle.cancel()
        gate.open()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
    assert world.log[3:] == ["undo car", "undo hotel", "undo flight"]


async def test_sagas_nest_and_end_from_the_inside(app: App) -> None:
    world = World()

    @app.workflow
    async def trips() -> None:
        async with saga() as outer:
            await book(world, "outer")
            outer.compensate(undo, world, "outer")
            async with saga() as inner:
                await book(world, "inner")
                inner.compensate(undo, world, "inner")
                raise ValueError("rain")

    async with app.worker():
        with pytest.raises(ValueError, match="rain"):
            await app.run(trips())
    assert world.log[2:] == ["undo inner", "undo outer"]


async def test_what_is_caught_within_is_no_reason_to_undo(app: App) -> None:
    world = World()
    world.broken.add("car")

    @app.workflow
    async def trip() -> str:
        async with saga() as s:
            await book(world, "flight")
            s.compensate(undo, world, "flight")
            try:
                await book(world, "car")
            except ValueError:
                return "on foot"
        return "by car"

    async with app.worker():
        assert await app.run(trip()) == "on foot"
    assert world.log == ["book flight", "book car"]


async def test_a_compensation_that_was_called_is_refused() -> None:
    async with saga() as s:
        call = undo(World(), "flight")
        with pytest.raises(TypeError, match="without calling the step"):
            s.compensate(call)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        call.close()
