"""Streams: what workflows and steps write as they go, and who reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

import perdure.blocking
from acceptance.support import AT_ONCE, SOON, Gate, hold, interrupted
from perdure import (
    App,
    Handle,
    NotInWorkflow,
    Retry,
    SerializationError,
    StreamEntry,
    StreamReset,
    WorkflowNotFound,
    recv,
    step,
    write_stream,
)

Sql = Callable[..., list[Any]]
ANEW = Retry(max_attempts=3, initial=timedelta(milliseconds=1))


@dataclass
class Token:
    text: str


async def read(handle: Handle[Any], name: str = "tokens", offset: int = 0) -> list[tuple[int, Any, int]]:
    return [(entry.offset, entry.value, entry.attempt) async for entry in handle.read_stream(name, offset=offset)]


async def test_a_reader_gets_what_workflow_and_steps_write_in_order_until_the_end(app: App, sql: Sql) -> None:
    @step
    async def speaks(word: str) -> None:
        await write_stream("tokens", word)
        await write_stream("tokens", "!")

    @step
    def speaks_in_a_thread(word: str) -> None:
        perdure.blocking.write_stream("tokens", word)

    @app.workflow
    async def talks() -> None:
        await write_stream("tokens", "so")
        await speaks("hello")
        await write_stream("other", None)
        await speaks_in_a_thread("world")
        await write_stream("tokens", "end")

    async with app.worker():
        handle = await app.start(talks())
        assert [value for _, value, _ in await read(handle)] == ["so", "hello", "!", "world", "end"]
        assert await read(handle, offset=3) == [(3, "world", 1), (4, "end", 1)]
        assert await read(handle, "other") == [(0, None, 1)]
        assert await read(handle, "nothing") == []
    rows = sql("SELECT number, value, step_key, is_void FROM stream_entries WHERE name = 'tokens' ORDER BY number")
    assert rows == [
        (0, "so", "", False),
        (1, "hello", "speaks", False),
        (2, "!", "speaks", False),
        (3, "world", "speaks_in_a_thread", False),
        (4, "end", "", False),
    ]
    await handle.delete()
    assert sql("SELECT count(*) FROM stream_rows") == sql("SELECT count(*) FROM stream_parts") == [(0,)]


async def test_entries_come_while_the_step_still_runs(app: App) -> None:
    gate = Gate()

    @step
    async def speaks() -> None:
        await write_stream("tokens", Token("first"))
        await gate.passed()
        await write_stream("tokens", Token("second"))

    @app.workflow
    async def talks() -> None:
        await speaks()

    async with app.worker():
        handle = await app.start(talks())
        entries = handle.read_stream("tokens", type=Token)
        assert await anext(entries) == StreamEntry(offset=0, value=Token("first"), attempt=1, step="speaks")
        gate.open()
        assert [entry.value async for entry in entries] == [Token("second")]


async def test_blocking_callers_read_streams(app: App) -> None:
    @app.workflow
    async def talks() -> None:
        await write_stream("tokens", "hello")

    async with app.worker():
        handle = await app.start(talks())
        words = await asyncio.to_thread(
            lambda: [entry.value for entry in app.blocking.handle(handle.id).read_stream("tokens", type=str)]
        )
        assert words == ["hello"]
    await asyncio.to_thread(app.blocking.close)


async def test_a_new_attempt_supersedes_what_the_former_wrote(app: App, sql: Sql) -> None:
    gate = Gate()
    attempts = 0

    @step(retry=ANEW)
    async def speaks() -> None:
        nonlocal attempts
        attempts += 1
        await write_stream("tokens", f"a{attempts}")
        if attempts == 1:
            await write_stream("tokens", "b1")
            await gate.passed()
            raise ConnectionError
        await write_stream("tokens", f"b{attempts}")

    @app.workflow
    async def talks() -> None:
        await write_stream("tokens", "0")
        await speaks()

    async with app.worker():
        handle = await app.start(talks())
        entries = handle.read_stream("tokens", type=str)
        assert [(await anext(entries)).value for _ in range(3)] == ["0", "a1", "b1"]
        gate.open()
        rest = [entry async for entry in entries]
        assert isinstance(rest[0], StreamReset)
        assert (rest[0].offset, rest[0].step, rest[0].attempt, rest[0].value) == (1, "speaks", 1, None)
        assert [(entry.offset, entry.value, entry.attempt) for entry in rest[1:]] == [(3, "a2", 2), (4, "b2", 2)]
        # Whoever comes later sees the second attempt only; who comes back is told what became of the first.
        assert await read(handle) == [(0, "0", 1), (3, "a2", 2), (4, "b2", 2)]
        assert await read(handle, offset=2) == [(1, None, 1), (3, "a2", 2), (4, "b2", 2)]
        assert await read(handle, offset=4) == [(4, "b2", 2)]
    assert sql("SELECT is_void FROM stream_entries ORDER BY number") == [(False,), (True,), (True,), (False,), (False,)]


async def test_a_step_that_runs_again_after_a_crash_supersedes_itself(app: App) -> None:
    gate = Gate()

    @step
    async def speaks() -> None:
        await write_stream("tokens", f"arrival {gate.arrivals}")
        await gate.passed()

    @app.workflow
    async def talks() -> None:
        await write_stream("tokens", "begin")
        await speaks()
        await write_stream("tokens", "end")

    async with interrupted(app, talks(), gate) as handle:
        entries = handle.read_stream("tokens", type=str)
        assert [(await anext(entries)).value for _ in range(2)] == ["begin", "arrival 0"]
    async with app.worker():
        rest = [entry async for entry in entries]
    assert [(type(entry), entry.offset, entry.value) for entry in rest] == [
        (StreamReset, 1, None),
        (StreamEntry, 2, "arrival 1"),
        (StreamEntry, 3, "end"),
    ]


async def test_what_an_attempt_wrote_is_void_when_the_one_that_counts_wrote_nothing(app: App) -> None:
    attempts = 0

    @step(retry=ANEW)
    async def speaks() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await write_stream("tokens", "in vain")
            raise ConnectionError

    @app.workflow
    async def talks() -> None:
        await speaks()

    async with app.worker():
        handle = await app.start(talks())
        await handle.result(timeout=SOON)
        assert await read(handle) == []


async def test_a_replay_writes_nothing_again(app: App) -> None:
    gate = Gate()

    @app.workflow
    async def talks() -> None:
        for number in range(3):
            await write_stream("tokens", number)
        await hold(gate)
        await write_stream("tokens", 3)

    async with interrupted(app, talks(), gate) as handle:
        pass
    async with app.worker():
        await handle.result(timeout=SOON)
    assert await read(handle) == [(number, number, 1) for number in range(4)]


async def test_many_entries_wait_for_room(app: App) -> None:
    @step
    async def speaks() -> None:
        for number in range(5000):
            await write_stream("tokens", number)

    @app.workflow
    async def talks() -> None:
        await speaks()
        for number in range(2000):
            await write_stream("tokens", number)

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(talks())
        assert [value for _, value, _ in await read(handle)] == [*range(5000), *range(2000)]


async def test_what_a_stream_refuses(app: App) -> None:
    @app.workflow
    async def writes() -> None:
        await write_stream("tokens", object())

    @app.workflow
    async def talks() -> None:
        await write_stream("tokens", 1)

    with pytest.raises(NotInWorkflow):
        await write_stream("tokens", 1)
    with pytest.raises(WorkflowNotFound):
        await read(app.handle(uuid4()))
    with pytest.raises(ValueError, match="stream name ''"):
        await read(app.handle(uuid4()), "")
    async with app.worker():
        with pytest.raises(SerializationError, match="an entry of stream 'tokens'"):
            await app.run(writes())
        handle = await app.start(talks())
        with pytest.raises(SerializationError, match="an entry of stream 'tokens'"):
            _ = [entry async for entry in handle.read_stream("tokens", type=str)]


async def test_a_burst_of_entries_is_written_though_another_task_waits(app: App) -> None:
    """Who waits for room in the stream isn't at rest."""

    @app.workflow
    async def speaks() -> str:
        async def listens() -> None:
            await recv("stop")

        listening = asyncio.create_task(listens())
        for number in range(2500):
            await write_stream("numbers", number)
        listening.cancel()
        return "done"

    async with app.worker():
        handle = await app.start(speaks())
        assert await handle.result(timeout=timedelta(seconds=15)) == "done"
        assert [entry.value async for entry in handle.read_stream("numbers")] == list(range(2500))
