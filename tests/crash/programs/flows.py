"""The workflows of the crash tests.

What a body does is noted in a file (it survives everything that the tests do to processes and servers), and the writes
of transactional steps go to a table without any unique constraint: so each body and each effect can be counted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg

from perdure import App, current, step

EFFECTS = "CREATE TABLE effects (workflow_id uuid NOT NULL, ordinal int4 NOT NULL, pid int4 NOT NULL)"


def note(notes: Path, what: str) -> int:
    """Note that a body began; returns how often that body of that workflow has begun before."""
    id = str(current().id)
    line = json.dumps({"workflow": id, "what": what, "pid": os.getpid()})
    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
    return sum(one["workflow"] == id and one["what"] == what for one in noted(notes)) - 1


def noted(notes: Path) -> list[dict[str, Any]]:
    """What was noted so far."""
    lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
    return [json.loads(line) for line in lines]


def wake_up(notes: Path) -> None:
    """End all naps (and that one transaction), those under way and those to come."""
    _alarm(notes).touch()


def _alarm(notes: Path) -> Path:
    return notes.with_name("alarm")


def build(url: str, schema: str, notes: Path, *, max_recoveries: int = 10, statement_timeout: float = 30.0) -> App:
    """The app; the same in a test and in the processes that it starts."""
    app = App("crash", database_url=url, schema=schema, version="1")
    app.settings = dataclasses.replace(
        app.settings, max_recoveries=max_recoveries, statement_timeout=timedelta(seconds=statement_timeout)
    )

    @asynccontextmanager
    async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        options = f"-c search_path={schema}"
        connection = await psycopg.AsyncConnection.connect(url, autocommit=True, options=options)
        try:
            yield connection
        finally:
            await connection.close()

    @step
    async def work(ordinal: int) -> int:
        note(notes, f"work {ordinal}")
        await asyncio.sleep(0.001)
        return ordinal

    @app.transaction(using=connect)
    async def put(connection: psycopg.AsyncConnection[Any], ordinal: int) -> int:
        note(notes, f"put {ordinal}")
        await connection.execute(
            "INSERT INTO effects (workflow_id, ordinal, pid) VALUES (%s, %s, %s)", (current().id, ordinal, os.getpid())
        )
        return ordinal

    @step
    async def stuck_once() -> str:
        """The first body never ends; every later one does, at once."""
        if note(notes, "stuck_once") == 0:
            await asyncio.Event().wait()
        return "free"

    @app.transaction(using=connect)
    async def stuck_once_in_transaction(connection: psycopg.AsyncConnection[Any], ordinal: int) -> int:
        """The first body stays in its transaction until the test says so (`wake_up`); later ones go through."""
        await connection.execute(
            "INSERT INTO effects (workflow_id, ordinal, pid) VALUES (%s, %s, %s)", (current().id, ordinal, os.getpid())
        )
        if note(notes, f"put {ordinal}") == 0:
            while not _alarm(notes).exists():
                await asyncio.sleep(0.005)
        return ordinal

    @step
    async def nap() -> int:
        """Goes on until the test says so (`wake_up`), and says whose nap it was."""
        note(notes, "nap")
        while not _alarm(notes).exists():
            await asyncio.sleep(0.005)
        return os.getpid()

    @step
    async def block(seconds: float) -> str:
        """Blocks the event loop."""
        note(notes, "block")
        time.sleep(seconds)
        return "unblocked"

    @step
    async def kill() -> None:
        """Ends its process."""
        note(notes, "kill")
        os.kill(os.getpid(), signal.SIGKILL)

    @app.workflow
    async def ingest(count: int) -> int:
        total = 0
        for ordinal in range(count):
            total += await work(ordinal)
            await put(ordinal)
        return total

    @app.workflow
    async def stuck() -> str:
        await work(0)
        word = await stuck_once()
        await work(1)
        return word

    @app.workflow
    async def stuck_in_transaction() -> int:
        await work(0)
        return await stuck_once_in_transaction(1)

    @app.workflow
    async def sleeps() -> int:
        first = await nap()
        await work(1)
        return first

    @app.workflow
    async def blocks(seconds: float) -> str:
        return await block(seconds)

    @app.workflow
    async def kills(progress: int) -> None:
        for ordinal in range(progress):
            await work(ordinal)
        await kill()

    return app
