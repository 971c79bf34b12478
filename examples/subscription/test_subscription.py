"""A year in a second: payments, another plan, a card that is declined, and a history that stays short."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from perdure import Handle
from subscription import GRACE, MONTH, Account, CardDeclined, Change, app, charge, mail, subscription


async def test_a_year_of_it(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        paid = kit.fake(charge, returns="paid")
        handle = await app.start(subscription(Account("ada", 999)), key="subscription of ada")
        for month in range(1, 13):
            await kit.idle()
            assert await handle.get_event("state", type=str) == f"paid for month {month}"
            assert len(await handle.steps()) <= 6, "the history doesn't grow"
            await kit.clock.advance(MONTH)
        assert [call.args for call in paid.calls][:12] == [("ada", 999)] * 12
        active = [each.id async for each in app.workflows(attributes={"state": "active"})]
        assert active == [handle.id]
        await handle.send("change", Change("cancel"))
        assert await handle.result() == "cancelled in month 13"


async def test_another_plan_counts_from_the_next_month_on(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        paid = kit.fake(charge, returns="paid")
        handle = await app.start(subscription(Account("ada", 999)))
        await handle.send("change", Change("plan", 1999))
        await kit.idle()
        assert [call.args for call in paid.calls] == [("ada", 999), ("ada", 1999)]
        await handle.terminate()


async def test_who_does_not_pay_is_reminded_and_ended(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        kit.fake(charge, raises=CardDeclined())
        mails = kit.fake(mail, returns=None)
        handle = await app.start(subscription(Account("ada", 999)))
        await kit.clock.advance(timedelta(days=1))
        assert (await handle.describe()).attributes == {"state": "unpaid"}
        assert await kit.finish(handle) == "ended in month 1: not paid"
        assert len(mails.calls) == 3


async def test_a_card_that_works_again_goes_on(perdure_app: Any) -> None:
    async with perdure_app(app) as kit:
        declining = kit.fake(charge, raises=CardDeclined())
        handle = await app.start(subscription(Account("ada", 999)))
        await kit.clock.advance(GRACE / 2)
        declining.restore()
        await handle.send("change", Change("card"))
        await kit.idle()
        assert await handle.get_event("state", type=str) == "paid for month 1"
        await handle.terminate()


async def test_no_crash_charges_another_month(perdure_app: Any) -> None:
    async def cancel(handle: Handle[str]) -> None:
        await handle.send("change", Change("plan", 1999))
        await handle.send("change", Change("cancel"))

    async with perdure_app(app) as kit:
        await kit.crash_everywhere(subscription(Account("ada", 999)), drive=cancel)
