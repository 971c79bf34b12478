"""Expenses that a manager approves: a small app, and the suite that goes with it in test_approvals.py."""

from __future__ import annotations

from datetime import timedelta

from perdure import App, Retry, recv, sleep, step

app = App("approvals")


@step(retry=Retry(max_attempts=3, initial=timedelta(minutes=1)), idempotent=True)
async def notify(who: str, text: str) -> None:
    """Send a mail; here it is only printed."""
    print(f"to {who}: {text}")


@step
async def transfer(to: str, cents: int) -> str:
    """Pay; the id of the workflow and the step would go along as an idempotency key."""
    return f"transfer of {cents} to {to}"


@app.workflow
async def expense(employee: str, cents: int) -> str:
    """Ask the manager, remind them after two days, and pay a day after the approval."""
    await notify("manager", f"{employee} asks for {cents}")
    try:
        approved = await recv("approval", type=bool, timeout=timedelta(days=2))
    except TimeoutError:
        await notify("manager", f"{employee} still waits")
        approved = await recv("approval", type=bool)
    if not approved:
        return "refused"
    await sleep(timedelta(days=1))
    return await transfer(employee, cents)
