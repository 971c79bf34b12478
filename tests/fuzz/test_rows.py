"""Whatever stands in the tables: a worker goes on with all else, runs no code from a row, and says what is wrong.

More rounds: `PERDURE_FUZZ_ROUNDS=1000`.
"""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold
from fuzz.rows import Rows, Sql
from perdure import App, recv, set_event, sleep, step, write_stream
from perdure.errors import PerdureError

ROUNDS = int(os.environ.get("PERDURE_FUZZ_ROUNDS", "12"))


class Victims:
    """Workflows in all states, with everything that they can record."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.gate = Gate()
        gate = self.gate

        @step
        async def one(order: int) -> str:
            return f"order {order}"

        @step
        async def fails() -> None:
            raise ValueError("no")

        @app.workflow
        async def flow(order: int) -> str:
            await one(order)
            try:
                await fails()
            except Exception:
                await sleep(timedelta(milliseconds=1))
            await set_event("stage", order)
            await write_stream("lines", order)
            await hold(gate)
            return await one(order)

        @app.workflow
        async def listen() -> Any:
            return [await recv("numbers"), await recv("numbers")]

        @app.workflow
        async def leaf(number: int) -> int:
            await sleep(timedelta(hours=1))
            return number

        @app.workflow
        async def family() -> list[int]:
            return await asyncio.gather(leaf(1), leaf(2))

        @app.workflow
        async def healthy() -> str:
            return await one(1)

        self.flow, self.listen, self.family, self.healthy, self.leaf = flow, listen, family, healthy, leaf

    async def begin(self) -> None:
        """Some run, some wait, some are pending, one has ended."""
        app = self.app
        listening = await app.start(self.listen(), key="listening")
        async with app.worker(grace=AT_ONCE):
            await app.run(self.healthy())
            await app.start(self.flow(7), timeout=timedelta(hours=1))
            await app.start(self.family())
            await listening.send("numbers", 1)
            await self.gate.reached()
        await listening.send("numbers", 2)
        await app.start(self.flow(8))
        await app.start(self.flow(9), delay=timedelta(milliseconds=10))
        self.gate.open()

    async def goes_on(self, done: list[str]) -> None:
        """Another workflow runs as always."""
        handle = await self.app.start(self.healthy())
        try:
            assert await handle.result(timeout=SOON) == "order 1"
        except TimeoutError as error:
            raise AssertionError(f"nothing goes on any more after {done}") from error

    async def ask(self) -> None:
        """What clients may ask is answered, or refused with an error of ours."""
        app = self.app
        try:
            async for info in app.workflows():
                await app.handle(info.id).steps()
                await app.handle(info.id).describe()
        except (PerdureError, ValueError):
            pass
        except psycopg.DataError as error:  # the views are of `jsonb`, which takes less than `json`
            if "json" not in str(error):
                raise


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_whatever_stands_in_the_tables(
    app: App, sql: Sql, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    victims = Victims(app)
    await victims.begin()
    rows = Rows(sql, Random(number))
    done = rows.spoil(8)
    async with app.worker() as worker:
        await victims.goes_on(done)
        done += rows.spoil(8)  # while it runs
        await victims.goes_on(done)
        await victims.ask()
        async with asyncio.timeout(SOON.total_seconds()):
            while not worker.is_ready:  # its own row may have been spoilt: then it registers anew
                await asyncio.sleep(0.01)
    assert not complaints, (complaints, done)
    assert not list(tmp_path.iterdir()), f"code from a row has run: {done}"
