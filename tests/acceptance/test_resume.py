"""Resuming: a workflow that failed, was cancelled, or has a parked step goes on from its last checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import A_WHILE, SOON, Gate, dozing, hold, interrupted, served
from perdure import (
    App,
    ReplayMismatch,
    Retry,
    Start,
    Status,
    WorkflowCancelled,
    WrongState,
    now,
    random,
    sleep,
    step,
    telemetry,
)

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]


def rows_left(sql: Sql) -> tuple[list[Any], list[Any]]:
    return sql("SELECT * FROM queue_entries"), sql("SELECT * FROM waits")


def history(sql: Sql) -> list[str]:
    """The keys of what was set aside, without what tells one resume from another."""
    rows = sql("SELECT key FROM checkpoints WHERE kind = 'history' ORDER BY 1")
    return sorted(key.split("/", 2)[2] for (key,) in rows)


class Shop:
    """Steps that write down what they do; `ship` fails until it is repaired."""

    def __init__(self, *, on_exhausted: Any = "fail", attempts: int = 1) -> None:
        self.did: list[str] = []
        self.is_repaired = False

        @step
        async def charge(order: int) -> str:
            self.did.append("charge")
            return f"payment {order}"

        @step(retry=Retry(max_attempts=attempts, initial=timedelta(0)), on_exhausted=on_exhausted)
        async def ship(order: int) -> str:
            self.did.append("ship")
            if not self.is_repaired:
                raise ValueError("no truck")
            return f"parcel {order}"

        self.charge, self.ship = charge, ship


async def failed(handle: Any, error: type[BaseException] = ValueError) -> None:
    with pytest.raises(error):
        await handle.result(timeout=SOON)


# --- after a failure -----------------------------------------------------------------------------------------------


async def test_only_what_it_failed_from_runs_again(app: App, sql: Sql) -> None:
    shop = Shop(attempts=3)
    seen: list[Any] = []

    @app.workflow
    async def flow(order: int) -> list[str]:
        seen.append((now(), random().random()))
        return [await shop.charge(order), await shop.ship(order), await shop.charge(order)]

    async with app.worker():
        handle = await app.start(flow(7))
        await failed(handle)
        assert shop.did == ["charge", "ship", "ship", "ship"]
        shop.is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["payment 7", "parcel 7", "payment 7"]
    assert shop.did == ["charge", *["ship"] * 4, "charge"]
    assert seen[0] == seen[1], "what was recorded before is served"
    assert [each.attempts for each in await handle.steps() if each.name == "ship"] == [1], "attempts start anew"
    assert history(sql) == ["$result", "ship", "ship#a1", "ship#a2"]
    assert rows_left(sql) == ([], [])


async def test_it_may_be_resumed_as_often_as_it_fails_and_all_of_it_is_kept(app: App, sql: Sql) -> None:
    shop = Shop()

    @app.workflow
    async def flow() -> str:
        return await shop.ship(1)

    async with app.worker():
        handle = await app.start(flow())
        await failed(handle)
        for _ in range(3):
            await handle.resume()
            await failed(handle)
        shop.is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "parcel 1"
    assert history(sql) == ["$result"] * 4 + ["ship"] * 4
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'history' AND payload::text LIKE '%%no truck%%'") == [
        (8,)
    ]
    assert (await handle.describe()).epoch == 5


async def test_a_failure_of_its_own_code_is_repaired_by_new_code(app: App, sql: Sql) -> None:
    shop = Shop()
    is_broken = True

    @app.workflow
    async def flow() -> str:
        payment = await shop.charge(1)
        if is_broken:
            raise KeyError("a bug")
        return payment

    async with app.worker():
        handle = await app.start(flow())
        await failed(handle, KeyError)
        is_broken = False
        await handle.resume()
        assert await handle.result(timeout=SOON) == "payment 1"
    assert shop.did == ["charge"]


async def test_of_steps_side_by_side_only_those_that_failed_run_again(app: App, sql: Sql) -> None:
    did: list[str] = []
    is_repaired = False

    @step
    async def work(name: str, *, fails: bool) -> str:
        did.append(name)
        if fails and not is_repaired:
            raise ValueError(name)
        return name

    @app.workflow
    async def flow() -> list[str]:
        outcomes = await asyncio.gather(*(work(name, fails=name in "bd") for name in "abcd"), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if errors:
            raise ExceptionGroup("some failed", errors)
        return [str(outcome) for outcome in outcomes]

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(Exception, match="some failed"):
            await handle.result(timeout=SOON)
        assert sorted(did) == ["a", "b", "c", "d"]
        is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["a", "b", "c", "d"]
    assert sorted(did) == ["a", "b", "b", "c", "d", "d"]


async def test_a_failure_that_the_code_has_dealt_with_stays_as_it_is(app: App, sql: Sql) -> None:
    shop, second = Shop(), Shop()

    @app.workflow
    async def flow() -> str:
        try:
            await shop.ship(1)
        except ValueError:
            await shop.charge(2)
        await sleep(timedelta(0))
        return await second.ship(3)

    async with app.worker():
        handle = await app.start(flow())
        await failed(handle)
        shop.is_repaired = second.is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "parcel 3"
    assert shop.did == ["ship", "charge"]
    assert second.did == ["ship", "ship"]
    assert history(sql) == ["$result", "ship#2"]


async def test_attempts_of_the_whole_workflow_start_anew(app: App, sql: Sql, events: Any) -> None:
    tries: list[int] = []

    @app.workflow(retry=Retry(max_attempts=2, initial=timedelta(0)))
    async def flow() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise ValueError("not yet")
        return len(tries)

    async with app.worker():
        handle = await app.start(flow())
        await failed(handle)
        assert len(tries) == 2
        await handle.resume()
        assert await handle.result(timeout=SOON) == 4


async def test_a_mismatch_that_was_repaired_goes_on(app: App, sql: Sql) -> None:
    gate, shop = Gate(), Shop()
    is_edited = False

    @app.workflow
    async def flow() -> str:
        payment = await shop.charge(2 if is_edited else 1)
        await hold(gate)
        return payment

    async with interrupted(app, flow(), gate) as handle:
        is_edited = True
    async with app.worker():
        await failed(handle, ReplayMismatch)
        is_edited = False
        await handle.resume()
        assert await handle.result(timeout=SOON) == "payment 1"
    assert shop.did == ["charge"]
    assert history(sql) == ["$result"]


async def test_many_are_resumed_by_a_filter_after_a_dry_run(app: App, sql: Sql) -> None:
    shop = Shop()

    @app.workflow
    async def flow(number: int) -> str:
        return await shop.ship(number)

    async with app.worker():
        handles = await app.start_many([Start(flow(number), attributes={"odd": number % 2}) for number in range(10)])
        for handle in handles:
            await failed(handle)
        odd = {handle.id for handle in handles[1::2]}
        shop.is_repaired = True
        assert set(await app.resume_many(attributes={"odd": 1}, dry_run=True)) == odd
        assert sql("SELECT DISTINCT status FROM workflows") == [("error",)]
        assert set(await app.resume_many(attributes={"odd": 1})) == odd
        for handle in handles[1::2]:
            await handle.result(timeout=SOON)
    assert sql("SELECT status, count(*) FROM workflows GROUP BY 1 ORDER BY 1") == [("error", 5), ("success", 5)]


# --- after a cancellation ------------------------------------------------------------------------------------------


async def test_what_was_cancelled_goes_on_where_it_was(app: App, sql: Sql, events: Any) -> None:
    shop = Shop()

    @app.workflow
    async def flow() -> list[str]:
        first = await shop.charge(1)
        await sleep(A_WHILE)
        return [first, await shop.charge(2)]

    async with dozing(app):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel()
        await failed(handle, WorkflowCancelled)
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["payment 1", "payment 2"]
    assert shop.did == ["charge", "charge"]
    assert history(sql) == ["$cancel", "$cancelled", "$result"]


async def test_what_was_resumed_can_be_cancelled_again(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> None:
        await hold(gate)

    async with app.worker():
        handle = await app.start(flow())
        for number in (1, 2, 3):
            await gate.reached(number)
            await handle.cancel(reason=f"number {number}")
            with pytest.raises(WorkflowCancelled, match=f"number {number}"):
                await handle.result(timeout=SOON)
            await handle.resume()
        await gate.reached(4)
        gate.open()
        await handle.result(timeout=SOON)
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'history'") == [(9,)]


async def test_what_was_cancelled_before_it_ran_begins(app: App, sql: Sql) -> None:
    shop = Shop()

    @app.workflow
    async def flow(order: int) -> str:
        return await shop.charge(order)

    handle = await app.start(flow(5))
    await handle.cancel()
    await handle.resume()
    assert await handle.status() is Status.PENDING
    assert await served(app, handle) == "payment 5"


async def test_what_was_terminated_goes_on(app: App, sql: Sql) -> None:
    gate, shop = Gate(), Shop()

    @app.workflow
    async def flow() -> str:
        payment = await shop.charge(1)
        await hold(gate)
        return payment

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.terminate()
        await failed(handle, WorkflowCancelled)
        await handle.resume()
        await gate.reached(2)
        gate.open()
        assert await handle.result(timeout=SOON) == "payment 1"
    assert shop.did == ["charge"]


# --- parked steps --------------------------------------------------------------------------------------------------


async def test_a_step_that_parks_waits_for_an_operator(app: App, sql: Sql, events: Any) -> None:
    shop = Shop(on_exhausted="park", attempts=2)
    seen: list[str] = []

    @app.workflow
    async def flow() -> str:
        try:
            return await shop.ship(1)
        except Exception as error:
            seen.append(repr(error))
            raise

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.StepParked)
        await events.wait_for(telemetry.WorkflowSuspended)
        found = await handle.describe()
        assert (found.status, found.waiting_for, found.wake_at) == (Status.WAITING, "operator", None)
        (parked,) = [each for each in await handle.steps() if each.status == "parked"]
        assert (parked.name, parked.status, parked.attempts) == ("ship", "parked", 2)
        assert "no truck" in str(parked.error)
        shop.is_repaired = True
        await handle.resume()
        assert await handle.result(timeout=SOON) == "parcel 1"
    assert shop.did == ["ship"] * 3
    assert seen == [], "its code sees no failure"
    assert [each.attempts for each in await handle.steps()] == [1]
    assert history(sql) == ["ship#a1", "ship#a2"]
    assert rows_left(sql) == ([], [])


async def test_a_parked_step_may_park_again(app: App, events: Any) -> None:
    shop = Shop(on_exhausted="park", attempts=2)

    @app.workflow
    async def flow() -> str:
        return await shop.ship(1)

    def parked_by(epoch: int) -> Callable[[Any], bool]:
        return lambda event: len(events.of(telemetry.WorkflowSuspended)) >= epoch

    async with app.worker():
        handle = await app.start(flow())
        for times in (1, 2, 3):
            await events.wait_for(telemetry.WorkflowSuspended, parked_by(times))
            assert shop.did == ["ship"] * 2 * times, "attempts start anew each time"
            shop.is_repaired = times == 3
            await handle.resume()
        assert await handle.result(timeout=SOON) == "parcel 1"


async def test_parked_workflows_are_resumed_by_a_filter(app: App, events: Any) -> None:
    shop = Shop(on_exhausted="park")

    @app.workflow
    async def flow(number: int) -> str:
        return await shop.ship(number)

    @app.workflow
    async def sleeper() -> None:
        await sleep(HOUR)

    async with app.worker():
        handles = [await app.start(flow(number)) for number in range(3)]
        asleep = await app.start(sleeper())
        await events.wait_for(telemetry.WorkflowSuspended, lambda _: len(events.of(telemetry.WorkflowSuspended)) == 4)
        shop.is_repaired = True
        done = await app.resume_many(status=Status.WAITING)
        assert set(done) == {handle.id for handle in handles}
        for number, handle in enumerate(handles):
            assert await handle.result(timeout=SOON) == f"parcel {number}"
        assert await asleep.status() is Status.WAITING


# --- where there is nothing to resume ------------------------------------------------------------------------------


async def test_what_has_succeeded_cannot_be_resumed(app: App) -> None:
    @app.workflow
    async def flow() -> None: ...

    handle = await app.start(flow())
    await served(app, handle)
    with pytest.raises(WrongState, match="has succeeded"):
        await handle.resume()


async def test_what_runs_or_waits_for_something_else_cannot_be_resumed(app: App, sql: Sql, events: Any) -> None:
    gate = Gate()

    @app.workflow
    async def running() -> None:
        await hold(gate)

    @app.workflow
    async def waiting() -> None:
        await sleep(HOUR)

    pending = await app.start(running(), queue="nobody")
    async with app.worker(queues=["default"]):
        runs, sleeps = await app.start(running()), await app.start(waiting())
        await gate.reached()
        await events.wait_for(telemetry.WorkflowSuspended)
        before = sql("SELECT * FROM waits"), sql("SELECT workflow_id, epoch, wakes FROM queue_entries ORDER BY 1")
        for handle, status in ((runs, "running"), (sleeps, "waiting"), (pending, "pending")):
            with pytest.raises(WrongState) as caught:
                await handle.resume()
            assert caught.value.status == status
        after = sql("SELECT * FROM waits"), sql("SELECT workflow_id, epoch, wakes FROM queue_entries ORDER BY 1")
        assert before == after
        gate.open()
        await runs.result(timeout=SOON)


@pytest.mark.parametrize("what", ["failed", "parked"])
async def test_of_many_who_resume_at_the_same_time_one_does(app: App, sql: Sql, events: Any, what: str) -> None:
    shop = Shop(on_exhausted="park" if what == "parked" else "fail")

    @app.workflow
    async def flow() -> str:
        return await shop.ship(1)

    async with app.worker():
        handle = await app.start(flow())
        if what == "parked":
            await events.wait_for(telemetry.WorkflowSuspended)
        else:
            await failed(handle)
    outcomes = await asyncio.gather(*(handle.resume() for _ in range(8)), return_exceptions=True)
    assert outcomes.count(None) == 1
    assert {type(outcome) for outcome in outcomes if outcome is not None} == {WrongState}
    assert sql("SELECT count(*) FROM queue_entries") == [(1,)]
    shop.is_repaired = True
    assert await served(app, handle) == "parcel 1"
    assert shop.did == ["ship", "ship"]


async def test_resuming_twice_is_refused_the_second_time(app: App) -> None:
    shop = Shop()

    @app.workflow
    async def flow() -> str:
        return await shop.ship(1)

    handle = await app.start(flow())
    async with app.worker():
        await failed(handle)
    await handle.resume()
    with pytest.raises(WrongState, match="pending already"):
        await handle.resume()
