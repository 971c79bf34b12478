"""`continue_as_new`: workflows that begin again with an empty history; and attributes, changed from inside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

import perdure
from acceptance.support import SOON, Gate, hold, interrupted, served
from perdure import (
    App,
    InvalidArguments,
    Retry,
    SerializationError,
    WorkflowCancelled,
    WrongPlace,
    continue_as_new,
    recv,
    saga,
    set_attributes,
    set_event,
    sleep,
    step,
    telemetry,
)
from perdure.exchange import Exchange
from perdure.model.keys import CANCEL

Sql = Callable[..., list[Any]]


@step
async def work(number: int) -> int:
    return number


async def test_it_begins_again_with_other_arguments_and_an_empty_history(app: App, sql: Sql) -> None:
    @app.workflow
    async def counts(number: int, to: int) -> int:
        await work(number)
        if number < to:
            await continue_as_new(counts(number + 1, to))
        return number

    async with app.worker():
        handle = await app.start(counts(0, 10), key="the counter", attributes={"a": 1})
        assert await handle.result(timeout=SOON) == 10
    info = await handle.describe()
    assert (info.key, info.input, info.epoch) == ("the counter", {"number": 10, "to": 10}, 11)
    assert info.attributes == {"a": 1}
    assert [each.key for each in await handle.steps()] == ["work"]
    assert sql("SELECT key, payload #>> '{}' FROM checkpoints WHERE kind = 'runs'") == [("$runs", "11")]


async def test_messages_that_were_not_received_stay_and_received_ones_go(app: App, sql: Sql) -> None:
    @app.workflow
    async def collects(seen: list[int]) -> list[int]:
        seen = [*seen, await recv("numbers", type=int)]
        if len(seen) < 5:
            await set_event("seen", len(seen))
            await continue_as_new(collects(seen))
        return seen

    async with app.worker():
        handle = await app.start(collects([]))
        for number in range(6):
            await handle.send("numbers", number)
        assert await handle.result(timeout=SOON) == [0, 1, 2, 3, 4]
        assert await handle.get_event("seen") == 4
    assert sql("SELECT payload #>> '{}' FROM message_rows ORDER BY place") == [("4",), ("5",)]


async def test_a_crash_before_it_is_done_does_it_again(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def counts(number: int) -> int:
        await hold(gate)
        if number == 0:
            await continue_as_new(counts(1))
        return number

    async with interrupted(app, counts(0), gate) as handle:
        pass
    assert await served(app, handle) == 1


async def test_idempotency_keys_differ_from_run_to_run(app: App) -> None:
    keys: list[str] = []

    @step
    async def pay() -> None:
        keys.append(perdure.current().idempotency_key)
        await perdure.write_stream("paid", len(keys))

    @app.workflow
    async def pays(number: int) -> None:
        await pay()
        if number < 3:
            await continue_as_new(pays(number + 1))

    async with app.worker():
        handle = await app.start(pays(1))
        await handle.result(timeout=SOON)
        assert keys == [f"{handle.id}/pay", f"{handle.id}#2/pay", f"{handle.id}#3/pay"]
        assert [entry.value async for entry in handle.read_stream("paid")] == [1, 2, 3]


async def test_a_sleeper_that_loops_keeps_a_short_history(app: App, sql: Sql) -> None:
    @app.workflow
    async def polls(round: int) -> str:
        for _ in range(3):
            await sleep(timedelta(milliseconds=1))
        if round < 20:
            await continue_as_new(polls(round + 1))
        return "done"

    async with app.worker():
        handle = await app.start(polls(0))
        assert await handle.result(timeout=SOON) == "done"
    assert sql("SELECT count(*) FROM checkpoints") == [(9,)]  # input, result, how often, three sleeps and their timers


async def test_sagas_undo_nothing_and_other_tasks_end(app: App) -> None:
    undone: list[str] = []
    gate = Gate()

    @step
    async def undo() -> None:
        undone.append("undone")

    @app.workflow
    async def books(again: bool) -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(gate)) if again else None
            async with saga() as undoing:
                undoing.compensate(undo)
                if again:
                    await continue_as_new(books(False))
        return "booked"

    async with app.worker():
        assert await app.run(books(True)) == "booked"
        gate.open()
    assert undone == []


async def test_a_cancel_in_the_meantime_reaches_the_next_run(app: App, events: Any) -> None:
    @app.workflow
    async def loops(number: int) -> None:
        await work(number)
        await continue_as_new(loops(number + 1))

    async with app.worker():
        handle = await app.start(loops(0))
        await events.wait_for(telemetry.WorkflowContinued)
        await handle.cancel()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)


async def test_a_cancel_that_comes_behind_the_code_reaches_the_next_run(
    app: App, sql: Callable[..., list[Any]], database_url: str, schema: str
) -> None:
    """The code has ended, and what it recorded is being written."""
    gate = Gate()

    @step
    async def gated(number: int) -> None:
        if number == 0:
            await hold(gate)

    @app.workflow
    async def loops(number: int) -> None:
        await gated(number)
        await continue_as_new(loops(number + 1))

    said = json.dumps({"reason": "enough"})
    async with app.worker() as worker:
        handle = await app.start(loops(0))
        await gate.reached()
        run = worker.executor.runs[handle.id]
        sql(
            "INSERT INTO checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at) "
            "VALUES (1, %s, %s, 'request', 0, 'success', %s, now())", handle.id, CANCEL, said,
        )  # fmt: skip
        async with await psycopg.AsyncConnection.connect(database_url, options=f"-c search_path={schema}") as holder:
            await holder.execute("SELECT 1 FROM queue_entries FOR UPDATE")
            gate.open()
            while run._continuation is None:
                await asyncio.sleep(0)
            run.look(run.seen, {CANCEL: said}, (), frozenset(), ())
            for _ in range(20):  # in which it would be told
                await asyncio.sleep(0)
        with pytest.raises(WorkflowCancelled, match="enough"):
            await handle.result(timeout=SOON)


async def test_a_workflow_that_is_tried_again_begins_its_attempts_anew(app: App) -> None:
    runs: list[tuple[int, int]] = []

    @app.workflow(retry=Retry(max_attempts=2, initial=timedelta(milliseconds=1)))
    async def fails(number: int) -> str:
        runs.append((number, perdure.current().attempt))
        if perdure.current().attempt == 1:
            raise ConnectionError
        if number == 0:
            await continue_as_new(fails(1))
        return "done"

    async with app.worker():
        assert await app.run(fails(0)) == "done"
    assert runs == [(0, 1), (0, 2), (1, 1), (1, 2)]


async def test_what_cannot_be_continued(app: App) -> None:
    @app.workflow
    async def other() -> None: ...

    @app.workflow
    async def loops(how: str) -> None:
        if how == "other":
            await continue_as_new(other())
        elif how == "arguments":
            await continue_as_new(loops(1))  # type: ignore[arg-type]
        elif how == "task":
            await asyncio.create_task(continue_as_new(loops("end")))
        elif how == "step":
            await in_a_step()

    @step
    async def in_a_step() -> None:
        await continue_as_new(loops("end"))

    async with app.worker():
        with pytest.raises(WrongPlace, match="can't continue as 'other'"):
            await app.run(loops("other"))
        with pytest.raises(InvalidArguments):
            await app.run(loops("arguments"))
        with pytest.raises(WrongPlace, match="in a task of its own"):
            await app.run(loops("task"))
        with pytest.raises(perdure.NotInWorkflow):
            await app.run(loops("step"))


async def test_attributes_are_set_from_inside(app: App) -> None:
    @step
    async def tag() -> None:
        await set_attributes({"tagged": True})

    @app.workflow
    async def ship() -> None:
        await set_attributes({"stage": "packed", "weight": 2})
        await tag()
        await set_attributes({"stage": "sent"})

    @app.workflow
    async def wrong() -> None:
        await set_attributes([1])  # type: ignore[arg-type]

    async with app.worker():
        handle = await app.start(ship(), attributes={"customer": 7})
        await handle.result(timeout=SOON)
        with pytest.raises(SerializationError, match="use a dict"):
            await app.run(wrong())
    found = [each.id async for each in app.workflows(attributes={"stage": "sent"})]
    assert found == [handle.id]
    assert (await handle.describe()).attributes == {"customer": 7, "stage": "sent", "weight": 2, "tagged": True}


async def test_children_are_listed_by_their_parent(app: App) -> None:
    @app.workflow
    async def child(number: int) -> int:
        if number == 3:
            raise ValueError
        return number

    @app.workflow
    async def parent() -> None:
        await asyncio.gather(*(child(number) for number in range(4)), return_exceptions=True)

    async with app.worker():
        handle = await app.start(parent())
        await handle.result(timeout=SOON)
        other = await app.start(child(9))
        await other.result(timeout=SOON)
    found = [each.input["number"] async for each in app.workflows(parent=handle.id)]
    assert sorted(found) == [0, 1, 2, 3]
    failed = app.workflows(parent=handle.id, status=perdure.Status.ERROR)
    assert [each.input["number"] async for each in failed] == [3]
    assert len([each async for each in app.workflows(parent=handle.id, limit=2)]) == 2


async def test_what_the_database_refuses_for_a_moment_is_tried_again(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that isn't got in time, a password that is being changed: else it would run for ever, and do nothing."""
    refusals: list[Exception] = [psycopg.errors.LockNotAvailable("no"), perdure.ConfigurationError("no")]
    begin_anew = Exchange.begin_anew

    async def refused(self: Exchange, *args: Any, **options: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await begin_anew(self, *args, **options)

    monkeypatch.setattr(Exchange, "begin_anew", refused)

    @app.workflow
    async def counts(number: int) -> int:
        if number < 2:
            await perdure.continue_as_new(counts(number + 1))
        return number

    async with app.worker():
        assert await (await app.start(counts(0))).result(timeout=timedelta(seconds=15)) == 2
    assert not refusals
