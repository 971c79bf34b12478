"""What somebody has done to the database by hand: rows deleted or edited, a clock set back. Nothing is lost silently,
and the worker goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import SOON, Gate, hold, interrupted
from perdure import (
    App,
    RecoveryLimitExceeded,
    ReplayMismatch,
    Status,
    WorkflowCancelled,
    now,
    patched,
    random,
    sleep,
    step,
    telemetry,
    uuid4,
)

DAY = timedelta(days=1)
LEASE = timedelta(days=100)
Sql = Callable[..., list[Any]]


class Spoilt:
    """A workflow with one outcome of each kind, that was interrupted; and what became of it."""

    def __init__(self, app: App, sql: Sql) -> None:
        self._app = app
        self._sql = sql
        self.bodies: list[str] = []
        gate = self._gate = Gate()

        @step
        async def one(order: int) -> str:
            self.bodies.append("one")
            return f"order {order}"

        @step
        async def fails() -> None:
            self.bodies.append("fails")
            raise ValueError("no")

        @app.workflow
        async def flow(order: int) -> list[Any]:
            found: list[Any] = [await one(order)]
            found.append(now().year > 2000)
            found.append(0 <= random().random() < 1)
            found.append(uuid4().version)
            found.append(patched("path"))
            await sleep(timedelta(milliseconds=1))
            try:
                await fails()
            except Exception:
                found.append("failed")
            await hold(gate)
            return found

        @app.workflow
        async def healthy() -> str:
            return "healthy"

        self._flow, self._healthy = flow, healthy

    async def after(self, edit: str) -> Any:
        """How it ends after that: its result, or its error. Another workflow runs on the same worker."""
        async with interrupted(self._app, self._flow(7), self._gate) as handle:
            self.bodies.clear()
            assert self._sql(edit + " RETURNING 1"), "it must have an effect"
        async with self._app.worker():
            try:
                outcome: Any = await handle.result(timeout=SOON)
            except Exception as error:
                outcome = error
            assert await self._app.run(self._healthy()) == "healthy"
        assert await handle.status() in (Status.SUCCESS, Status.ERROR)
        assert self._sql("SELECT count(*) FROM queue_entries") == [(0,)]
        assert self._sql("SELECT count(*) FROM waits") == [(0,)]
        return outcome


DONE = ["order 7", True, True, 4, True, "failed"]


@pytest.fixture
def spoilt(app: App, sql: Sql) -> Spoilt:
    return Spoilt(app, sql)


# --- rows that are gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "runs_again"),
    [("one", ["one"]), ("fails", ["fails"]), ("now()", []), ("random()", []), ("uuid4()", []), ("patched(path)", [])],
)
async def test_an_outcome_that_was_deleted_is_made_again_and_all_else_is_served(
    spoilt: Spoilt, key: str, runs_again: list[str]
) -> None:
    outcome = await spoilt.after(f"DELETE FROM checkpoints WHERE key = '{key}'")
    expected = list(DONE)
    if key == "patched(path)":
        expected[4] = False  # as in a history of before the change
    assert outcome == expected
    assert spoilt.bodies == runs_again


@pytest.mark.parametrize("key", ["sleep()", "sleep()#t"])
async def test_a_wait_of_which_half_was_deleted_is_waited_for_again_or_served(spoilt: Spoilt, key: str) -> None:
    assert await spoilt.after(f"DELETE FROM checkpoints WHERE key = '{key}'") == DONE
    assert spoilt.bodies == []


async def test_all_outcomes_may_be_deleted(spoilt: Spoilt) -> None:
    assert await spoilt.after("DELETE FROM checkpoints WHERE kind <> 'input'") == DONE
    assert spoilt.bodies == ["one", "fails"]


async def test_a_workflow_whose_arguments_were_deleted_ends_in_an_error_that_says_so(spoilt: Spoilt) -> None:
    outcome = await spoilt.after("DELETE FROM checkpoints WHERE key = '$input'")
    assert type(outcome).__name__ == "InvalidArguments"
    assert "order" in str(outcome)


# --- rows that were edited -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", ["7", "[]", '{"a": 1}', "null"])
async def test_a_result_of_another_type_is_a_mismatch(spoilt: Spoilt, payload: str) -> None:
    outcome = await spoilt.after(f"UPDATE checkpoints SET payload = '{payload}' WHERE key = 'one'")
    assert isinstance(outcome, ReplayMismatch)
    assert "'one'" in str(outcome)
    assert spoilt.bodies == []


@pytest.mark.parametrize("kind", ["value", "sleep", "attempt", "history"])
@pytest.mark.parametrize("key", ["one", "now()", "sleep()"])
async def test_an_outcome_of_another_kind_ends_its_workflow_in_an_error(spoilt: Spoilt, key: str, kind: str) -> None:
    outcome = await spoilt.after(f"UPDATE checkpoints SET kind = '{kind}' WHERE key = '{key}'")
    if kind in ("attempt", "history"):  # where the code doesn't see it, it is still in the way of what is made again
        assert isinstance(outcome, RecoveryLimitExceeded)
    elif (key, kind) in (("now()", "value"), ("sleep()", "sleep")):
        assert outcome == DONE
    else:
        assert isinstance(outcome, ReplayMismatch)


@pytest.mark.parametrize(
    ("key", "payload"), [("now()", "5"), ("now()", '"soon"'), ("random()", "[1]"), ("uuid4()", '"x"')]
)
async def test_a_value_of_another_form_is_an_error_of_the_workflow(spoilt: Spoilt, key: str, payload: str) -> None:
    outcome = await spoilt.after(f"UPDATE checkpoints SET payload = '{payload}' WHERE key = '{key}'")
    assert isinstance(outcome, Exception)


@pytest.mark.parametrize("payload", ["3", "[]", "null", "{}", '{"type": 4, "args": "x", "steps": {}}'])
async def test_a_failure_that_nobody_can_read_is_still_a_failure(spoilt: Spoilt, payload: str) -> None:
    assert await spoilt.after(f"UPDATE checkpoints SET payload = '{payload}' WHERE key = 'fails'") == DONE
    assert spoilt.bodies == []


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE checkpoints SET position = 0 WHERE kind <> 'input'",
        "UPDATE checkpoints SET position = -position",
        "UPDATE checkpoints SET attempts = -5, args_hash = 0, version = NULL, worker_id = NULL, epoch = 99",
        "UPDATE checkpoints SET wake_at = '-infinity' WHERE kind = 'timer'",
        "UPDATE checkpoints SET wake_at = NULL WHERE kind = 'timer'",
        "UPDATE checkpoints SET payload = NULL WHERE kind IN ('sleep', 'timer')",
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at) "
        "SELECT 1, workflow_id, 'of nobody', 'step', 3, 'success', now() FROM checkpoints WHERE key = '$input'",
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at) "
        "SELECT 1, workflow_id, 'one#a7', 'attempt', 0, 'error', now() FROM checkpoints WHERE key = '$input'",
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, created_at) "
        "SELECT 1, workflow_id, 'strange', 'park', 0, 'error', now() FROM checkpoints WHERE key = '$input'",
    ],
)
async def test_what_a_replay_does_not_need_may_say_anything(spoilt: Spoilt, edit: str) -> None:
    assert await spoilt.after(edit) == DONE
    assert spoilt.bodies == []


async def test_a_position_behind_which_there_is_none_costs_its_own_workflow_only(spoilt: Spoilt) -> None:
    outcome = await spoilt.after("UPDATE checkpoints SET position = 2147483647 WHERE key = 'one'")
    assert isinstance(outcome, Exception)


@pytest.mark.parametrize("verb", ["resume", "rewind"])
@pytest.mark.parametrize("kind", ["step", "value", "history", "input"])
async def test_a_result_of_another_kind_is_set_aside_like_any_other(app: App, sql: Sql, verb: str, kind: str) -> None:
    repaired: list[bool] = []

    @step
    async def fragile() -> None:
        if not repaired:
            raise ValueError("no")

    @app.workflow
    async def flow() -> str:
        await fragile()
        return "done"

    handle = await app.start(flow())
    async with app.worker():
        with pytest.raises(ValueError, match="no"):
            await handle.result(timeout=SOON)
        sql(f"UPDATE checkpoints SET kind = '{kind}' WHERE key = '$result'")
        repaired.append(True)
        await (handle.resume() if verb == "resume" else app.rewind(handle.id))
        assert await handle.result(timeout=SOON) == "done"


async def test_a_time_that_is_no_datetime_stops_nothing(app: App, sql: Sql) -> None:
    """It is read with all that is claimed at the same time, and by whoever lists workflows."""

    @app.workflow
    async def flow(number: int) -> int:
        return number

    handles = [await app.start(flow(number)) for number in range(3)]
    first, last = handles[0].id, handles[2].id
    sql(
        "UPDATE queue_entries SET enqueued_at = '-infinity', started_at = '4713-01-01 BC' WHERE workflow_id = %s", first
    )
    sql("UPDATE queue_entries SET deadline = 'infinity', started_at = '294276-01-01' WHERE workflow_id = %s", last)
    sql("UPDATE workflow_rows SET created_at = 'infinity' WHERE id = %s", last)
    async with app.worker():
        assert [await handle.result(timeout=SOON) for handle in handles] == [0, 1, 2]
    assert {info.created_at.year for info in [await handle.describe() for handle in handles]} >= {9999}


@pytest.mark.parametrize("payload", ["7", "[]", "null", "{}", '{"by": 5, "reason": []}', '"$deadline"'])
async def test_a_request_to_end_may_say_anything(app: App, sql: Sql, payload: str) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> None:
        await hold(gate)

    async with interrupted(app, flow(), gate) as handle:
        await handle.cancel()
        sql("UPDATE checkpoints SET payload = %s WHERE key = '$cancel'", payload)
    async with app.worker():
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)


async def test_a_result_that_does_not_fit_its_annotation_is_said_to_whoever_asks(app: App, sql: Sql) -> None:
    @app.workflow
    async def flow() -> int:
        return 1

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result(timeout=SOON) == 1
        sql("""UPDATE checkpoints SET payload = '"one"' WHERE key = '$result'""")
        with pytest.raises(ReplayMismatch, match="annotation"):
            await app.handle(handle.id, int).result(timeout=SOON)


# --- a long history ------------------------------------------------------------------------------------------------


async def test_a_history_of_fifty_thousand_steps_is_replayed(app: App, sql: Sql) -> None:
    many = 50_000
    ran: list[int] = []

    @step(pure=True)
    async def work(number: int) -> int:
        ran.append(number)
        return number

    @app.workflow
    async def flow() -> int:
        total = 0
        for number in range(many + 2):
            total += await work(number)
        return total

    handle = await app.start(flow())
    sql(
        "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at, epoch) "
        "SELECT 1, %s, CASE WHEN n = 1 THEN 'work' ELSE 'work#' || n END, 'step', n, 'success', to_json(n - 1), "
        "now(), 1 FROM generate_series(1, %s) AS n",
        handle.id,
        many,
    )
    sql("UPDATE queue_entries SET epoch = 1")
    began = time.monotonic()
    async with app.worker():
        assert await handle.result(timeout=SOON) == sum(range(many + 2))
    assert ran == [many, many + 1]
    assert time.monotonic() - began < 15


# --- the clock -----------------------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_back_makes_no_sleep_early_and_forgets_none(
    app: App, sql: Sql, clock: Any, events: Any
) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep(2 * DAY)
        return "done"

    async with app.worker(lease=LEASE):
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowSuspended)
        before = await handle.describe()
        clock.advance(-86400)
        assert (await handle.describe()).wake_at == before.wake_at
        clock.advance(2 * 86400)
        assert await handle.status() is Status.WAITING, "by the clock one more day"
        clock.advance(86401)
        assert await handle.result(timeout=SOON) == "done"


async def test_a_clock_that_is_set_back_while_workflows_run_costs_no_lease_and_no_outcome(
    app: App, sql: Sql, clock: Any, events: Any
) -> None:
    gate = Gate()
    ran: list[str] = []

    @step
    async def work(what: str) -> str:
        ran.append(what)
        return what

    @app.workflow
    async def flow() -> list[str]:
        found = [await work("before")]
        await hold(gate)
        await sleep(timedelta(milliseconds=200))
        found.append(await work("after"))
        await sleep(timedelta(seconds=1.2))
        return found

    @app.workflow
    async def begun_later() -> float:
        before = now()
        await sleep(timedelta(milliseconds=200))
        return (now() - before).total_seconds()

    async with app.worker(lease=timedelta(seconds=2)) as worker:
        id = worker.worker_id
        handle = await app.start(flow())
        await gate.reached()
        beats = len(sql("SELECT 1 FROM worker_rows"))
        clock.advance(-86400)
        later = await app.start(begun_later())
        assert 0.2 <= await later.result(timeout=SOON) < 86400
        gate.open()
        assert await handle.result(timeout=SOON) == ["before", "after"]
        assert worker.worker_id == id
        assert len(sql("SELECT 1 FROM worker_rows")) == beats
    assert ran == ["before", "after"]
    assert events.of(telemetry.RunAbandoned) == []
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'sleep'") == [(3,)]


async def test_what_is_pending_when_the_clock_is_set_back_is_run(app: App, sql: Sql, clock: Any) -> None:
    @app.workflow
    async def flow() -> str:
        return "done"

    handles = [await app.start(flow()) for _ in range(3)]
    clock.advance(-86400)
    handles += [await app.start(flow()) for _ in range(3)]
    async with app.worker():
        for handle in handles:
            assert await handle.result(timeout=SOON) == "done"
