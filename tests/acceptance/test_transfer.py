"""Export and import: a workflow as JSON, out of one schema and into another."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from acceptance.support import SOON
from engine.support import FaultyDatabase
from perdure import (
    App,
    Invocation,
    KeyConflict,
    Retry,
    SerializationError,
    Status,
    WorkflowNotFound,
    current,
    recv,
    set_event,
    sleep,
    step,
    telemetry,
    write_stream,
)
from perdure.transfer import imported

Sql = Callable[..., list[Any]]
NOW = "2026-01-01T00:00:00+00:00"
EVENT = {"name": "stage", "number": 0, "id": str(UUID(int=1)), "payload": 1, "created_at": NOW}
PART = {"name": "progress", "part": 0, "key": "", "epoch": 1, "attempt": 1, "first": 0, "is_void": False}


class Program:
    """The same code in both places."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.repaired = False
        self.asleep_for = timedelta(days=1)

    def declare(self, app: App) -> Any:
        program = self

        @step
        async def charge(order: str) -> str:
            program.ran.append("charge")
            return f"payment for {order}"

        @step(retry=Retry(max_attempts=2, initial=timedelta(0)), on_exhausted="park")
        async def ship(order: str) -> str:
            program.ran.append("ship")
            if not program.repaired:
                raise ValueError("no truck")
            return f"shipped {order}"

        @app.workflow
        async def order(name: str, how: str) -> list[str]:
            paid = await charge(name)
            if how == "fails":
                raise ValueError("lost")
            if how == "sleeps":
                await sleep(program.asleep_for)
            return [paid, await ship(name)] if how == "parks" else [paid]

        return order


@pytest.fixture
async def elsewhere(database_url: str) -> AsyncIterator[App]:
    async with App("tests", database_url=database_url, schema=f"test_{uuid4().hex[:12]}") as app:
        yield app


@pytest.mark.parametrize(("how", "status"), [("succeeds", Status.SUCCESS), ("fails", Status.ERROR)])
async def test_what_has_ended_is_the_same_there(app: App, elsewhere: App, how: str, status: Status) -> None:
    order = Program().declare(app)
    async with app.worker():
        handle = await app.start(order("ü 漢 🚚", how), key="k", attributes={"tenant": "acme"}, priority=3)
        await asyncio.gather(handle.result(timeout=SOON), return_exceptions=True)
    exported = json.loads(json.dumps(await app.export(handle.id)))
    imported = await elsewhere.import_(exported)
    here, there = await handle.describe(), await imported.describe()
    assert (imported.id, there.status) == (handle.id, status)
    for field in (
        "name",
        "key",
        "queue",
        "priority",
        "input",
        "output",
        "error",
        "attributes",
        "created_at",
        "version",
    ):
        assert getattr(there, field) == getattr(here, field), field
    steps = [(each.key, each.status, each.output, each.error, each.attempts) for each in await handle.steps()]
    assert [(each.key, each.status, each.output, each.error, each.attempts) for each in await imported.steps()] == steps
    found = await elsewhere.find("order", key="k")
    assert found is not None
    assert found.id == handle.id


async def test_what_it_has_announced_and_written_comes_along(app: App, elsewhere: App, sql: Sql, events: Any) -> None:
    @step
    async def writes() -> None:
        await write_stream("progress", "from a step")

    def declare(app: App) -> Any:
        @app.workflow
        async def reports() -> str:
            await set_event("stage", "begun")
            await write_stream("progress", 1)
            await writes()
            await set_event("stage", "half")
            value = await recv("more", type=int)
            await write_stream("progress", value)
            return "done"

        return reports

    reports = declare(app)
    async with app.worker():
        handle = await app.start(reports())
        await events.wait_for(telemetry.WorkflowSuspended)
    exported = json.loads(json.dumps(await app.export(handle.id)))
    sql("UPDATE stream_parts SET is_void = true WHERE part = 0")
    assert [part["is_void"] for part in (await app.export(handle.id))["parts"]] == [True, False]
    declare(elsewhere)
    imported = await elsewhere.import_(exported)
    assert json.loads(json.dumps(await elsewhere.export(handle.id))) == exported
    assert await imported.get_event("stage") == "half"
    async with elsewhere.worker():
        await imported.resume()
        await imported.send("more", 7)
        assert await imported.result(timeout=SOON) == "done"
    assert [entry.value async for entry in imported.read_stream("progress")] == [1, "from a step", 7]


async def test_an_export_without_the_lists_of_later_versions_is_imported(app: App, elsewhere: App) -> None:
    order = Program().declare(app)
    handle = await app.start(order("x", "succeeds"), delay=timedelta(days=1))
    exported = dict(await app.export(handle.id))
    imported = await elsewhere.import_({name: exported[name] for name in ("perdure", "workflow", "checkpoints")})
    assert await imported.status() is Status.WAITING


@pytest.mark.parametrize("how", ["sleeps", "parks"])
async def test_what_has_not_ended_waits_for_an_operator_and_goes_on_from_its_checkpoints(
    app: App, elsewhere: App, events: Any, how: str
) -> None:
    program = Program()
    order = program.declare(app)
    async with app.worker():
        handle = await app.start(order("x", how))
        await events.wait_for(telemetry.WorkflowSuspended)
    program.ran.clear()
    exported = await app.export(handle.id)
    for checkpoint in exported["checkpoints"]:
        checkpoint["wake_at"] = checkpoint["wake_at"] and "2000-01-01T00:00:00+00:00"  # by now it is due
    program.declare(elsewhere)
    imported = await elsewhere.import_(exported)
    info = await imported.describe()
    assert (info.status, info.waiting_for) == (Status.WAITING, "operator")
    program.repaired = True
    async with elsewhere.worker():
        await imported.resume()
        result = await imported.result(timeout=SOON)
    assert result == (["payment for x", "shipped x"] if how == "parks" else ["payment for x"])
    assert "charge" not in program.ran, "what was recorded doesn't run again"
    assert (await handle.describe()).status is Status.WAITING, "the original is as it was"


async def test_what_is_there_or_whose_key_is_taken_is_refused(app: App, elsewhere: App) -> None:
    order = Program().declare(app)
    handle = await app.start(order("x", "sleeps"), key="k", delay=timedelta(days=1))
    exported = await app.export(handle.id)
    with pytest.raises(KeyConflict):
        await app.import_(exported)
    program_there = Program().declare(elsewhere)
    await elsewhere.start(program_there("y", "sleeps"), key="k", delay=timedelta(days=1))
    with pytest.raises(KeyConflict):
        await elsewhere.import_(exported)
    with pytest.raises(WorkflowNotFound):
        await elsewhere.export(handle.id)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda it: it.pop("workflow"),
        lambda it: it.pop("checkpoints"),
        lambda it: it.update(perdure=99),
        lambda it: it["workflow"].update(id="no id"),
        lambda it: it["workflow"].update(created_at="yesterday"),
        lambda it: it["workflow"].update(priority="high"),
        lambda it: it["workflow"].update(name=None),
        lambda it: it["checkpoints"][0].update(kind="spell"),
        lambda it: it["checkpoints"][0].update(position=2**40),
        lambda it: it["checkpoints"][0].update(key=None),
        lambda it: it["checkpoints"].append(it["checkpoints"][0]),
        lambda it: it.update(checkpoints="none"),
        lambda it: it.update(checkpoints=[]),
        lambda it: it["checkpoints"].pop(0),
        lambda it: it["checkpoints"][0].update(key="$result"),
        lambda it: it["workflow"].update(id=7),
        lambda it: it["workflow"].update(name=5),
        lambda it: it["workflow"].update(name="a/b"),
        lambda it: it["workflow"].update(key=5),
        lambda it: it["workflow"].update(queue=None),
        lambda it: it["workflow"].update(priority=True),
        lambda it: it["workflow"].update(created_at="2026-01-01T00:00:00"),
        lambda it: it["workflow"].update(attributes=[1]),
        lambda it: it["workflow"].update(attributes={"a": "\0"}),
        lambda it: it["checkpoints"][0].update(payload={"a": "\0"}),
        lambda it: it["checkpoints"][0].update(payload={"a": "\ud800"}),
        lambda it: it["checkpoints"][0].update(payload=float("nan")),
        lambda it: it["checkpoints"][0].update(status=5),
        lambda it: it["checkpoints"][0].update(version=5),
        lambda it: it["checkpoints"][0].update(position="1"),
        lambda it: it["checkpoints"][0].update(created_at="2026-01-01T00:00:00"),
        lambda it: it.update(events=[{"name": "stage"}]),
        lambda it: it.update(events=[dict(EVENT, id="no id")]),
        lambda it: it.update(events=[EVENT, EVENT]),
        lambda it: it.update(parts=[dict(PART, is_void=1)]),
        lambda it: it.update(parts=[dict(PART, first=2**70)]),
        lambda it: it.update(entries=5),
    ],
)
async def test_what_is_no_export_is_refused_and_leaves_nothing(
    app: App, elsewhere: App, database_url: str, spoil: Callable[[Any], object]
) -> None:
    order = Program().declare(app)
    handle = await app.start(order("x", "succeeds"), delay=timedelta(days=1))
    exported = copy.deepcopy(dict(await app.export(handle.id)))
    spoil(exported)
    with pytest.raises(SerializationError, match="give what 'perdure workflow export' wrote"):
        await elsewhere.import_(exported)
    with pytest.raises(WorkflowNotFound):
        await elsewhere.handle(UUID(str(handle.id))).status()


async def test_text_that_only_looks_like_a_nul_is_imported(app: App, elsewhere: App) -> None:
    order = Program().declare(app)
    handle = await app.start(order("a \\u0000 in words", "succeeds"), delay=timedelta(days=1))
    imported = await elsewhere.import_(await app.export(handle.id))
    assert (await imported.describe()).input == (await handle.describe()).input


async def test_a_step_between_its_attempts_goes_on_with_their_number_and_what_is_left_of_the_pause(
    app: App, elsewhere: App, events: Any
) -> None:
    attempts: list[int] = []

    @step(retry=Retry(max_attempts=3, initial=timedelta(hours=1), maximum=timedelta(hours=1), jitter=0.0))
    async def fetch() -> str:
        attempts.append(current().attempt)
        if len(attempts) == 1:
            raise ConnectionError("not yet")
        return "fetched"

    async def flow() -> str:
        return await fetch()

    app.workflow(name="flow")(flow)
    elsewhere.workflow(name="flow")(flow)
    async with app.worker():
        handle = await app.start(Invocation("flow"))
        await events.wait_for(telemetry.WorkflowSuspended)
    exported = await app.export(handle.id)
    imported = await elsewhere.import_(exported)
    async with elsewhere.worker():
        await imported.resume()
        await events.wait_for(telemetry.WorkflowSuspended, lambda _: len(events.of(telemetry.WorkflowSuspended)) == 2)
        assert attempts == [1]
        assert (await imported.describe()).waiting_for == "retry"
    await elsewhere.handle(handle.id).terminate()
    await elsewhere.handle(handle.id).delete()
    for checkpoint in exported["checkpoints"]:
        checkpoint["wake_at"] = checkpoint["wake_at"] and "2000-01-01T00:00:00+00:00"
    imported = await elsewhere.import_(exported)
    async with elsewhere.worker():
        await imported.resume()
        assert await imported.result(timeout=SOON) == "fetched"
    assert attempts == [1, 2]


async def test_an_import_whose_answer_is_lost_is_found_again(app: App) -> None:
    handle = await app.start(Invocation("flow"))
    exported = await app.export(handle.id)
    database = FaultyDatabase(replace(app.settings, schema=f"test_{uuid4().hex[:12]}"), pool_size=2)
    try:
        database.lose_answer("import")
        assert await imported(database, exported) == handle.id
        with pytest.raises(KeyConflict):
            await imported(database, exported)
    finally:
        await database.close()
