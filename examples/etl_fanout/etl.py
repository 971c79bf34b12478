"""Load a folder of CSV files into PostgreSQL: a child workflow for each file, a transaction for each chunk of rows.

Its table is in the app's own database, so the rows of a chunk and the checkpoint that says so commit together: a crash
loads nothing twice, and loses nothing.
"""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

import perdure
from perdure import App, WorkflowFailed, step

app = App("etl")
TABLE = "public.etl_sales"
CHUNK = 500


@dataclass
class Summary:
    """What became of a folder: rows by file, and what was wrong with the others."""

    loaded: dict[str, int]
    failed: dict[str, str]


@asynccontextmanager
async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection to the app's database, for the steps that write to our own table."""
    url = os.environ.get("PERDURE_DATABASE_URL") or await asyncio.to_thread(perdure.embedded.embedded_url)
    async with await psycopg.AsyncConnection.connect(url) as opened:
        yield opened


@step(idempotent=True)
def list_files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.csv"))


@step(idempotent=True)
def count_rows(file: str) -> int:
    """Read it once, so that a broken file fails before any of it is loaded."""
    return sum(1 for _ in _rows(file))


@app.transaction(using=lambda: connection())
async def load(on: psycopg.AsyncConnection[Any], file: str, first: int) -> int:
    """The rows of one chunk; a row that is there already takes the new values."""
    rows = list(_rows(file))[first : first + CHUNK]
    async with on.cursor() as cursor:
        await cursor.executemany(
            f"INSERT INTO {TABLE} (sale_id, cents) VALUES (%s, %s) "
            "ON CONFLICT (sale_id) DO UPDATE SET cents = excluded.cents",
            rows,
        )
    return len(rows)


def _rows(file: str) -> list[tuple[int, int]]:
    with open(file, newline="", encoding="utf-8") as text:
        try:
            return [(int(row["sale_id"]), int(row["cents"])) for row in csv.DictReader(text)]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{Path(file).name} is broken: {error}") from None


@app.workflow
async def load_file(file: str) -> int:
    count = await count_rows(file)

    async def chunk(first: int) -> int:
        return await load(file, first)

    return sum(await perdure.map(chunk, range(0, count, CHUNK), concurrency=4))


@app.workflow
async def load_folder(folder: str) -> Summary:
    """All files at the same time, on whatever workers there are. One that is broken doesn't stop the others."""
    files = await list_files(folder)
    outcomes = await asyncio.gather(*(load_file(file) for file in files), return_exceptions=True)
    summary = Summary({}, {})
    for file, outcome in zip(files, outcomes, strict=True):
        if isinstance(outcome, int):
            summary.loaded[Path(file).name] = outcome
        elif isinstance(outcome, WorkflowFailed | ValueError):
            summary.failed[Path(file).name] = str(outcome).splitlines()[0]
        else:
            raise outcome
    return summary


def sample(folder: Path, files: int, rows: int) -> None:
    """Some files to play with."""
    for number in range(files):
        lines = [f"{number * rows + row},{row * 10}" for row in range(rows)]
        (folder / f"day{number}.csv").write_text("\n".join(["sale_id,cents", *lines]), encoding="utf-8")


async def prepare() -> None:
    async with connection() as on:
        await on.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} (sale_id int PRIMARY KEY, cents int NOT NULL)")


async def main(folder: str) -> None:
    path = Path(folder)
    path.mkdir(exist_ok=True)
    if not any(path.glob("*.csv")):
        sample(path, files=10, rows=2000)
    async with app, app.worker():
        await prepare()
        print(await app.run(load_folder(str(path.resolve()))))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "sales"))
