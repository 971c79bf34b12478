"""Nothing stays booked that the trip doesn't need."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from booking import BOOKED, SoldOut, app, trip
from perdure import Handle, WorkflowCancelled


@pytest.fixture(autouse=True)
def _empty_books() -> Iterator[None]:
    BOOKED.clear()
    yield
    BOOKED.clear()


async def test_a_trip_books_all_three(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        references = await kit.run(trip("Oslo"))
    assert [BOOKED[reference] for reference in references] == ["flight in Oslo", "hotel in Oslo", "car in Oslo"]


async def test_what_was_booked_is_undone_where_the_rest_is_sold_out(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        with pytest.raises(SoldOut, match="no car in Atlantis"):
            await kit.run(trip("Atlantis"))
        (info,) = [each async for each in app.workflows()]
        steps = [each.name for each in await app.handle(info.id).steps()]
    assert steps == ["book", "book", "book", "cancel_booking", "cancel_booking"]
    assert BOOKED == {}


async def test_who_changes_their_mind_pays_nothing(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(trip("Oslo", think_it_over=timedelta(days=1)))
        await kit.idle()
        assert len(BOOKED) == 3
        await handle.cancel(reason="changed my mind")
        with pytest.raises(WorkflowCancelled, match="changed my mind"):
            await kit.finish(handle)
    assert BOOKED == {}


async def test_a_crash_on_the_way_or_while_it_is_undone_leaves_nothing_behind(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        report = await kit.crash_everywhere(trip("Atlantis"))
        assert "before step 'cancel_booking' (attempt 1)" in report.boundaries
        assert BOOKED == {}

        async def cancel(handle: Handle[list[str]]) -> None:
            await kit.idle()
            await handle.cancel()

        await kit.crash_everywhere(trip("Oslo", think_it_over=timedelta(hours=1)), drive=cancel)
    assert BOOKED == {}
