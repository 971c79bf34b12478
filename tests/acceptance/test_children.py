"""Child workflows: awaited, in the background, with options; what becomes of them when the parent ends early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

import perdure
from acceptance.support import AT_ONCE, SOON, Gate, hold, interrupted, replayed, served
from perdure import (
    App,
    Handle,
    Invocation,
    KeyConflict,
    ReplayMismatch,
    ResultTimeout,
    Retry,
    Start,
    Status,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WrongPlace,
    WrongState,
    sleep,
    step,
    telemetry,
)
from perdure.engine.children import Children

Sql = Callable[..., list[Any]]


class Declined(Exception):
    """What a child fails with, and no one knows by name."""


@step
async def double(number: int) -> int:
    return 2 * number


async def test_an_awaited_workflow_is_a_child_with_a_row_of_its_own(app: App, sql: Sql) -> None:
    @app.workflow
    async def child(number: int) -> int:
        return await double(number)

    @app.workflow
    async def parent(number: int) -> int:
        return 1 + await child(number)

    async with app.worker():
        handle = await app.start(parent(20))
        assert await handle.result(timeout=SOON) == 41
    assert sql("SELECT parent_id, output FROM workflows WHERE name = 'child'") == [(handle.id, 40)]
    assert [(each.key, each.kind, each.status, each.output) for each in await handle.steps()] == [
        ("child#c", "start", "success", str(sql("SELECT id FROM workflows WHERE name = 'child'")[0][0])),
        ("child", "child", "success", 40),
    ]


async def test_what_a_child_fails_with_is_raised_in_the_parent(app: App) -> None:
    @app.workflow
    async def unknown() -> None:
        raise Declined("no money")

    @app.workflow
    async def known() -> None:
        raise KeyError("sku")

    @app.workflow
    async def parent() -> list[str]:
        said: list[str] = []
        for invocation in (unknown(), known()):
            try:
                await invocation
            except (WorkflowFailed, KeyError) as error:
                said.append(f"{type(error).__name__} {getattr(error, 'message', error)}")
        return said

    async with app.worker():
        assert await app.run(parent()) == ["WorkflowFailed no money", "KeyError 'sku'"]


async def test_a_replay_starts_no_child_again_and_gets_the_same_result(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def child(number: int) -> int:
        return await double(number)

    @app.workflow
    async def parent() -> tuple[int, int]:
        first = await child(1)
        await hold(gate)
        return first, await child(2)

    assert await replayed(app, parent(), gate) == (2, 4)
    assert sql("SELECT count(*) FROM workflows WHERE name = 'child'") == [(2,)]


async def test_a_parent_leaves_memory_while_its_child_takes_long(app: App, events: Any) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> str:
        await hold(gate)
        return "done"

    @app.workflow
    async def parent() -> str:
        return await child()

    async with app.worker(concurrency=2):
        handle = await app.start(parent())
        suspended = await events.wait_for(telemetry.WorkflowSuspended)
        assert (suspended.workflow_id, suspended.waiting_for) == (handle.id, "child")
        info = await handle.describe()
        assert (info.status, info.waiting_for, info.wake_at) == (Status.WAITING, "child", None)
        gate.open()
        assert await handle.result(timeout=SOON) == "done"


async def test_parents_that_wait_take_no_slot(app: App) -> None:
    @app.workflow
    async def nested(depth: int) -> int:
        return 0 if depth == 0 else 1 + await nested(depth - 1)

    async with app.worker(concurrency=1):
        assert await asyncio.wait_for(app.run(nested(20)), 30) == 20


@pytest.mark.parametrize("children", [1, 2])
async def test_parents_that_go_on_wait_for_a_slot(app: App, children: int) -> None:
    born: list[int] = []
    all_born = asyncio.Event()
    running: set[int] = set()
    most = 0

    @step
    async def end_together(number: int) -> None:
        born.append(number)
        if len(born) == 5 * children:
            all_born.set()
        await all_born.wait()

    @step
    async def heavy(number: int) -> None:
        nonlocal most
        running.add(number)
        most = max(most, len(running))
        await asyncio.sleep(0.03)
        running.remove(number)

    @app.workflow(queue="apart")
    async def child(number: int) -> None:
        await end_together(number)

    @app.workflow
    async def parent(number: int) -> None:
        if children == 1:
            await child(number)
        else:
            await asyncio.gather(*(child(number) for _ in range(children)))
        await heavy(number)

    async with app.worker(queues=["apart"]), app.worker(queues=["default"], concurrency=1):
        handles = [await app.start(parent(number)) for number in range(5)]
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in handles))
    assert most == 1


async def test_a_child_may_run_on_another_worker(app: App, database_url: str, schema: str) -> None:
    there = App("there", database_url=database_url, schema=schema)

    @there.workflow
    async def child(number: int) -> int:
        return 2 * number

    @app.workflow
    async def parent() -> list[int]:
        return list(await asyncio.gather(*(app.run(Invocation("child", number), queue="gpu") for number in range(50))))

    async with there, there.worker(queues=["gpu"]), app.worker(queues=["default"]):
        assert await app.run(parent()) == [2 * number for number in range(50)]


async def test_a_child_that_ends_while_its_parent_has_no_worker_is_found_later(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow(queue="apart")
    async def child() -> str:
        return "done"

    @app.workflow
    async def parent() -> str:
        handle = await app.start(child())
        await hold(gate)
        return await handle.result()

    async with interrupted(app, parent(), gate) as handle, app.worker(queues=["apart"]):
        (child_id,) = (row[0] for row in sql("SELECT id FROM workflows WHERE name = 'child'"))
        await app.handle(child_id).result(timeout=SOON)
    assert await served(app, handle) == "done"
    assert sql("SELECT count(*) FROM outbox") == [(0,)]


async def test_fan_out_and_fan_in(app: App) -> None:
    @app.job
    async def square(number: int) -> int:
        return number * number

    @app.workflow
    async def gathers(count: int) -> int:
        return sum(await asyncio.gather(*(square(number) for number in range(count))))

    @app.workflow
    async def maps(count: int) -> int:
        return sum(await perdure.map(square, range(count), concurrency=7))

    @app.workflow
    async def completes(count: int) -> int:
        return sum([result async for result in perdure.as_completed([square(number) for number in range(count)])])

    @app.workflow
    async def groups(count: int) -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(square(number)) for number in range(count)]
        return sum(task.result() for task in tasks)

    async with app.worker(concurrency=10):
        for workflow in (gathers, maps, completes, groups):
            assert await app.run(workflow(60)) == sum(number * number for number in range(60)), workflow.name


async def test_children_with_options(app: App, sql: Sql) -> None:
    @app.workflow(version="7")
    async def child(number: int) -> int:
        return number

    @app.workflow
    async def parent() -> tuple[int, int, bool, list[int]]:
        options = {"queue": "eu", "priority": 3, "partition": "acme"}
        one = await app.run(child(1), queue="eu", priority=3, partition="acme", timeout=timedelta(hours=1))
        handle = await app.start(child(2), **options, attributes={"a": 1}, delay=timedelta(milliseconds=5))  # type: ignore[arg-type]
        many = await app.start_many([child(3), Start(child(4), priority=9)], queue="us")
        return one, await handle.result(), handle.started, [await each.result() for each in many]

    async with app.worker():
        assert await app.run(parent()) == (1, 2, True, [3, 4])
    rows = sql(
        "SELECT queue, priority, partition, version, attributes, deadline - created_at FROM workflows "
        "WHERE name = 'child' ORDER BY output::int"
    )
    assert rows == [
        ("eu", 3, "acme", "7", None, timedelta(hours=1)),
        ("eu", 3, "acme", "7", {"a": 1}, None),
        ("us", 0, None, "7", None, None),
        ("us", 9, None, "7", None, None),
    ]


async def test_a_child_under_a_key_is_started_once(app: App, sql: Sql) -> None:
    @app.workflow
    async def child(number: int) -> int:
        return await double(number)

    @app.workflow
    async def parent(number: int) -> tuple[int, bool, int]:
        handle = await app.start(child(number), key="the one")
        return await handle.result(), handle.started, await app.run(child(number), key="the one")

    @app.workflow
    async def jealous() -> None:
        await app.start(child(1), key="the one", on_conflict="raise")

    async with app.worker():
        first, second = await app.start(parent(1)), None
        assert await first.result(timeout=SOON) == (2, True, 2)
        second = await app.start(parent(2))
        assert await second.result(timeout=SOON) == (2, False, 2)
        with pytest.raises(KeyConflict):
            await app.run(jealous())
    assert sql("SELECT parent_id FROM workflows WHERE name = 'child'") == [(first.id,)]


async def test_the_result_of_a_workflow_that_is_no_child(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def stranger() -> str:
        await hold(gate)
        return "hello"

    @app.workflow
    async def waits(id: UUID) -> str:
        return await app.handle(id, str).result()

    @app.workflow
    async def impatient(id: UUID) -> str:
        try:
            return await app.handle(id, str).result(timeout=timedelta(milliseconds=50))
        except ResultTimeout:
            return "too late"

    async with app.worker(concurrency=3):
        handle = await app.start(stranger())
        waiting = await app.start(waits(handle.id))
        await gate.reached()
        assert await app.run(impatient(handle.id)) == "too late"
        gate.open()
        assert await waiting.result(timeout=SOON) == "hello"
        with pytest.raises(WorkflowNotFound):
            await app.run(waits(uuid4()))


async def test_a_child_cannot_wait_for_its_ancestors(app: App) -> None:
    @app.workflow
    async def child(ancestor: UUID) -> None:
        await app.handle(ancestor).result()

    @app.workflow
    async def between(ancestor: UUID) -> None:
        await child(ancestor)

    @app.workflow
    async def parent() -> str:
        try:
            await between(perdure.current().id)
        except WrongState as error:
            return str(error)
        raise AssertionError

    @app.workflow
    async def itself() -> None:
        await app.handle(perdure.current().id).result()

    async with app.worker():
        assert "an ancestor that may wait for it" in await app.run(parent())
        with pytest.raises(WrongState, match="this workflow itself"):
            await app.run(itself())


async def test_a_cancelled_parent_takes_its_children_along(app: App) -> None:
    gate = Gate()
    undone: list[int] = []

    @step
    async def undo(number: int) -> None:
        undone.append(number)

    @app.workflow
    async def child(number: int) -> None:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            await undo(number)
            raise

    @app.workflow
    async def parent() -> None:
        await app.start(child(1))
        await app.start(child(2), detached=True)
        await asyncio.gather(child(3), app.run(child(4)))

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached(times=4)
        await handle.cancel(reason="enough")
        with pytest.raises(WorkflowCancelled, match="enough"):
            await handle.result(timeout=SOON)
        children = [each async for each in app.workflows(name="child")]
        results = await asyncio.gather(
            *(app.handle(each.id).result() for each in children if each.input != {"number": 2}), return_exceptions=True
        )
        assert [str(result) for result in results] == ["the workflow was cancelled: its parent was cancelled"] * 3
        assert sorted(undone) == [1, 3, 4]
        gate.open()
        (detached,) = (app.handle(each.id) for each in children if each.input == {"number": 2})
        await detached.result(timeout=SOON)


async def test_a_deadline_reaches_the_children(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> str | None:
        deadline = perdure.current().deadline
        await hold(gate)
        return None if deadline is None else deadline.isoformat()

    @app.workflow(timeout=timedelta(milliseconds=200))
    async def parent() -> None:
        await child()

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached()
        with pytest.raises(perdure.DeadlineExceeded):
            await handle.result(timeout=SOON)
        (info,) = [each async for each in app.workflows(name="child")]
        assert info.deadline == (await handle.describe()).deadline
        with pytest.raises(WorkflowCancelled):
            await app.handle(info.id).result(timeout=SOON)
        gate.open()


async def test_a_limit_of_time_ends_the_child_that_is_waited_for(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> None:
        await hold(gate)

    @app.workflow
    async def parent() -> str:
        try:
            async with perdure.timeout(timedelta(milliseconds=100)):
                await child()
        except TimeoutError:
            return "too late"
        raise AssertionError

    async with app.worker():
        assert await app.run(parent()) == "too late"
        (info,) = [each async for each in app.workflows(name="child")]
        with pytest.raises(WorkflowCancelled):
            await app.handle(info.id).result(timeout=SOON)
        gate.open()


async def test_terminating_a_parent_terminates_its_children(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def grandchild() -> None:
        await hold(gate)

    @app.workflow
    async def child() -> None:
        await grandchild()

    @app.workflow
    async def parent() -> None:
        await app.start(grandchild(), detached=True)
        await child()

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached(times=2)
        await handle.terminate()
        assert sql("SELECT name, status FROM workflows ORDER BY name, status") == [
            ("child", "cancelled"),
            ("grandchild", "cancelled"),
            ("grandchild", "running"),
            ("parent", "cancelled"),
        ]
        gate.open()


async def test_a_child_that_is_terminated_is_cancelled_for_its_parent(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> None:
        await hold(gate)

    @app.workflow
    async def parent() -> str:
        try:
            await child()
        except WorkflowCancelled as error:
            return str(error)
        raise AssertionError

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached()
        (info,) = [each async for each in app.workflows(name="child")]
        await app.handle(info.id).terminate(reason="wrong")
        assert "wrong" in await handle.result(timeout=SOON)
        gate.open()


async def test_a_child_that_was_deleted_is_missed(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> None: ...

    @app.workflow
    async def parent() -> None:
        handle = await app.start(child())
        await hold(gate)
        await handle.result()

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached()
        (info,) = [each async for each in app.workflows(name="child")]
        await app.handle(info.id).result(timeout=SOON)
        await app.handle(info.id).delete()
        gate.open()
        with pytest.raises(WorkflowNotFound):
            await handle.result(timeout=SOON)


@pytest.mark.parametrize("how", ["awaited", "in the background"])
async def test_resuming_a_parent_resumes_the_child_that_it_failed_from(app: App, how: str) -> None:
    broken = True
    runs: list[str] = []

    @step
    async def first() -> None:
        runs.append("first")

    @step
    async def second() -> str:
        runs.append("second")
        if broken:
            raise Declined
        return "mended"

    @app.workflow
    async def child() -> str:
        await first()
        return await second()

    @app.workflow
    async def parent() -> str:
        return await child() if how == "awaited" else await (await app.start(child())).result()

    async with app.worker():
        handle = await app.start(parent())
        with pytest.raises(WorkflowFailed):
            await handle.result(timeout=SOON)
        broken = False
        await handle.resume()
        assert await handle.result(timeout=SOON) == "mended"
    assert runs == ["first", "second", "second"]


async def test_resuming_a_cancelled_parent_resumes_its_children(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def child() -> str:
        await hold(gate)
        return "done"

    @app.workflow
    async def parent() -> str:
        return await child()

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached()
        await handle.cancel()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
        (info,) = [each async for each in app.workflows(name="child")]
        with pytest.raises(WorkflowCancelled):
            await app.handle(info.id).result(timeout=SOON)
        gate.open()
        await handle.resume()
        assert await handle.result(timeout=SOON) == "done"


async def test_a_parent_that_is_tried_again_starts_the_child_that_failed_anew(app: App, sql: Sql) -> None:
    tries = 0

    @app.workflow
    async def child() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Declined
        return "done"

    @app.workflow(retry=Retry(max_attempts=5, initial=timedelta(milliseconds=1)))
    async def parent() -> str:
        return await child()

    async with app.worker():
        assert await app.run(parent()) == "done"
    assert sql("SELECT status, count(*) FROM workflows WHERE name = 'child' GROUP BY 1 ORDER BY 1") == [
        ("error", 2),
        ("success", 1),
    ]


async def test_other_arguments_on_replay_are_a_mismatch(app: App) -> None:
    gate = Gate()
    number = 1

    @app.workflow(queue="nowhere")
    async def child(number: int) -> None: ...

    @app.workflow
    async def parent() -> None:
        await app.start(child(number))
        await hold(gate)

    async with interrupted(app, parent(), gate) as handle:
        number = 2
    with pytest.raises(ReplayMismatch, match="child workflow 'child' with these arguments"):
        await served(app, handle)


async def test_where_a_workflow_cannot_be_awaited(app: App, database_url: str) -> None:
    other = App("other", database_url=database_url, schema="elsewhere")

    @app.workflow
    async def child() -> None: ...

    @step
    async def awaits() -> None:
        await child()

    @app.workflow
    async def in_a_step() -> None:
        await awaits()

    @app.workflow
    async def abroad() -> None:
        await other.start(child())

    @app.workflow
    async def twice() -> None:
        invocation = child()
        await app.start(invocation)
        await invocation

    with pytest.raises(WrongPlace, match=r"use app\.run"):
        await child()
    async with app.worker():
        with pytest.raises(WrongPlace, match="awaited inside a step"):
            await app.run(in_a_step())
        with pytest.raises(WrongPlace, match="another database"):
            await app.run(abroad())
        with pytest.raises(WrongPlace, match="given to a verb already"):
            await app.run(twice())


async def test_a_parent_and_its_children_sleep(app: App) -> None:
    @app.workflow
    async def child(number: int) -> int:
        await sleep(timedelta(seconds=1.2))
        return number

    @app.workflow
    async def parent() -> int:
        return sum(await asyncio.gather(child(1), child(2)))

    async with app.worker(grace=AT_ONCE):
        handle: Handle[int] = await app.start(parent())
        assert await handle.result(timeout=SOON) == 3


async def test_what_a_child_failed_with_is_not_taken_for_the_end_of_the_wait(app: App) -> None:
    """A child may fail with TimeoutError, which is also what ends a limit of time."""

    @app.workflow
    async def child() -> None:
        raise TimeoutError("its own")

    @app.workflow
    async def parent() -> str:
        handle = await app.start(child())
        try:
            await handle.result(timeout=timedelta(days=1))
        except ResultTimeout:
            return "in vain"
        except TimeoutError as error:
            return str(error)
        return "nothing"

    async with app.worker():
        assert await app.run(parent()) == "its own"


async def test_terminating_what_has_ended_by_itself_reaches_nothing(app: App) -> None:
    @app.workflow
    async def child() -> None:
        await sleep(timedelta(days=1))

    @app.workflow
    async def parent() -> str:
        return str((await app.start(child())).id)

    async with app.worker():
        handle = await app.start(parent())
        child_id = UUID(await handle.result())
        with pytest.raises(WrongState, match="nothing left to terminate"):
            await handle.terminate()
        assert await app.handle(child_id).status() in ("pending", "running", "waiting")
        await app.handle(child_id).terminate()


async def test_a_child_that_took_too_long_is_asked_to_end_before_its_parent_leaves_memory(app: App) -> None:
    @app.workflow
    async def child() -> None:
        while True:
            await sleep(timedelta(seconds=0.2))

    @app.workflow
    async def parent() -> None:
        with suppress(TimeoutError):
            async with perdure.timeout(timedelta(seconds=0.3)):
                await child()
        await sleep(timedelta(hours=1))

    async with app.worker():
        await app.start(parent())
        ids: list[UUID] = []
        while not ids:
            ids = [info.id async for info in app.workflows(name="child")]
        with pytest.raises(WorkflowCancelled):
            await app.handle(ids[0]).result(timeout=SOON)


async def test_a_workflow_that_has_returned_ends_at_once_though_a_task_of_it_still_waits(app: App) -> None:
    """While its child is asked to end, nothing of it moves: it must not leave memory then."""
    tasks = []

    @app.workflow
    async def child() -> None:
        await sleep(timedelta(hours=1))

    @app.workflow
    async def parent() -> str:
        tasks.append(asyncio.create_task(ticks()))
        with suppress(TimeoutError):
            async with perdure.timeout(timedelta(seconds=0.3)):
                await child()
        return "done"

    async def ticks() -> None:
        while True:
            await sleep(timedelta(hours=1))

    async with app.worker():
        assert await (await app.start(parent())).result(timeout=timedelta(seconds=15)) == "done"


async def test_two_tasks_get_the_result_of_one_child_though_the_second_asks_in_the_moment_it_ends(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = asyncio.Event()
    told = Children.ended

    def ended(self: Children, id: UUID, how: Any) -> list[str]:
        keys = told(self, id, how)
        if keys:
            begin.set()  # who waits for this goes on before who waits for the child
        return keys

    monkeypatch.setattr(Children, "ended", ended)

    @app.workflow
    async def child() -> int:
        await sleep(timedelta(seconds=0.2))
        return 7

    @app.workflow
    async def parent() -> list[int]:
        begin.clear()
        handle = await app.start(child())

        async def second() -> int:
            await begin.wait()
            return await handle.result()

        return list(await asyncio.gather(handle.result(), second()))

    async with app.worker():
        assert await (await app.start(parent())).result(timeout=timedelta(seconds=15)) == [7, 7]
