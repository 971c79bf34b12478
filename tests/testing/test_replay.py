"""Replay without effects: today's code over a recorded history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from perdure import (
    App,
    ReplayMismatch,
    Retry,
    Status,
    UnknownWorkflow,
    WorkflowNotFound,
    as_completed,
    current,
    now,
    patched,
    random,
    sleep,
    step,
    timeout,
    uuid4,
)
from perdure.model.ids import new_id
from perdure.model.replay import Verdict
from perdure.testing import TestBed

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


class Code:
    """Workflows whose code can be edited between two runs."""

    def __init__(self, ran: list[str]) -> None:
        self.app = app = App("replay")
        self.edit = ""
        code = self

        @step
        async def weigh(kilos: int) -> int:
            ran.append("weigh")
            return kilos

        @step(pure=True)
        async def label(kilos: int) -> str:
            ran.append("label")
            return f"{kilos} kg"

        @step
        def insure() -> None:
            ran.append("insure")

        @step
        async def stamp() -> None:
            ran.append("stamp")

        @app.workflow
        async def ship(kilos: int) -> str:
            if code.edit == "new step":
                await stamp()
            if code.edit == "patched" and patched("insurance"):
                await insure()
            weighed = await (label(kilos) if code.edit == "other step" else weigh(kilos + (code.edit == "arguments")))
            if code.edit != "removed step":
                await asyncio.gather(label(kilos), insure())
            now()
            if code.edit == "foreign":
                await asyncio.sleep(0.01)
            if code.edit == "stands still":
                await asyncio.Event().wait()
            await sleep(DAY)
            if code.edit == "raises":
                raise ValueError("new")
            return "changed" if code.edit == "result" else f"shipped {weighed}"

        self.ship = ship


async def test_a_finished_and_an_unfinished_one_match_and_nothing_runs_or_is_written(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        done = await code.app.start(code.ship(1))
        await kit.finish(done)
        asleep = await code.app.start(code.ship(2))
        await kit.idle()
        bodies, rows = list(ran), await _rows(code.app)
        assert (await kit.replay(done)).note == "it comes to its end"
        assert (await kit.replay(asleep)).note == "it waits: timer"
        assert (ran, await _rows(code.app)) == (bodies, rows)


@pytest.mark.parametrize(
    ("edit", "recorded", "asked"),
    [
        ("other step", "step 'weigh'", "step 'label'"),
        ("arguments", "step 'weigh'", "step 'weigh' with other arguments"),
        ("new step", "step 'weigh'", "step 'stamp'"),
        ("removed step", "step 'label'", "nothing there"),
        ("result", 'the result "shipped 1"', 'the result "changed"'),
        ("raises", 'the result "shipped 1"', "builtins.ValueError: new"),
        ("foreign", 'the result "shipped 1"', "perdure.errors.ForeignAwait"),
        ("stands still", 'the result "shipped 1"', "error: it doesn't come to rest within 0.2 s; it waits at "),
    ],
)
async def test_code_that_takes_another_path_is_shown(
    bed: Bed, ran: list[str], monkeypatch: pytest.MonkeyPatch, edit: str, recorded: str, asked: str
) -> None:
    monkeypatch.setattr("perdure.engine.replays._PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("perdure.engine.replays._LOOK_SECONDS", 0.05)
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.finish(handle)
        bodies, rows, code.edit = list(ran), await _rows(code.app), edit
        with pytest.raises(ReplayMismatch) as mismatch:
            await kit.replay(handle)
        assert mismatch.value.recorded == recorded
        assert mismatch.value.asked.startswith(asked)
        assert (ran, await _rows(code.app)) == (bodies, rows)


@pytest.mark.parametrize(
    ("where", "recorded"),
    [("asleep", "a timer"), ("with a child", "the start of a child"), ("behind what it caught", "no end")],
)
async def test_unfinished_ones_whose_code_goes_another_way_do_not_match(bed: Bed, where: str, recorded: str) -> None:
    app = App("unfinished")
    is_edited = False

    @step
    async def fails() -> None:
        raise ValueError("it is caught")

    @app.workflow
    async def child() -> None:
        await sleep(DAY)

    @app.workflow
    async def parent() -> str:
        if where == "asleep" and not is_edited:
            await sleep(DAY)
        if where == "with a child" and not is_edited:
            await child()
        if where == "behind what it caught":
            try:
                await fails()
            except ValueError:
                pass
            if is_edited:
                raise KeyError("a fault")
            await sleep(DAY)
        return "done"

    async with bed(app) as kit:
        handle = await app.start(parent())
        await kit.idle()
        assert (await kit.replay(handle)).note.startswith("it waits")
        is_edited = True
        with pytest.raises(ReplayMismatch) as mismatch:
            await kit.replay(handle)
        assert mismatch.value.recorded == recorded


async def test_what_fails_of_a_step_that_has_failed_is_no_surprise(bed: Bed) -> None:
    app = App("unfinished")

    @step
    async def fails() -> None:
        raise ValueError("no")

    @app.workflow
    async def parent() -> None:
        waits = asyncio.create_task(sleep(DAY))
        try:
            await fails()
        finally:
            await waits

    async with bed(app) as kit:
        handle = await app.start(parent())
        await kit.idle()
        assert (await kit.replay(handle)).note == "it waits: timer"


async def test_a_change_behind_patched_matches_what_is_old(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.idle()
        code.edit = "patched"
        assert (await kit.replay(handle)).verdict is Verdict.MATCHES
        assert await kit.finish(handle) == "shipped 1"


async def test_an_exported_history_is_a_regression_test(bed: Bed, ran: list[str]) -> None:
    code = Code(ran)
    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        await kit.idle()
        unfinished = await code.app.export(handle.id)
        await kit.finish(handle)
        finished = await code.app.export(handle.id)
    async with bed(code.app) as kit:  # another database, for all it knows
        assert (await kit.replay(unfinished)).note == "it waits: timer"
        assert (await kit.replay(finished)).note == "it comes to its end"
        code.edit = "arguments"
        for exported in (unfinished, finished):
            with pytest.raises(ReplayMismatch, match="with other arguments"):
                await kit.replay(exported)
        with pytest.raises(ValueError, match=r"no exported workflow .* give what app\.export\(\) gave"):
            await kit.replay({"workflow": {}})


async def test_a_workflow_that_the_app_does_not_know_is_named(bed: Bed, ran: list[str]) -> None:
    code, other = Code(ran), App("other")

    @other.workflow
    async def unrelated() -> None: ...

    async with bed(code.app) as kit:
        handle = await code.app.start(code.ship(1))
        exported = await code.app.export(handle.id)
        await kit.idle()
    async with bed(other) as kit:
        with pytest.raises(UnknownWorkflow, match="no workflow is named 'ship'"):
            await kit.replay(exported)


# --- whatever there is, today's code fits what it has recorded itself -------------------------------------------------

app = App("fits")


@step
async def echo(text: str) -> str:
    return text


@step
async def fail(text: str) -> None:
    raise ValueError(text)


@step(on_exhausted="park")
async def park() -> None:
    raise ValueError("an operator must see to it")


@step(retry=Retry(max_attempts=3, initial=HOUR, jitter=0))
async def flaky(text: str) -> str:
    if current().attempt < 3:
        raise ValueError("not yet")
    return text


@app.workflow
async def tasks() -> list[str]:
    async def branch(number: int) -> str:
        await sleep(timedelta(seconds=[0.2, 5, 600][number]))
        return await echo(str(number))

    async with asyncio.TaskGroup() as group:
        created = [group.create_task(branch(number)) for number in range(3)]
    first = [await done async for done in as_completed([branch(number) for number in range(2)])]
    return [task.result() for task in created] + first


@app.workflow
async def failures() -> list[str]:
    said = await asyncio.gather(echo("a"), fail("b"), flaky("c"), return_exceptions=True)
    await sleep(HOUR)
    return [str(each) for each in said]


@app.workflow
async def limits() -> str:
    try:
        async with timeout(HOUR):
            await flaky("too late")
    except TimeoutError:
        await echo("late")
    async with timeout(DAY):
        return await flaky("in time")


@app.workflow
async def values() -> str:
    said = f"{uuid4()} {now()} {random().random()}"
    await sleep(HOUR)
    return await echo(said)


@app.workflow(retry=Retry(max_attempts=3, initial=HOUR, jitter=0))
async def tried_again() -> None:
    await echo("once")
    await fail("each time")


@app.workflow(timeout=HOUR)
async def too_long() -> None:
    try:
        await sleep(DAY)
    finally:
        await echo("cleaned")
        await sleep(DAY)


@app.workflow
async def parks() -> None:
    await echo("before")
    await park()


@pytest.mark.parametrize("flow", [tasks, failures, limits, values, tried_again, too_long, parks])
async def test_it_matches_at_each_rest_and_in_the_end(bed: Bed, flow: Any) -> None:
    async with bed(app) as kit:
        handle = await app.start(flow(), delay=HOUR)
        while True:
            await kit.idle()
            exported = json.loads(json.dumps(await app.export(handle.id)))
            assert (await kit.replay(handle)).verdict is Verdict.MATCHES
            assert (await kit.replay(exported)).verdict is Verdict.MATCHES
            due = await kit.clock.next_due()
            if due is None:
                break
            await kit.clock.advance(due - await kit.clock.now())
        assert await handle.status() in (Status.WAITING if flow is parks else Status.SUCCESS, Status.ERROR)


async def test_a_cancellation_and_what_it_set_going_match(bed: Bed) -> None:
    app = App("cancelled")

    @app.workflow
    async def book() -> None:
        seat = await echo("12A")
        try:
            await sleep(DAY)
        finally:
            await sleep(HOUR)
            await echo(f"release {seat}")

    async with bed(app) as kit:
        handle = await app.start(book())
        await kit.idle()
        await handle.cancel()
        await kit.idle()
        assert (await kit.replay(handle)).note == "it waits: timer"
        await kit.clock.advance(HOUR)
        assert (await kit.replay(handle)).verdict is Verdict.MATCHES
        assert await handle.status() is Status.CANCELLED


class Reversed:
    """A codec: payloads are stored as texts that are read from their end."""

    def encode(self, text: str) -> str:
        return json.dumps(text[::-1])

    def decode(self, text: str) -> str:
        return str(json.loads(text))[::-1]


async def test_an_app_with_a_codec_replays_what_it_has_stored_and_exported(bed: Bed) -> None:
    app = App("codec", codec=Reversed())

    @app.workflow
    async def flow(text: str) -> str:
        echoed = await echo(text)
        await sleep(DAY)
        return echoed

    async with bed(app) as kit:
        handle = await app.start(flow("abc"))
        for note in ("it waits: timer", "it comes to its end"):
            await kit.idle()
            assert (await kit.replay(handle)).note == note
            assert (await kit.replay(await app.export(handle.id))).note == note
            await kit.clock.advance(DAY)
        assert await handle.result() == "abc"


async def test_a_workflow_that_is_not_there_is_not_found(bed: Bed) -> None:
    async with bed(app) as kit:
        with pytest.raises(WorkflowNotFound):
            await kit.replay(app.handle(new_id()))


async def _rows(app: App) -> list[Any]:
    """Everything that stands in the database, but for what a heartbeat writes."""
    found: list[Any] = []
    schema = app.settings.schema
    async with app.session().database.connection() as connection:
        cursor = await connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY 1", [schema])
        tables = [row[0] for row in await cursor.fetchall()]
        assert {"workflow_rows", "checkpoints", "queue_entries", "waits", "deadlines", "maintenance"} <= set(tables)
        for table in sorted({*tables} - {"worker_rows"}):
            cursor = await connection.execute(f'SELECT t::text FROM "{schema}".{table} AS t ORDER BY 1')
            found += [tuple(row) for row in await cursor.fetchall()]
    return found
