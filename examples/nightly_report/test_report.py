"""Nights pass in milliseconds; also those in which clocks are changed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from report import app, next_night, nightly

BERLIN = "Europe/Berlin"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (datetime(2026, 1, 10, 0, 30, tzinfo=UTC), datetime(2026, 1, 10, 1, 0, tzinfo=UTC)),
        (datetime(2026, 1, 10, 1, 0, tzinfo=UTC), datetime(2026, 1, 11, 1, 0, tzinfo=UTC)),
        (datetime(2026, 3, 28, 12, 0, tzinfo=UTC), datetime(2026, 3, 29, 1, 0, tzinfo=UTC)),  # 02:00 doesn't exist
        (datetime(2026, 3, 29, 12, 0, tzinfo=UTC), datetime(2026, 3, 30, 0, 0, tzinfo=UTC)),  # summer time
        (datetime(2026, 10, 24, 12, 0, tzinfo=UTC), datetime(2026, 10, 25, 0, 0, tzinfo=UTC)),  # 02:00 is there twice
        (datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 10, 26, 1, 0, tzinfo=UTC)),
    ],
)
def test_the_next_night_is_at_two_over_there(after: datetime, expected: datetime) -> None:
    assert next_night(after, BERLIN) == expected


async def test_there_is_a_report_each_night_and_the_history_stays_short(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(nightly("acme", BERLIN), key="nightly acme")
        days: list[str] = []
        for _ in range(5):
            await kit.clock.advance(timedelta(days=1))
            await kit.idle()
            days.append((await handle.get_event("report", type=str)).rpartition(" ")[2])
        assert days == sorted(set(days)), "another day each night"
        assert len(days) == 5
        assert len(await handle.steps()) <= 3
        await handle.terminate()


async def test_many_processes_start_one(perdure_app: Any) -> None:
    async with perdure_app(app):
        starts = [app.start(nightly("acme", BERLIN), key="nightly acme") for _ in range(10)]
        handles = await asyncio.gather(*starts)
        assert len({handle.id for handle in handles}) == 1
        assert sum(handle.started for handle in handles) == 1
        await handles[0].terminate()
