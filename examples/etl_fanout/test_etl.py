"""All rows are there, once, whatever is broken and wherever it crashes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import etl


@pytest.fixture
async def kit(perdure_app: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A kit, whose database has a table of the test's own."""
    async with perdure_app(etl.app) as kit:

        @asynccontextmanager
        async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
            async with await psycopg.AsyncConnection.connect(kit.database_url) as opened:
                yield opened

        monkeypatch.setattr(etl, "connection", connection)
        monkeypatch.setattr(etl, "TABLE", f"public.sales_{uuid4().hex}")
        await etl.prepare()
        yield kit
        async with connection() as on:
            await on.execute(f"DROP TABLE {etl.TABLE}")


async def loaded(kit: Any) -> tuple[int, int]:
    async with await psycopg.AsyncConnection.connect(kit.database_url) as on:
        cursor = await on.execute(f"SELECT count(*), coalesce(sum(cents), 0)::int FROM {etl.TABLE}")
        rows = await cursor.fetchone()
        assert rows is not None
        return rows


async def test_files_are_loaded_each_by_a_child(kit: Any, tmp_path: Path) -> None:
    etl.sample(tmp_path, files=3, rows=1200)
    summary = await kit.run(etl.load_folder(str(tmp_path)))
    assert summary == etl.Summary({f"day{number}.csv": 1200 for number in range(3)}, {})
    assert await loaded(kit) == (3600, 3 * sum(10 * row for row in range(1200)))


async def test_a_broken_file_fails_alone(kit: Any, tmp_path: Path) -> None:
    etl.sample(tmp_path, files=2, rows=10)
    (tmp_path / "day9.csv").write_text("sale_id,cents\n1,much\n", encoding="utf-8")
    summary = await kit.run(etl.load_folder(str(tmp_path)))
    assert list(summary.loaded) == ["day0.csv", "day1.csv"]
    assert "day9.csv is broken" in summary.failed["day9.csv"]
    assert (await loaded(kit))[0] == 20


async def test_a_crash_loads_nothing_twice(kit: Any, tmp_path: Path) -> None:
    etl.sample(tmp_path, files=1, rows=600)
    report = await kit.crash_everywhere(etl.load_folder(str(tmp_path)))
    assert report.boundaries
    assert (await loaded(kit))[0] == 600
