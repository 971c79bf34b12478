"""A subscription that lives for months: charged monthly, reminded, suspended, changed and cancelled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from perdure import App, Retry, continue_as_new, recv, set_attributes, set_event, step

app = App("subscriptions")
MONTH = timedelta(days=30)
GRACE = timedelta(days=7)


class CardDeclined(Exception):
    """The bank says no."""


@dataclass
class Account:
    """What a subscription carries from month to month."""

    customer: str
    cents: int
    month: int = 1


@dataclass
class Change:
    """What a customer sends: another plan, the end, or a card that works."""

    what: Literal["plan", "cancel", "card"]
    cents: int = 0


@step(idempotent=True, retry=Retry(max_attempts=3, initial=timedelta(hours=1), factor=4), raises=(CardDeclined,))
async def charge(customer: str, cents: int) -> str:
    """Charge the card; the idempotency key differs from month to month, and not from attempt to attempt."""
    return f"{customer} paid {cents}"


@step(idempotent=True)
async def mail(customer: str, text: str) -> None:
    print(f"to {customer}: {text}")


@app.workflow
async def subscription(account: Account) -> str:
    """One month; the next one begins with an empty history."""
    if not await _pay(account):
        await set_attributes({"state": "ended"})
        return f"ended in month {account.month}: not paid"
    await set_attributes({"state": "active", "month": account.month})
    await set_event("state", f"paid for month {account.month}")
    try:
        change = await recv("change", type=Change, timeout=MONTH)
    except TimeoutError:
        change = Change("card")
    if change.what == "cancel":
        await set_attributes({"state": "ended"})
        return f"cancelled in month {account.month}"
    cents = change.cents if change.what == "plan" else account.cents
    return await continue_as_new(subscription(Account(account.customer, cents, account.month + 1)))


async def _pay(account: Account) -> bool:
    """Charge; while the card is declined, remind, and wait for another one. False: in vain."""
    for reminder in range(3):
        try:
            await charge(account.customer, account.cents)
            return True
        except CardDeclined:
            await set_attributes({"state": "unpaid"})
            await mail(account.customer, f"please check your card (reminder {reminder + 1})")
            try:
                change = await recv("change", type=Change, timeout=GRACE)
            except TimeoutError:
                continue
            if change.what == "cancel":
                return False
    return False


async def main() -> None:
    async with app, app.worker():
        handle = await app.start(subscription(Account("ada", 999)), key="subscription of ada")
        print(await handle.get_event("state", type=str))
        await handle.send("change", Change("cancel"))
        print(await handle.result())


if __name__ == "__main__":
    asyncio.run(main())
