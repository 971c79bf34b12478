"""One workflow in two versions of its code, for deploys under running workflows.

Version 2 has a new step behind `patched`, a step whose function got another name, and another argument for a step that
is known by its name alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg

from crash.programs.flows import note
from perdure import App, current, patched, sleep, step

VERSIONS = ("1", "2")


def build(url: str, schema: str, notes: Path, version: str) -> App:
    """The app in that version."""
    app = App("deploys", database_url=url, schema=schema, version=version)

    @asynccontextmanager
    async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        options = f"-c search_path={schema}"
        async with await psycopg.AsyncConnection.connect(url, autocommit=True, options=options) as connection:
            yield connection

    @app.transaction(using=connect)
    async def put(connection: psycopg.AsyncConnection[Any], ordinal: int) -> int:
        await connection.execute(
            "INSERT INTO effects (workflow_id, ordinal, pid) VALUES (%s, %s, %s)", (current().id, ordinal, int(version))
        )
        return ordinal

    @step
    async def work(ordinal: int) -> int:
        note(notes, f"work {ordinal}")
        await asyncio.sleep(0.03)
        return ordinal

    @step(match="name")
    async def price(order: int, currency: str) -> str:
        return f"{order} {currency}"

    @step
    async def ship(order: int) -> str:
        return f"shipped by {version}"

    async def rounds(count: int) -> None:
        for ordinal in range(count):
            await put(ordinal)
            if ordinal == count // 2:
                await sleep(timedelta(milliseconds=20))
            await work(ordinal)

    if version == "1":

        @step
        async def charge(order: int) -> str:
            return "charged by 1"

        @app.workflow(name="order")
        async def first_order(order: int, count: int) -> list[str]:
            done = [await price(order, "EUR"), await charge(order)]
            await rounds(count)
            return [*done, await ship(order)]

    else:

        @step(name="charge")
        async def take_payment(order: int) -> str:
            return "charged by 2"

        @step
        async def insure(order: int) -> str:
            return "insured"

        @app.workflow(name="order")
        async def second_order(order: int, count: int) -> list[str]:
            done = [await price(order, "USD"), await take_payment(order)]
            if patched("insurance"):
                done.append(await insure(order))
            await rounds(count)
            return [*done, await ship(order)]

    return app
