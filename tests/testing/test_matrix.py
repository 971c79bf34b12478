"""The crash matrix: whatever a workflow can do, done again and again, and crashed at each of its durable boundaries.

Each case is a workflow that uses some public names; the explorer crashes it before an effect, after it and before the
commit, and after the commit, lets it go on from its last checkpoint, and compares its end with that of a calm run. What
it leaves behind (messages, events, streams, children, rows) must be the same for each of those runs, too. A public name
without a case, or a reason to have none, fails.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

import perdure
from perdure import (
    App,
    Handle,
    Invocation,
    Rerun,
    Retry,
    RetryAfter,
    Start,
    answering,
    blocking,
    continue_as_new,
    current,
    get_event,
    now,
    patched,
    recv,
    run_step,
    saga,
    send,
    set_attributes,
    set_event,
    sleep,
    sleep_until,
    step,
    timeout,
    uuid4,
    workflow,
    write_stream,
)
from perdure.testing import TestBed

Bed = Callable[..., TestBed]
HOUR = timedelta(hours=1)  # all runs of a case together stay within the time that workflows are kept
SOON = Retry(max_attempts=3, initial=timedelta(milliseconds=1))


@dataclass(frozen=True, slots=True)
class Case:
    """What is run, and what each run of it must leave behind.

    Attributes:
        names: The public names that it is for.
        declare: Declares it; returns the invocation.
        leaves: SQL that gives one row for each run, and what each of these rows must be.
    """

    names: tuple[str, ...]
    declare: Callable[[App], Invocation[Any]]
    leaves: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@step(idempotent=True)
async def echo(text: str) -> str:
    return text


def steps(app: App) -> Invocation[Any]:
    @step
    def threaded(text: str) -> str:
        return f"{text} {current().attempt}"

    @app.workflow
    async def flow() -> list[str]:
        first = await echo("a")
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(echo(text)) for text in ("b", "c")]
        inline = await run_step("inline", lambda text: text.upper(), "d")
        return [first, *(task.result() for task in tasks), await threaded("e"), inline]

    return flow()


def retries(app: App) -> Invocation[Any]:
    polls: dict[str, int] = {}

    @step(retry=SOON)
    async def flaky() -> int:
        if current().attempt < 3:
            raise ConnectionError
        return current().attempt

    @step
    async def poll() -> str:
        count = polls[current().idempotency_key] = polls.get(current().idempotency_key, 0) + 1
        if count < 2:
            raise RetryAfter(HOUR, counts=False)
        return "ready"

    async def found() -> str:
        raise Rerun

    @step(in_doubt=found)
    async def doubtful() -> str:
        return "done"

    @app.workflow(retry=SOON)
    async def flow() -> tuple[int, str, str, int]:
        outcome = await flaky(), await poll(), await doubtful()
        if current().attempt == 1:
            raise ConnectionError
        return *outcome, current().attempt

    return flow()


def values(app: App) -> Invocation[Any]:
    @app.workflow
    async def flow() -> list[bool]:
        when, chance, id = now(), perdure.random().random(), uuid4()
        await echo("a")
        return [when.tzinfo is not None, 0 <= chance < 1, id.version == 4, patched("new")]

    return flow()


def waits(app: App) -> Invocation[Any]:
    @app.workflow
    async def flow() -> str:
        await sleep(HOUR)
        await sleep_until(now() + HOUR)
        try:
            async with timeout(HOUR):
                await sleep(2 * HOUR)
        except TimeoutError:
            return await echo("late")
        return "early"

    return flow()


def completions(app: App) -> Invocation[Any]:
    @app.workflow
    async def flow() -> tuple[list[str], list[str]]:
        mapped = await perdure.map(echo, ["a", "b", "c"], concurrency=2)
        return mapped, sorted([text async for text in perdure.as_completed([echo("d"), echo("e")])])

    return flow()


def messages(app: App) -> Invocation[Any]:
    @step
    def sends_in_a_thread(id: str) -> None:
        blocking.send(UUID(id), "numbers", 2)

    @step
    async def sends_from_outside(id: str) -> None:
        await app.handle(UUID(id)).send("numbers", 3)

    @app.workflow
    async def flow() -> list[int]:
        await send(current().id, "numbers", 1)
        await sends_in_a_thread(str(current().id))
        await sends_from_outside(str(current().id))
        return [await recv("numbers", type=int) for _ in range(3)]

    return flow()


def events(app: App) -> Invocation[Any]:
    @step
    def sets_in_a_thread() -> None:
        blocking.set_event("stage", 2)

    @app.workflow
    async def watches(id: UUID) -> int:
        return await get_event(id, "stage", type=int)

    @app.workflow
    async def flow() -> int:
        watching = await app.start(watches(current().id))
        await set_event("stage", 1)
        await sets_in_a_thread()
        return min(1, await watching.result())

    return flow()


def questions(app: App) -> Invocation[Any]:
    @app.workflow
    async def answers() -> int:
        async with answering("price", type=int) as question:
            question.reply(question.value + 1)
            return question.value

    @step(idempotent=True)
    async def asks(id: str) -> str:
        try:
            return str(await app.handle(UUID(id)).ask("price", 1, type=int))
        except perdure.WrongState:  # it had answered the attempt before
            return "2"

    @app.workflow
    async def flow() -> tuple[str, int]:
        handle = await app.start(answers())
        return await asks(str(handle.id)), await handle.result()

    return flow()


def sagas(app: App) -> Invocation[Any]:
    @step(idempotent=True)
    async def undo(what: str) -> None:
        await set_event("undone", what)

    @app.workflow
    async def flow() -> str:
        try:
            async with saga() as undoing:
                for what in ("flight", "hotel"):
                    await echo(what)
                    undoing.compensate(undo, what)
                raise LookupError("no car")
        except LookupError as error:
            return str(error)

    return flow()


def streams(app: App) -> Invocation[Any]:
    @step(retry=SOON)
    async def speaks() -> None:
        await write_stream("words", "one")
        if current().attempt == 1:
            raise ConnectionError
        await write_stream("words", "two")

    @step
    def speaks_in_a_thread() -> None:
        blocking.write_stream("words", "three")

    @app.workflow
    async def flow() -> None:
        await write_stream("words", "zero")
        await speaks()
        await speaks_in_a_thread()

    return flow()


def children(app: App) -> Invocation[Any]:
    @app.job
    async def job(number: int) -> int:
        return number

    @app.workflow
    async def child(number: int) -> int:
        return await job(number)

    @app.workflow
    async def flow() -> list[int]:
        behind = await app.start(child(1))
        under_a_key = await app.start(child(2), key=f"{current().id} two")
        several = await app.start_many([child(3), Start(child(4), priority=1)])
        awaited = await asyncio.gather(child(5), app.run(child(6), queue="other"))
        return [*awaited, *[await handle.result() for handle in (behind, under_a_key, *several)]]

    return flow()


def instances(app: App) -> Invocation[Any]:
    class Shop:
        @step
        async def price(self, item: str) -> int:
            return len(item)

        @workflow
        async def flow(self, item: str) -> int:
            return await self.price(item)

    return app.register("shop", Shop()).flow("book")


def continuations(app: App) -> Invocation[Any]:
    @app.workflow
    async def flow(number: int = 0) -> int:
        await set_attributes({"number": number})
        await send(current().id, "numbers", number)
        if number < 2:
            await continue_as_new(flow(number + 1))
        return sum([await recv("numbers", type=int) for _ in range(3)])

    return flow()


_RUNS = "SELECT id FROM workflows WHERE parent_id IS NULL"
_OF_RUNS = f"workflow_id IN ({_RUNS}) GROUP BY workflow_id"
CASES = {
    case.declare.__name__: case
    for case in (
        Case(("step", "Step", "workflow", "Workflow", "Invocation", "current", "run_step", "App", "Handle"), steps),
        Case(("Retry", "RetryAfter", "Rerun"), retries),
        Case(("now", "random", "uuid4", "patched"), values),
        Case(("sleep", "sleep_until", "timeout"), waits),
        Case(("map", "as_completed"), completions),
        Case(
            ("send", "recv"),
            messages,
            ((f"SELECT array_agg(payload ORDER BY place) FROM messages WHERE {_OF_RUNS}", ([1, 2, 3],)),),
        ),
        Case(
            ("set_event", "get_event"),
            events,
            ((f"SELECT array_agg(value ORDER BY number) FROM events WHERE {_OF_RUNS}", ([1, 2],)),),
        ),
        Case(("answering", "Question"), questions),
        Case(
            ("saga", "Saga"),
            sagas,
            ((f"SELECT array_agg(value ORDER BY number) FROM events WHERE {_OF_RUNS}", (["hotel", "flight"],)),),
        ),
        Case(
            ("write_stream", "StreamEntry", "StreamReset"),
            streams,
            (
                (
                    f"SELECT array_agg(value ORDER BY number) FROM stream_entries WHERE NOT is_void AND {_OF_RUNS}",
                    (["zero", "one", "two", "three"],),
                ),
            ),
        ),
        Case(
            ("Start",),
            children,
            (("SELECT count(*) FROM workflows WHERE name = 'child' GROUP BY parent_id", (6,)),),
        ),
        Case((), instances),
        Case(
            ("continue_as_new", "set_attributes"),
            continuations,
            (("SELECT attributes ->> 'number' FROM workflows", ("2",)),),
        ),
    )
}

EXEMPT = {
    "Client": "calls from outside; what it does are statements of their own, which tests/engine loses answers of",
    "Codec": "is between payloads and the database, wherever those come from",
    "Status": "a value",
    "StepInfo": "a value",
    "WorkflowInfo": "a value",
}


def test_every_public_name_has_a_case_or_a_reason_to_have_none() -> None:
    errors = {
        name for name in perdure.__all__ if _is_error(getattr(perdure, name)) and name not in ("Rerun", "RetryAfter")
    }
    covered = {name for case in CASES.values() for name in case.names}
    assert covered | set(EXEMPT) == set(perdure.__all__) - errors
    assert not covered & set(EXEMPT)


def _is_error(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


@pytest.mark.parametrize("name", CASES)
async def test_crashed_anywhere_it_comes_to_the_same_end(name: str, bed: Bed, database_url: str) -> None:
    case, app = CASES[name], App("matrix")
    invocation = case.declare(app)
    async with bed(app) as kit:
        report = await kit.crash_everywhere(invocation)
        kinds = {boundary.split()[0] + " " + boundary.split()[1] for boundary in report.boundaries}
        assert {"before commit", "after commit"} <= kinds, report
        rows = await _rows(database_url, kit.schema, [(_RUNS, ()), *case.leaves])
    runs = len(rows[0])
    assert runs >= len(report.boundaries)
    for (statement, expected), found in zip(case.leaves, rows[1:], strict=True):
        assert found == [expected] * runs, statement


async def _rows(
    url: str, schema: str, statements: Iterable[tuple[str, tuple[Any, ...]]]
) -> list[list[tuple[Any, ...]]]:
    async with await psycopg.AsyncConnection.connect(url, options=f"-c search_path={schema}") as connection:
        return [await (await connection.execute(statement.encode())).fetchall() for statement, _ in statements]


async def test_a_transactional_step_takes_effect_once_wherever_it_crashes(bed: Bed, database_url: str) -> None:
    app = App("matrix")

    @asynccontextmanager
    async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(database_url) as opened:
            yield opened

    table = f"public.paid_{uuid.uuid4().hex}"

    @app.transaction(using=connection)
    async def pay(on: psycopg.AsyncConnection[Any], id: UUID) -> int:
        await on.execute(f"INSERT INTO {table} VALUES (%s)".encode(), [id])
        return 1

    @app.workflow
    async def flow() -> int:
        return await pay(current().id) + await pay(current().id)

    async with connection() as admin:
        await admin.set_autocommit(True)
        await admin.execute(f"CREATE TABLE {table} (id uuid)".encode())
        try:
            async with bed(app) as kit:
                report = await kit.crash_everywhere(flow())
            counts = await (await admin.execute(f"SELECT count(*) FROM {table} GROUP BY id".encode())).fetchall()
        finally:
            await admin.execute(f"DROP TABLE {table}".encode())
    assert report.boundaries
    assert set(counts) == {(2,)}


async def test_what_comes_from_outside_reaches_it_wherever_it_crashes(bed: Bed) -> None:
    app = App("matrix")

    @app.workflow
    async def flow() -> list[int]:
        first = await recv("numbers", type=int)
        try:
            await sleep(30 * HOUR)
        except asyncio.CancelledError:
            await echo("cleaned up")
            return [first, await recv("numbers", type=int)]
        return []

    async with bed(app) as kit:

        async def drive(handle: Handle[Any]) -> None:
            await handle.send("numbers", 1)
            await handle.send("numbers", 2)
            await kit.idle()
            await handle.cancel()

        report = await kit.crash_everywhere(flow(), drive=drive)
    assert report.boundaries
