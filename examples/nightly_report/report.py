"""A report every night at two, in the customer's time zone: a workflow that sleeps, reports, and begins again."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from perdure import App, continue_as_new, now, set_event, sleep_until, step

app = App("reports")
AT = time(2, 0)


def next_night(after: datetime, zone: str) -> datetime:
    """The next 02:00 there, as an instant: also in the nights in which clocks are changed.

    Where 02:00 doesn't exist (spring), it is the instant at which it would have been; where it is there twice (autumn),
    the first.
    """
    local = after.astimezone(ZoneInfo(zone))
    day = local.date()
    while True:
        at = datetime.combine(day, AT, ZoneInfo(zone)).astimezone(UTC)
        if at > after:
            return at
        day += timedelta(days=1)


@step(idempotent=True)
async def make_report(customer: str, day: str) -> str:
    """Whatever a report takes; a step, so that it is made once a night."""
    return f"{customer}: all quiet on {day}"


@app.workflow
async def nightly(customer: str, zone: str) -> None:
    """One night; then it begins again, so its history never grows."""
    at = next_night(now(), zone)
    await sleep_until(at)
    report = await make_report(customer, at.astimezone(ZoneInfo(zone)).date().isoformat())
    await set_event("report", report)
    await continue_as_new(nightly(customer, zone))


async def main() -> None:
    async with app, app.worker():
        # However many processes do this, there is one workflow for each customer.
        handle = await app.start(nightly("acme", "Europe/Berlin"), key="nightly acme")
        print("the next report:", next_night(datetime.now(UTC), "Europe/Berlin"))
        print(await handle.get_event("report", type=str))


if __name__ == "__main__":
    asyncio.run(main())
