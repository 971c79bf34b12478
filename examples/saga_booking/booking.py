"""A trip: flight, hotel, car. Whatever can't be booked, or is cancelled on the way, is undone."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from perdure import App, Retry, current, saga, sleep, step


class SoldOut(Exception):
    """There is nothing left of it."""


app = App("travel", errors=[SoldOut])

BOOKED: dict[str, str] = {}
"""What airlines, hotels and garages have in their books, by the idempotency keys."""


@step(idempotent=True, raises=(SoldOut,))
async def book(what: str, city: str) -> str:
    """Book it, once: who asks again under the same key gets the same booking."""
    if city == "Atlantis" and what == "car":
        raise SoldOut(f"no {what} in {city}")
    key = current().idempotency_key
    BOOKED[key] = f"{what} in {city}"
    return key


@step(idempotent=True, retry=Retry(max_attempts=10, maximum=timedelta(minutes=5)))
async def cancel_booking(reference: str) -> None:
    """Undo it; undoing what isn't there is no error."""
    BOOKED.pop(reference, None)


@app.workflow
async def trip(city: str, *, think_it_over: timedelta = timedelta(0)) -> list[str]:
    """Book all three, and give the traveller some time to cancel."""
    async with saga() as undo:
        references: list[str] = []
        for what in ("flight", "hotel", "car"):
            reference = await book(what, city)
            undo.compensate(cancel_booking, reference)
            references.append(reference)
        await sleep(think_it_over)
    return references


async def main() -> None:
    async with app, app.worker():
        print("booked:", await app.run(trip("Oslo")))
        try:
            await app.run(trip("Atlantis"))
        except SoldOut as error:
            print("nothing booked:", error)


if __name__ == "__main__":
    asyncio.run(main())
