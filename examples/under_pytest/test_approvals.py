"""A user's own suite: days pass in milliseconds, services are stand-ins, and the workflow is crashed everywhere."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from approvals import app, expense, notify, transfer
from perdure import Handle, Status


async def test_an_approved_expense_is_paid_a_day_later(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        paid = kit.fake(transfer, returns="paid")
        handle = await app.start(expense("ada", 4200))
        await handle.send("approval", True)
        await kit.clock.advance(timedelta(hours=23))
        assert (await handle.status(), paid.calls) == (Status.WAITING, [])
        await kit.clock.advance(timedelta(hours=1))
        assert await handle.result() == "paid"
        assert [call.args for call in paid.calls] == [("ada", 4200)]


async def test_a_manager_who_forgets_is_reminded(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        mails = kit.fake(notify, returns=None)
        handle = await app.start(expense("ada", 4200))
        await kit.clock.advance(timedelta(days=2))
        assert [call.args[1] for call in mails.calls] == ["ada asks for 4200", "ada still waits"]
        await handle.send("approval", False)
        assert await kit.finish(handle) == "refused"


async def test_a_mail_server_that_is_away_is_tried_three_times(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        mails = kit.fake(notify, raises=ConnectionError("away"))
        handle = await app.start(expense("ada", 4200))
        with pytest.raises(ConnectionError):
            await kit.finish(handle)
        assert len(mails.calls) == 3


async def test_todays_code_fits_what_was_recorded(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        handle = await app.start(expense("ada", 4200))
        await handle.send("approval", True)
        await kit.finish(handle)
        await kit.replay(handle)


async def test_it_comes_to_the_same_end_wherever_it_crashes(perdure_app: Any) -> None:
    async def approve(handle: Handle[str]) -> None:
        await handle.send("approval", True)

    async with perdure_app(app) as kit:
        report = await kit.crash_everywhere(expense("ada", 4200), drive=approve)
        assert report.reran == ("transfer",), "the bank needs an idempotency key"
