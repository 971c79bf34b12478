"""The workload: a bank whose books must balance, whatever happens to its workers.

Money moves by transactional steps, each with an entry in the ledger, which has no unique key: what is done twice shows.
Plain steps leave a row each time they run. There are children, messages, sleeps, and sagas that undo.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from perdure import App, Retry, current, recv, saga, send, sleep, step

SCHEMA = "bank"
URL = "PERDURE_DATABASE_URL"
ACCOUNTS = 50
RECEIPTS = 3

app = App("bank", schema=SCHEMA)
patient = Retry(max_attempts=None, initial=timedelta(milliseconds=50), maximum=timedelta(seconds=1))

LEDGER = f"""
CREATE SCHEMA ledger;
CREATE TABLE ledger.accounts (id int PRIMARY KEY, balance int8 NOT NULL);
INSERT INTO ledger.accounts SELECT number, 0 FROM generate_series(1, {ACCOUNTS}) AS number;
CREATE TABLE ledger.entries (workflow_id uuid NOT NULL, key text NOT NULL, account int NOT NULL, cents int8 NOT NULL);
CREATE TABLE ledger.effects (workflow_id uuid NOT NULL, key text NOT NULL);
"""


class NoSeat(Exception):
    """What every other trip fails with."""


@asynccontextmanager
async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(os.environ[URL], connect_timeout=3) as opened:
        yield opened


@app.transaction(using=connection, retry=patient)
async def book(opened: psycopg.AsyncConnection[Any], account: int, cents: int) -> None:
    """Add to an account, with an entry."""
    await opened.execute("UPDATE ledger.accounts SET balance = balance + %s WHERE id = %s", (cents, account))
    key = current().idempotency_key.partition("/")[2]
    await opened.execute("INSERT INTO ledger.entries VALUES (%s, %s, %s, %s)", (current().id, key, account, cents))


@step(retry=patient)
async def tell(number: int) -> int:
    """A plain step: it runs at least once, and leaves a row each time."""
    async with connection() as opened:
        await opened.execute("INSERT INTO ledger.effects VALUES (%s, %s)", (current().id, f"tell {number}"))
    return number


@step
async def reserve(number: int) -> None:
    """Every other trip finds no seat."""
    if number % 2:
        raise NoSeat(number)


@app.workflow
async def transfer(source: int, target: int, cents: int) -> int:
    await book(source, -cents)
    await tell(cents)
    await sleep(timedelta(milliseconds=cents % 7 * 100))
    await book(target, cents)
    return cents


@app.workflow
async def deliver(to: str, receipts: int) -> None:
    for number in range(receipts):
        await send(UUID(to), "receipts", number)
        await tell(number)


@app.workflow
async def batch(number: int, size: int) -> dict[str, Any]:
    """Children, and messages from one of them."""
    await app.start(deliver(str(current().id), RECEIPTS))
    moved = await asyncio.gather(
        *(
            transfer(1 + (number + place) % ACCOUNTS, 1 + (number * 7 + place) % ACCOUNTS, 1 + place)
            for place in range(size)
        )
    )
    received = [await recv("receipts", type=int) for _ in range(RECEIPTS)]
    return {"moved": sum(moved), "received": received}


@app.workflow
async def trip(number: int) -> str:
    """What was booked is booked back where there is no seat."""
    account = 1 + number % ACCOUNTS
    async with saga() as undo:
        await book(account, -100)
        undo.compensate(book, account, 100)
        await reserve(number)
        await book(ACCOUNTS + 1 - account, 100)
    return "booked"
