"""Cancelling and terminating: what a workflow's code sees of it, and what it may still do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from acceptance.support import A_WHILE, AT_ONCE, SOON, Gate, dozing, hold, interrupted, served
from perdure import (
    App,
    Retry,
    Start,
    Status,
    WorkflowCancelled,
    WorkflowNotFound,
    WrongState,
    current,
    sleep,
    step,
    telemetry,
    timeout,
)

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]


def rows_left(sql: Sql) -> tuple[list[Any], list[Any]]:
    return sql("SELECT * FROM queue_entries"), sql("SELECT * FROM waits")


def recorded(sql: Sql, id: Any) -> list[str]:
    """The keys of what the code was told, in that order."""
    kinds = "'step', 'value', 'sleep', 'cancel'"
    query = f"SELECT key FROM checkpoints WHERE workflow_id = %s AND kind IN ({kinds}) ORDER BY position"
    return [key for (key,) in sql(query, id)]


class Diary:
    """Steps that write down what they do, as `do` or `undo`."""

    def __init__(self) -> None:
        self.did: list[str] = []

        @step
        async def do(what: str) -> str:
            self.did.append(f"do {what}")
            return what

        @step
        async def undo(what: str) -> str:
            self.did.append(f"undo {what}")
            return what

        self.do, self.undo = do, undo


async def cancelled(handle: Any, reason: str = "") -> None:
    with pytest.raises(WorkflowCancelled, match=reason or None):
        await handle.result(timeout=SOON)
    assert await handle.status() is Status.CANCELLED


# --- where it finds the workflow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, HOUR], ids=["pending", "delayed"])
async def test_what_never_ran_is_cancelled_at_once(app: App, sql: Sql, delay: timedelta | None) -> None:
    ran: list[int] = []

    @app.workflow
    async def flow() -> None:
        ran.append(1)

    @app.workflow
    async def other() -> None: ...

    handle = await app.start(flow(), delay=delay)
    await handle.cancel(reason="not needed")
    await cancelled(handle, "not needed")
    assert rows_left(sql) == ([], [])
    async with app.worker():
        await app.run(other())
    assert ran == []
    assert (await handle.describe()).started_at is None


async def test_a_running_step_gets_the_cancellation_at_its_await_and_then_the_workflow(app: App, sql: Sql) -> None:
    gate = Gate()
    seen: list[str] = []

    @step
    async def work() -> None:
        try:
            await gate.passed()
        except asyncio.CancelledError:
            seen.append("step")
            raise

    @app.workflow
    async def flow() -> None:
        try:
            await work()
        except asyncio.CancelledError:
            seen.append("workflow")
            raise

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        await cancelled(handle)
    assert seen == ["step", "workflow"]
    assert recorded(sql, handle.id) == ["$cancelled"]
    assert rows_left(sql) == ([], [])


async def test_a_plain_step_is_left_behind_in_its_thread(app: App, sql: Sql) -> None:
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    @step
    def work() -> str:
        begun.set()
        release.wait(SOON.total_seconds())
        ended.set()
        return "late"

    @app.workflow
    async def flow() -> str:
        return await work()

    async with app.worker():
        handle = await app.start(flow())
        await asyncio.to_thread(begun.wait, SOON.total_seconds())
        await handle.cancel()
        await cancelled(handle)
        assert not ended.is_set()
        release.set()
        await asyncio.to_thread(ended.wait, SOON.total_seconds())
    assert recorded(sql, handle.id) == ["$cancelled"]


@pytest.mark.parametrize("how", ["gather", "group", "wait"])
async def test_steps_side_by_side_are_cancelled_together(app: App, sql: Sql, how: str) -> None:
    gate = Gate()
    stopped: list[str] = []

    @step
    async def work(name: str) -> None:
        try:
            await gate.passed()
        except asyncio.CancelledError:
            stopped.append(name)
            raise

    @app.workflow
    async def flow() -> None:
        if how == "gather":
            await asyncio.gather(work("a"), work("b"))
        elif how == "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(work("a"))
                group.create_task(work("b"))
        else:
            tasks = [asyncio.ensure_future(work("a")), asyncio.ensure_future(work("b"))]
            await asyncio.wait(tasks)

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached(2)
        await handle.cancel()
        await cancelled(handle)
    if how != "wait":  # whose tasks outlive the workflow, and are unwound
        assert sorted(stopped) == ["a", "b"]
    assert recorded(sql, handle.id) == ["$cancelled"]


async def test_a_workflow_that_sleeps_in_the_database_wakes_to_be_cancelled(app: App, sql: Sql, events: Any) -> None:
    diary = Diary()

    @app.workflow
    async def flow() -> None:
        await diary.do("a")
        try:
            await sleep(HOUR)
        finally:
            await diary.undo("a")

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel(reason="changed my mind")
        await cancelled(handle, "changed my mind")
    assert diary.did == ["do a", "undo a"]
    assert recorded(sql, handle.id) == ["do", "$cancelled", "undo"]
    assert rows_left(sql) == ([], [])


async def test_a_workflow_that_sleeps_in_memory_is_cancelled(app: App, events: Any) -> None:
    began = asyncio.Event()

    @app.workflow
    async def flow() -> None:
        began.set()
        await sleep(timedelta(seconds=0.9))

    async with app.worker():
        handle = await app.start(flow())
        await began.wait()
        await handle.cancel()
        await cancelled(handle)
    assert events.of(telemetry.WorkflowSuspended) == []


async def test_a_workflow_whose_worker_is_gone_is_told_by_the_next_one(app: App, sql: Sql) -> None:
    diary, gate = Diary(), Gate()

    @app.workflow
    async def flow() -> None:
        await diary.do("a")
        try:
            await hold(gate)
            await diary.do("b")
        except asyncio.CancelledError:
            await diary.undo("a")
            raise

    async with interrupted(app, flow(), gate) as handle:
        await handle.cancel()
        assert await handle.status() is Status.PENDING
    async with app.worker():
        await cancelled(handle)
    assert diary.did == ["do a", "undo a"]
    assert gate.arrivals == 1, "no step begins before its code is told"
    assert recorded(sql, handle.id) == ["do", "$cancelled", "undo"]


async def test_a_pause_between_attempts_at_a_step_is_cut_short(app: App, sql: Sql, events: Any) -> None:
    tries: list[int] = []

    @step(retry=Retry(max_attempts=5, initial=HOUR))
    async def work() -> None:
        tries.append(1)
        raise ValueError("not yet")

    @app.workflow
    async def flow() -> None:
        await work()

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        assert (await handle.describe()).waiting_for == "retry"
        await handle.cancel()
        await cancelled(handle)
    assert tries == [1]


async def test_a_parked_step_is_given_up(app: App, sql: Sql, events: Any) -> None:
    @step(on_exhausted="park")
    async def work() -> None:
        raise ValueError("broken")

    @app.workflow
    async def flow() -> None:
        await work()

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        assert (await handle.describe()).waiting_for == "operator"
        await handle.cancel()
        await cancelled(handle)
    assert rows_left(sql) == ([], [])


async def test_a_workflow_that_would_be_tried_again_is_not(app: App, events: Any) -> None:
    tries: list[int] = []

    @app.workflow(retry=Retry(max_attempts=5, initial=HOUR))
    async def flow() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")
        await sleep(HOUR)

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel()
        await cancelled(handle)
    assert len(tries) == 2, "its code is told"


async def test_a_workflow_may_be_cancelled_by_a_step_of_its_own(app: App) -> None:
    gate = Gate()

    @step
    async def give_up() -> None:
        await app.handle(current().id).cancel(reason="by itself")
        await gate.passed()

    @app.workflow
    async def flow() -> None:
        await give_up()

    async with app.worker():
        await cancelled(await app.start(flow()), "by itself")


# --- what its code makes of it -------------------------------------------------------------------------------------


async def test_compensations_run_and_are_recorded(app: App, sql: Sql) -> None:
    diary, gate = Diary(), Gate()

    @app.workflow
    async def flow() -> None:
        done: list[str] = []
        try:
            done += [await diary.do(what) for what in "abc"]
            await hold(gate)
        except asyncio.CancelledError:
            for what in reversed(done):
                await diary.undo(what)
            raise

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        await cancelled(handle)
    assert diary.did == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert recorded(sql, handle.id) == ["do", "do#2", "do#3", "$cancelled", "undo", "undo#2", "undo#3"]


async def test_a_compensation_may_sleep_and_leave_memory(app: App, sql: Sql, events: Any) -> None:
    diary, gate = Diary(), Gate()
    told: list[int] = []

    @app.workflow
    async def flow() -> None:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            told.append(1)
            await sleep(A_WHILE)
            await diary.undo("a")
            raise

    async with dozing(app):
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel(reason="enough")
        await events.wait_for(telemetry.WorkflowSuspended)
        assert await handle.status() is Status.WAITING
        await cancelled(handle, "enough")
    assert diary.did == ["undo a"]
    assert told == [1, 1], "once in each run"
    assert recorded(sql, handle.id) == ["$cancelled", "sleep()", "undo"]


@pytest.mark.parametrize("end", ["handed over", "lost"])
async def test_a_worker_that_goes_in_the_middle_of_a_compensation_leaves_the_next_one_on_the_same_path(
    app: App, sql: Sql, clock: Any, events: Any, end: str
) -> None:
    diary, working, compensating = Diary(), Gate(), Gate()
    paths: list[list[str]] = []

    @app.workflow
    async def flow() -> None:
        path: list[str] = []
        paths.append(path)
        try:
            path.append(await diary.do("a"))
            async with asyncio.TaskGroup() as group:
                group.create_task(hold(working))
                group.create_task(more(path))
            path.append("not cancelled")
        except asyncio.CancelledError:
            path.append("cancelled")
            path.append(await diary.undo("b"))
            await hold(compensating)
            path.append(await diary.undo("a"))
            raise

    async def more(path: list[str]) -> None:
        try:
            path.append(await diary.do("b"))
            await hold(working)
        finally:
            path.append("more ends")

    async with app.worker(grace=AT_ONCE, lease=timedelta(seconds=4)):
        handle = await app.start(flow())
        await working.reached(2)
        await handle.cancel()
        await compensating.reached()
        if end == "lost":
            clock.advance(60)
            await events.wait_for(telemetry.RunAbandoned)
            await compensating.reached(2)
    compensating.open()
    async with app.worker():
        await cancelled(handle)
    expected = ["a", "b", "more ends", "cancelled", "b", "a"]
    assert paths[-1] == expected
    assert all(path == expected[: len(path)] for path in paths)
    assert diary.did == ["do a", "do b", "undo b", "undo a"]
    assert recorded(sql, handle.id).count("$cancelled") == 1


async def test_what_came_after_it_comes_after_it_on_a_replay(app: App, sql: Sql) -> None:
    """A task that isn't cancelled goes on beside the compensation: the order of both is the same again."""
    working, beside, after = Gate(), Gate(), Gate()
    paths: list[list[str]] = []

    @app.workflow
    async def flow() -> list[str]:
        path: list[str] = []
        paths.append(path)

        async def independent() -> None:
            await hold(beside)
            path.append("beside it")

        task = asyncio.create_task(independent())
        try:
            await hold(working)
        except asyncio.CancelledError:
            path.append("cancelled")
            await task
            await hold(after)
        return path

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await working.reached()
        await beside.reached()
        await handle.cancel()
        while paths != [["cancelled"]]:
            await handle.status()  # a round trip
        beside.open()
        await after.reached()
    after.open()
    assert await served(app, handle) == ["cancelled", "beside it"]
    assert paths[-1] == ["cancelled", "beside it"]
    assert [key.rpartition("/")[2] for key in recorded(sql, handle.id)] == ["$cancelled", "hold", "hold#2"]


async def test_a_function_that_swallows_it_and_returns_has_succeeded(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> str:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            return "saved what there was"
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        assert await handle.result(timeout=SOON) == "saved what there was"
    assert await handle.status() is Status.SUCCESS
    with pytest.raises(WrongState, match="success"):
        await handle.cancel()


async def test_a_cancellation_that_comes_after_a_limit_of_time_is_no_timeout(app: App) -> None:
    """The block is on its way out already when the workflow is cancelled: the cancellation goes on."""
    working, leaving = Gate(), Gate()

    @app.workflow
    async def flow() -> str:
        try:
            async with timeout(timedelta(milliseconds=50)):
                try:
                    await hold(working)
                finally:
                    await hold(leaving)
        except TimeoutError:
            return "late"
        return "in time"

    async with app.worker():
        handle = await app.start(flow())
        await leaving.reached()
        await handle.cancel()
        await cancelled(handle)


async def test_a_compensation_that_fails_is_the_error(app: App) -> None:
    gate = Gate()

    @step
    async def undo() -> None:
        raise ValueError("no way back")

    @app.workflow
    async def flow() -> None:
        try:
            await hold(gate)
        finally:
            await undo()

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        with pytest.raises(ValueError, match="no way back"):
            await handle.result(timeout=SOON)
    assert await handle.status() is Status.ERROR


async def test_a_workflow_that_never_gives_up_goes_on_until_it_is_terminated(app: App, sql: Sql, events: Any) -> None:
    told: list[int] = []

    @step
    async def tick(number: int) -> int:
        return number

    @app.workflow
    async def flow() -> None:
        number = 0
        while True:
            try:
                number = await tick(number + 1)
                await sleep(timedelta(milliseconds=10))
            except asyncio.CancelledError:
                told.append(number)

    def is_tick(event: telemetry.StepEnded) -> bool:
        return bool(told) and int(event.key.partition("#")[2] or 1) > told[0] + 3

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.StepEnded, lambda event: event.key == "tick#2")
        await handle.cancel()
        await events.wait_for(telemetry.StepEnded, is_tick)
        assert await handle.status() is Status.RUNNING
        await handle.terminate(reason="that's it")
        await cancelled(handle, "that's it")
        await events.wait_for(telemetry.RunAbandoned)
    assert len(told) == 2, "told once, and unwound once when it was terminated"
    assert rows_left(sql) == ([], [])


@pytest.mark.parametrize("body", ["swallows it", "makes an error of it"])
async def test_what_the_body_of_a_step_makes_of_it_does_not_keep_it_from_the_workflow(
    app: App, sql: Sql, body: str
) -> None:
    """The same path on the first run and on a replay: the cancellation comes first in the order of delivery."""
    working, after = Gate(), Gate()
    paths: list[str] = []

    @step(retry=Retry(max_attempts=3, initial=timedelta(0)))
    async def work() -> str:
        try:
            await working.passed()
        except asyncio.CancelledError:
            if body == "swallows it":
                return "partial"
            raise ValueError("interrupted") from None
        return "done"

    @app.workflow
    async def flow() -> str:
        try:
            path = await work()
        except asyncio.CancelledError:
            path = "cancelled"
        except ValueError:
            path = "error"
        paths.append(path)
        await hold(after)
        return path

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await working.reached()
        await handle.cancel()
        await after.reached()
    after.open()
    assert await served(app, handle) == "cancelled"
    assert paths == ["cancelled", "cancelled"]
    assert working.arrivals == 1
    assert recorded(sql, handle.id) == ["$cancelled", "hold"]


async def test_a_compensation_whose_body_is_cancelled_by_its_own_library_has_failed(app: App, sql: Sql) -> None:
    """CancelledError out of a body, though nobody cancels the workflow once more: a failure of that step."""
    gate = Gate()

    @step
    async def undo() -> None:
        raise asyncio.CancelledError("of a library")

    @app.workflow
    async def flow() -> str:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            try:
                await undo()
            except BaseException as error:
                return type(error).__name__
        return "?"

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        assert await handle.result(timeout=SOON) == "StepFailed"
    assert recorded(sql, handle.id) == ["$cancelled", "undo"]


# --- more than once, too late, nothing there -----------------------------------------------------------------------


async def test_cancelling_twice_is_the_same_as_once(app: App, sql: Sql) -> None:
    gate = Gate()
    told: list[int] = []

    @app.workflow
    async def flow() -> None:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            told.append(1)
            raise

    async with interrupted(app, flow(), gate) as handle:
        await asyncio.gather(*(handle.cancel(reason=f"number {number}") for number in range(5)))
    async with app.worker():
        await cancelled(handle, "number")
    await handle.cancel()
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'cancel'") == [(1,)]
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'request'") == [(5,)]
    assert sql("SELECT count(*) FROM checkpoints WHERE key = '$cancel'") == [(1,)]
    assert sum(told) == 2, "once by the cancellation; the run before was unwound"


async def test_a_second_cancellation_leaves_the_compensation_alone_and_is_recorded(
    app: App, sql: Sql, events: Any
) -> None:
    working, compensating = Gate(), Gate()
    told: list[list[str]] = []

    @app.workflow
    async def flow() -> None:
        told.append([])
        try:
            await hold(working)
        except asyncio.CancelledError as first:
            told[-1].append("first")
            try:
                await hold(compensating)
                await sleep(A_WHILE)
            except asyncio.CancelledError:
                told[-1].append("second, or unwound")
                raise
            raise first

    async with dozing(app):
        handle = await app.start(flow())
        await working.reached()
        await handle.cancel(reason="first")
        await compensating.reached()
        await handle.cancel(reason="second")
        assert sql("SELECT wakes FROM queue_entries") == [(2,)]
        compensating.open()
        await events.wait_for(telemetry.WorkflowSuspended)
        await handle.cancel(reason="third, while it sleeps")
        with pytest.raises(WorkflowCancelled, match="first"):
            await handle.result(timeout=SOON)
    assert told[-1] == ["first"]
    reasons = sql("SELECT payload ->> 'reason' FROM checkpoints WHERE kind = 'request' ORDER BY created_at")
    assert reasons == [("first",), ("second",), ("third, while it sleeps",)]


@pytest.mark.parametrize("verb", ["cancel", "terminate"])
@pytest.mark.parametrize("end", ["success", "error"])
async def test_what_has_ended_by_itself_can_be_neither_cancelled_nor_terminated(app: App, verb: str, end: str) -> None:
    @app.workflow
    async def flow() -> None:
        if end == "error":
            raise ValueError("no")

    handle = await app.start(flow())
    async with app.worker():
        await asyncio.gather(handle.result(timeout=SOON), return_exceptions=True)
    with pytest.raises(WrongState) as caught:
        await getattr(handle, verb)()
    assert (caught.value.workflow_id, caught.value.status) == (handle.id, end)


@pytest.mark.parametrize("verb", ["cancel", "terminate", "resume"])
async def test_a_workflow_that_is_not_there_is_not_found(app: App, verb: str) -> None:
    with pytest.raises(WorkflowNotFound):
        await getattr(app.handle(uuid4()), verb)()


# --- terminating ---------------------------------------------------------------------------------------------------


async def test_the_worker_of_a_terminated_workflow_can_record_nothing_more_and_unwinds_its_code(
    app: App, sql: Sql, events: Any
) -> None:
    diary, gate = Diary(), Gate()
    seen: list[str] = []

    @step
    async def stubborn() -> str:
        try:
            await gate.passed()
        except asyncio.CancelledError:
            seen.append("step")
        return "too late"

    @app.workflow
    async def flow() -> str:
        await diary.do("a")
        try:
            return await stubborn()
        finally:
            seen.append("finally")
            await diary.undo("a")

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.terminate(reason="at once")
        await cancelled(handle, "at once")
        await events.wait_for(telemetry.RunAbandoned)
        await asyncio.sleep(0)
    assert seen == ["step", "finally"]
    assert diary.did == ["do a"]
    assert recorded(sql, handle.id) == ["do"]
    assert rows_left(sql) == ([], [])


async def test_a_workflow_that_waits_is_terminated_where_it_waits(app: App, sql: Sql, events: Any) -> None:
    ran: list[str] = []

    @app.workflow
    async def flow() -> None:
        try:
            await sleep(HOUR)
        finally:
            ran.append("finally")

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        await events.wait_for(telemetry.WorkflowClaimed)
        ran.clear()
        await handle.terminate()
        await cancelled(handle)
    assert ran == []
    assert rows_left(sql) == ([], [])


async def test_terminating_twice_is_the_same_as_once(app: App) -> None:
    @app.workflow
    async def flow() -> None: ...

    handle = await app.start(flow())
    await handle.terminate(reason="first")
    await handle.terminate(reason="second")
    await cancelled(handle, "first")


async def test_the_reason_is_shown(app: App) -> None:
    @app.workflow
    async def flow() -> None: ...

    handle = await app.start(flow())
    await handle.cancel(reason="the customer called")
    with pytest.raises(WorkflowCancelled) as caught:
        await handle.result()
    assert caught.value.message == "the customer called"
    assert "the customer called" in str(caught.value)
    assert "the customer called" in str((await handle.describe()).error)


# --- many at once --------------------------------------------------------------------------------------------------


async def test_many_are_cancelled_by_a_filter_after_a_dry_run(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow(number: int) -> None: ...

    @app.workflow
    async def other() -> None: ...

    mine = await app.start_many([Start(flow(number), attributes={"team": number % 2}) for number in range(450)])
    theirs = await app.start(other(), key="other-1")
    odd = [handle.id for number, handle in enumerate(mine) if number % 2]
    would = await app.cancel_many(name="flow", attributes={"team": 1}, dry_run=True)
    assert sorted(would) == sorted(odd)
    assert sql("SELECT DISTINCT status FROM workflows") == [("pending",)]
    done = await app.cancel_many(name="flow", attributes={"team": 1}, reason="all of them")
    assert sorted(done) == sorted(odd)
    assert sorted(id for (id,) in sql("SELECT id FROM workflows WHERE status = 'cancelled'")) == sorted(odd)
    assert sql("SELECT DISTINCT error ->> 'message' FROM workflows WHERE status = 'cancelled'")[0][0].endswith(
        "all of them"
    )
    assert await app.cancel_many(name="flow", attributes={"team": 1}) == []
    assert await app.cancel_many(key_prefix="other-") == [theirs.id]


async def test_many_are_cancelled_wherever_they_stand(app: App, sql: Sql, events: Any) -> None:
    gate = Gate()
    ended: list[str] = []

    @app.workflow
    async def running() -> None:
        await hold(gate)

    @app.workflow
    async def waiting() -> None:
        await sleep(HOUR)

    @app.workflow
    async def finished() -> None:
        ended.append("finished")

    async with app.worker():
        await app.run(finished())
        handles = [await app.start(running()), await app.start(waiting()), await app.start(waiting(), delay=HOUR)]
        await gate.reached()
        await events.wait_for(telemetry.WorkflowSuspended)
        assert await app.cancel_many(status=Status.RUNNING, dry_run=True) == [handles[0].id]
        assert set(await app.cancel_many(status=Status.WAITING, dry_run=True)) == {each.id for each in handles[1:]}
        done = await app.cancel_many(reason="closing time")
        assert set(done) == {handle.id for handle in handles}
        for handle in handles:
            await cancelled(handle, "closing time")
    assert rows_left(sql) == ([], [])


async def test_many_are_terminated_by_a_filter(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow() -> None: ...

    kept = await app.start(flow(), queue="kept")
    handles = [await app.start(flow(), queue="gone") for _ in range(3)]
    ids = {handle.id for handle in handles}
    assert set(await app.terminate_many(queue="gone", dry_run=True)) == ids
    assert await handles[0].status() is Status.PENDING
    assert set(await app.terminate_many(queue="gone", reason="gone")) == ids
    for handle in handles:
        await cancelled(handle, "gone")
    assert await kept.status() is Status.PENDING
