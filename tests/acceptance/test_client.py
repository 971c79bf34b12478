"""The client: starting workflows, waiting for them, looking at them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID
from uuid import uuid4 as any_uuid

import psycopg
import pytest

from acceptance.support import SOON, Gate, all_workflows, hold, served
from perdure import (
    App,
    Client,
    ConfigurationError,
    DatabaseUnavailable,
    Invocation,
    ResultTimeout,
    Retry,
    Start,
    Status,
    WorkflowFailed,
    WorkflowNotFound,
    current,
    step,
    telemetry,
)


@step
async def charge(cents: int) -> str:
    return f"paid {cents}"


async def test_run_starts_and_waits(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    async with app.worker():
        assert await app.run(double(4), key="k", queue="q", priority=3) == 8


async def test_a_workflow_waits_for_a_worker(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handle = await app.start(double(4))
    assert await handle.status() is Status.PENDING
    assert await served(app, handle) == 8
    assert await handle.status() is Status.SUCCESS


async def test_ids_are_uuids_of_version_7(app: App) -> None:
    @app.workflow
    async def nothing() -> None: ...

    first, second = await app.start(nothing()), await app.start(nothing())
    assert (first.id.version, second.id.version) == (7, 7)
    assert first.id != second.id
    assert first.started


async def test_many_are_started_in_order(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handles = await app.start_many(
        [
            double(1),
            Start(double(2), key="two", priority=5, attributes={"a": 1}),
            Start(double(3), delay=timedelta(hours=1)),
        ],
        queue="batch",
    )
    async with app.worker():
        assert [await handle.result() for handle in handles[:2]] == [2, 4]
    one, two, three = [await handle.describe() for handle in handles]
    assert {each.queue for each in (one, two, three)} == {"batch"}
    assert (two.key, two.priority, two.attributes) == ("two", 5, {"a": 1})
    assert three.status is Status.WAITING


async def test_many_may_be_more_than_a_batch_or_none(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    assert await app.start_many([]) == []
    handles = await app.start_many(double(number) for number in range(2100))
    assert len({handle.id for handle in handles}) == 2100
    async with app.worker():
        assert await handles[-1].result(timeout=SOON) == 2 * 2099
        assert await handles[1000].result(timeout=SOON) == 2000


async def test_concurrent_starts_each_get_their_own_workflow(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    async with app.worker():
        assert await asyncio.gather(*(app.run(double(n)) for n in range(100))) == [2 * n for n in range(100)]


async def test_a_client_that_knows_no_code_starts_by_name(app: App, database_url: str, schema: str) -> None:
    @app.workflow
    async def checkout(order_id: int, *, express: bool = False) -> list[object]:
        return [order_id, express]

    async with Client(database_url, schema=schema) as client, app.worker():
        handle = await client.start(Invocation("checkout", 42, express=True), key="order-42")
        assert await handle.result() == [42, True]
        assert (await client.run(Invocation("checkout", 43))) == [43, False]


async def test_the_result_is_there_for_everybody_and_for_ever(app: App, database_url: str, schema: str) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handle = await app.start(double(4))
    async with Client(database_url, schema=schema) as other:
        handles = (handle, app.handle(handle.id), other.handle(handle.id))
        waiting = [asyncio.create_task(each.result(timeout=SOON)) for each in handles]
        await served(app, handle)
        assert await asyncio.gather(*waiting) == [8, 8, 8]
        assert await other.handle(handle.id).result() == 8


async def test_the_result_of_a_handle_is_read_by_the_type_that_it_was_given(app: App) -> None:
    @app.workflow
    async def when() -> datetime:
        return datetime(2024, 1, 1, tzinfo=UTC)

    async with app.worker():
        handle = await app.start(when())
        await handle.result()
    assert await app.handle(handle.id, datetime).result() == datetime(2024, 1, 1, tzinfo=UTC)
    assert await app.handle(handle.id).result() == "2024-01-01T00:00:00Z"


async def test_a_result_that_is_not_there_in_time_is_a_timeout_and_the_workflow_goes_on(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def slow() -> str:
        await hold(gate)
        return "done"

    async with app.worker():
        handle = await app.start(slow())
        await gate.reached()
        with pytest.raises(ResultTimeout, match=str(handle.id)) as caught:
            await handle.result(timeout=timedelta(milliseconds=10))
        assert isinstance(caught.value, TimeoutError)
        gate.open()
        assert await handle.result(timeout=SOON) == "done"


async def test_a_timeout_of_nothing_asks_whether_it_is_there(app: App) -> None:
    @app.workflow
    async def nothing() -> str:
        return "done"

    handle = await app.start(nothing())
    with pytest.raises(ResultTimeout):
        await app.handle(handle.id).result(timeout=timedelta(milliseconds=1))
    with pytest.raises(ResultTimeout):
        await app.handle(handle.id).result(timeout=timedelta(0))
    await served(app, handle)
    async with Client(app.settings.database_url, schema=app.settings.schema) as other:
        assert await other.handle(handle.id).result(timeout=timedelta(0)) == "done"
        with pytest.raises(WorkflowNotFound):
            await other.handle(any_uuid()).result(timeout=timedelta(0))
        with pytest.raises(WorkflowNotFound):
            await other.handle(any_uuid()).result(timeout=timedelta(0))


async def test_an_error_of_the_look_for_results_is_told_to_who_waits_and_to_nobody_later(app: App) -> None:
    @app.workflow
    async def nothing() -> str:
        return "done"

    results = app.session().results
    with pytest.raises(AttributeError):
        await asyncio.wait_for(results.wait(cast("UUID", "no id")), SOON.total_seconds())
    async with app.worker():
        assert await app.run(nothing()) == "done"


async def test_a_caller_that_no_longer_waits_does_no_harm(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def slow() -> str:
        await hold(gate)
        return "done"

    async with app.worker():
        handle = await app.start(slow())
        await gate.reached()
        waiting = asyncio.create_task(handle.result())
        other = asyncio.create_task(handle.result(timeout=SOON))
        await handle.status()
        waiting.cancel()
        gate.open()
        assert await other == "done"
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_running_workflow_can_be_looked_at(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def slow(number: int) -> int:
        await charge(5)
        await hold(gate)
        return number

    async with app.worker():
        handle = await app.start(slow(3), key="k", queue="q", priority=2, partition="p", attributes={"a": [1]})
        await gate.reached()
        found = await handle.describe()
        assert found.status is Status.RUNNING
        first, *_ = await handle.steps()
        assert (first.name, first.status) == ("charge", "success")
        gate.open()
        await handle.result(timeout=SOON)
    assert (found.id, found.name, found.key, found.queue, found.priority, found.partition) == (
        handle.id,
        "slow",
        "k",
        "q",
        2,
        "p",
    )
    assert found.attributes == {"a": [1]}
    assert found.input == {"number": 3}
    assert found.output is None
    assert found.worker_id is not None
    assert found.epoch == 1
    assert found.recoveries == 0
    assert found.started_at is not None
    assert found.completed_at is None


async def test_a_workflow_that_ended_can_be_looked_at(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handle = await app.start(double(4))
    await served(app, handle)
    found = await handle.describe()
    assert (found.status, found.output, found.error) == (Status.SUCCESS, 8, None)
    assert found.started_at is not None
    assert found.completed_at is not None
    assert found.created_at <= found.started_at <= found.completed_at
    assert found.created_at.tzinfo is not None
    assert found.version


async def test_steps_are_told_in_the_order_of_their_outcomes(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> None:
        task = asyncio.create_task(hold(gate))
        await gate.reached()
        await charge(1)
        await charge(2)
        gate.open()
        await task

    async with app.worker():
        handle = await app.start(flow())
        await handle.result(timeout=SOON)
    found = await handle.steps()
    assert [each.name for each in found] == ["charge", "charge", "hold"]
    positions = [each.position for each in found]
    assert positions == sorted(positions, key=lambda position: position or 0)
    for each in found:
        assert each.workflow_id == handle.id
        assert each.kind == "step"
        assert each.started_at is not None
        assert each.completed_at is not None
        assert each.started_at <= each.completed_at
        assert each.worker_id is not None


@pytest.mark.parametrize("verb", ["result", "status", "describe"])
async def test_a_handle_of_an_unknown_id_says_so(app: App, verb: str) -> None:
    unknown = any_uuid()
    with pytest.raises(WorkflowNotFound, match=str(unknown)) as caught:
        await getattr(app.handle(unknown), verb)()
    assert caught.value.workflow_id == unknown
    assert isinstance(caught.value, LookupError)


async def test_a_workflow_is_found_by_its_key(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handle = await app.start(double(4), key="four")
    by_function = await app.find(double, key="four")
    by_name = await app.find("double", key="four")
    assert by_function is not None
    assert by_name is not None
    assert by_function.id == by_name.id == handle.id
    assert by_function.key == "four"
    assert not by_function.started
    assert await served(app, by_function) == 8
    assert await app.find(double, key="five") is None
    assert await app.find("other", key="four") is None


async def test_workflows_are_listed_newest_first(app: App) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    handles = [await app.start(double(number)) for number in range(5)]
    newest_first = sorted((handle.id for handle in handles), reverse=True)
    assert [each.id for each in await all_workflows(app)] == newest_first
    assert sorted(each.input["number"] for each in await all_workflows(app)) == [0, 1, 2, 3, 4]
    assert [each.id async for each in app.workflows(limit=2)] == newest_first[:2]
    assert [each async for each in app.workflows(limit=0)] == []


@pytest.mark.parametrize("status", [None, Status.PENDING])
async def test_long_lists_are_read_page_by_page(app: App, status: Status | None) -> None:
    handles = await app.start_many(Invocation("anything", number) for number in range(450))
    expected = sorted((handle.id for handle in handles), reverse=True)
    assert [each.id async for each in app.workflows(status=status)] == expected
    assert [each.id async for each in app.workflows(status=status, limit=250)] == expected[:250]
    assert [each.id async for each in app.workflows(status=status, limit=400)] == expected[:400]


async def test_a_rare_kind_is_found_behind_many_others(app: App) -> None:
    rare = await app.start(Invocation("rare"))
    await app.start_many(Invocation("common", number) for number in range(450))
    assert [each.id async for each in app.workflows(name="rare")] == [rare.id]
    assert [each.id async for each in app.workflows(name="rare", status=Status.PENDING)] == [rare.id]


@pytest.fixture
async def shop(app: App) -> dict[str, UUID]:
    """A workflow of every status that there is, and some that differ otherwise."""
    gate = Gate()

    @app.workflow
    async def good() -> None: ...

    @app.workflow
    async def bad() -> None:
        raise KeyError

    handles = {
        "good": await app.start(good(), key="order-1", attributes={"tenant": "a", "tags": [1, 2]}),
        "bad": await app.start(bad(), key="order_2", queue="slow", attributes={"tenant": "b"}),
    }
    async with app.worker():
        await handles["good"].result()
        with pytest.raises(KeyError):
            await handles["bad"].result()
    handles["later"] = await app.start(good(), key="orders", delay=timedelta(hours=1))
    handles["pending"] = await app.start(good(), queue="slow", attributes={"tenant": "a", "more": None})
    gate.open()
    return {name: handle.id for name, handle in handles.items()}


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ({}, ["pending", "later", "bad", "good"]),
        ({"status": Status.SUCCESS}, ["good"]),
        ({"status": Status.ERROR}, ["bad"]),
        ({"status": Status.WAITING}, ["later"]),
        ({"status": Status.PENDING}, ["pending"]),
        ({"status": Status.RUNNING}, []),
        ({"status": Status.CANCELLED}, []),
        ({"status": "error"}, ["bad"]),
        ({"name": "good"}, ["pending", "later", "good"]),
        ({"name": "good", "status": Status.SUCCESS}, ["good"]),
        ({"name": "goo"}, []),
        ({"queue": "slow"}, ["pending", "bad"]),
        ({"queue": "slow", "status": Status.ERROR}, ["bad"]),
        ({"key_prefix": "order"}, ["later", "bad", "good"]),
        ({"key_prefix": "order-"}, ["good"]),
        ({"key_prefix": "order_"}, ["bad"]),
        ({"key_prefix": "o%"}, []),
        ({"key_prefix": "\\"}, []),
        ({"attributes": {"tenant": "a"}}, ["pending", "good"]),
        ({"attributes": {"tags": [2]}}, ["good"]),
        ({"attributes": {"tenant": "a"}, "status": Status.PENDING}, ["pending"]),
        ({"attributes": {"tenant": "c"}}, []),
        ({"limit": 1, "status": Status.ERROR}, ["bad"]),
    ],
    ids=repr,
)
async def test_workflows_are_filtered(app: App, shop: dict[str, UUID], which: dict[str, Any], names: list[str]) -> None:
    name_of = {id: name for name, id in shop.items()}
    assert {name_of[each.id] async for each in app.workflows(**which)} == set(names)


async def test_workflows_are_filtered_by_time(app: App) -> None:
    handles = [await app.start(Invocation("anything", number)) for number in range(3)]
    times = [(await handle.describe()).created_at for handle in handles]
    assert times == sorted(set(times))
    since = {each.id async for each in app.workflows(since=times[1])}
    until = {each.id async for each in app.workflows(until=times[1])}
    between = {each.id async for each in app.workflows(since=times[1], until=times[2])}
    assert since == {handles[2].id, handles[1].id}
    assert until == {handles[0].id}
    assert between == {handles[1].id}


async def test_naive_datetimes_are_refused(app: App) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001
    with pytest.raises(ValueError, match=r"start_at.*time zone"):
        await app.start(Invocation("anything"), start_at=naive)
    with pytest.raises(ValueError, match=r"since.*time zone"):
        _ = [each async for each in app.workflows(since=naive)]
    with pytest.raises(ValueError, match=r"until.*time zone"):
        _ = [each async for each in app.workflows(until=naive)]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"key": ""}, "key"),
        ({"key": "a\0b"}, "key"),
        ({"key": "x" * 10_000}, "key"),
        ({"key": "\ud800"}, "key"),
        ({"queue": ""}, "queue"),
        ({"partition": ""}, "partition"),
        ({"priority": 2**40}, "priority"),
        ({"on_conflict": "whatever"}, "on_conflict"),
        ({"delay": timedelta(1), "start_at": datetime(2030, 1, 1, tzinfo=UTC)}, "delay.*start_at"),
    ],
)
async def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    app: App, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        await app.start(Invocation("anything"), **options)
    assert await all_workflows(app) == []


async def test_a_start_in_the_callers_transaction_commits_with_it(app: App, database_url: str) -> None:
    @app.workflow
    async def double(number: int) -> int:
        return 2 * number

    await all_workflows(app)
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        async with connection.transaction():
            handle = await app.start(double(4), connection=connection)
            keyed = await app.start(double(5), key="five", connection=connection)
            many = await app.start_many([double(6), Start(double(7), key="seven")], connection=connection)
            with pytest.raises(WorkflowNotFound):
                await handle.status()
        async with app.worker():
            assert [await each.result(timeout=SOON) for each in (handle, keyed, *many)] == [8, 10, 12, 14]


async def test_a_start_in_the_callers_transaction_rolls_back_with_it(app: App, database_url: str) -> None:
    await all_workflows(app)
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        handle = await app.start(Invocation("anything"), connection=connection)
        await app.start(Invocation("anything"), key="k", connection=connection)
        await connection.rollback()
        with pytest.raises(WorkflowNotFound):
            await handle.status()
        again = await app.start(Invocation("anything"), key="k", connection=connection)
        assert again.started
        await connection.commit()
    assert [each.id for each in await all_workflows(app)] == [again.id]


async def test_a_start_in_the_callers_transaction_may_be_the_first_verb_of_all(app: App, database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        handle = await app.start(Invocation("anything"), connection=connection)
        await connection.commit()
    assert await handle.status() is Status.PENDING


async def test_a_start_in_the_callers_transaction_leaves_the_callers_settings_alone(
    app: App, database_url: str
) -> None:
    await all_workflows(app)
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("CREATE TEMP TABLE mine (id uuid)")
        connection.row_factory = psycopg.rows.dict_row  # type: ignore[assignment]
        handle = await app.start(Invocation("anything"), connection=connection)
        await connection.execute("INSERT INTO mine VALUES (%s)", [handle.id])
        cursor = await connection.execute("SELECT id, current_setting('search_path') AS path FROM mine")
        row: Any = await cursor.fetchone()
        assert row["id"] == handle.id
        assert row["path"] == '"$user", public'
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        await connection.commit()
    assert await handle.status() is Status.PENDING


async def test_the_queries_of_the_design_work(app: App, sql: Callable[..., list[Any]]) -> None:
    @app.workflow
    async def nothing() -> None: ...

    await app.start(nothing())
    assert sql(
        "SELECT * FROM workflow_steps WHERE status = 'error' AND created_at > now() - interval '1 month'"
    ) == []  # fmt: skip
    assert len(sql("SELECT * FROM workflows WHERE status = 'pending' ORDER BY created_at LIMIT 10")) == 1


async def test_making_an_app_does_no_input_or_output() -> None:
    app = App("lazy", database_url="postgresql://nobody@localhost:1/nowhere")

    @app.workflow
    async def nothing() -> None: ...

    app.handle(any_uuid())
    await app.close()


async def test_a_database_that_does_not_answer_is_said_to_be_unavailable() -> None:
    url = "postgresql://nobody@127.0.0.1:1/nowhere"
    async with Client(url, connect_timeout=timedelta(milliseconds=50)) as client:
        with pytest.raises(DatabaseUnavailable, match="can't be reached") as caught:
            await client.start(Invocation("anything"))
    assert not caught.value.outcome_unknown


async def test_a_database_that_does_not_exist_is_a_mistake_of_configuration(database_url: str) -> None:
    wrong = psycopg.conninfo.make_conninfo(database_url, dbname="no_such_database")
    async with Client(wrong) as client:
        with pytest.raises(ConfigurationError, match="no_such_database"):
            await client.start(Invocation("anything"))


async def test_a_client_can_be_closed_and_used_again(app: App) -> None:
    first = await app.start(Invocation("anything"))
    await app.close()
    assert await app.handle(first.id).status() is Status.PENDING


async def test_the_result_of_a_failed_workflow_is_an_error_to_a_client_without_code_too(
    app: App, database_url: str, schema: str
) -> None:
    class Own(Exception): ...

    @app.workflow
    async def failing() -> None:
        raise Own("no")

    async with Client(database_url, schema=schema) as client, app.worker():
        with pytest.raises(WorkflowFailed, match="Own: no"):
            await client.run(Invocation("failing"))


async def test_a_start_in_a_step_is_made_once_however_often_the_step_is_tried(app: App) -> None:
    @app.workflow
    async def other() -> None: ...

    @step(retry=Retry(max_attempts=3, initial=timedelta(0)))
    async def start_other() -> str:
        handle = await app.start(other())
        if current().attempt < 3:
            raise ConnectionError
        return str(handle.id)

    @app.workflow
    async def flow() -> str:
        return await start_other()

    async with app.worker():
        started = await app.run(flow())
    assert [str(each.id) async for each in app.workflows(name="other")] == [started]


async def test_the_result_of_what_has_ended_here_is_there_at_once(app: App, events, monkeypatch) -> None:
    monkeypatch.setattr("perdure.results._LOCAL_SECONDS", 3600.0)  # for as long it would trust its own worker to tell

    @app.workflow
    async def flow() -> str:
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(telemetry.WorkflowEnded)
        assert await handle.result(timeout=SOON) == "done"


async def test_who_still_waits_when_a_client_is_closed_is_cancelled(app: App, database_url: str) -> None:
    """For a result, and for a key that somebody's open transaction holds."""
    handle = await app.start(Invocation("flow"))
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await app.start(Invocation("flow"), key="held", connection=connection)
        waiting = [
            asyncio.ensure_future(handle.result()),
            asyncio.ensure_future(app.start(Invocation("flow"), key="held")),
        ]
        done, _ = await asyncio.wait(waiting, timeout=1)
        assert not done
        await app.close()
        done, _ = await asyncio.wait(waiting, timeout=20)
        assert done == set(waiting)
        assert all(each.cancelled() for each in waiting)


async def test_who_waits_for_a_workflow_that_is_deleted_is_told(app: App, sql: Callable[..., list[Any]]) -> None:
    handle = await app.start(Invocation("flow"))
    waiting = asyncio.ensure_future(handle.result())
    info = await handle.describe()
    assert info.status == "pending"
    await asyncio.wait({waiting}, timeout=0.5)
    for table in ("queue_entries", "checkpoints"):
        sql(f"DELETE FROM {table} WHERE workflow_id = %s", handle.id)
    sql("DELETE FROM workflow_rows WHERE id = %s", handle.id)
    with pytest.raises(WorkflowNotFound):
        await asyncio.wait_for(waiting, 20)


async def test_asking_once_for_a_result_survives_a_connection_that_was_ended(
    app: App, sql: Callable[..., list[Any]]
) -> None:
    handle = await app.start(Invocation("flow"))
    sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    with pytest.raises(ResultTimeout):
        await handle.result(timeout=timedelta(0))
