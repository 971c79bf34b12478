"""What a newcomer tries first."""

from __future__ import annotations

import asyncio

from perdure import App, step


@step
async def charge(order_id: int, cents: int) -> str:
    return f"payment-{order_id}-{cents}"


@step
def send_receipt(to: str, payment: str) -> None: ...


async def test_a_workflow_runs_its_steps_and_returns(app: App) -> None:
    @app.workflow
    async def checkout(order_id: int) -> str:
        payment = await charge(order_id, 999)
        await send_receipt("a@example.org", payment)
        return payment

    async with app.worker():
        assert await app.run(checkout(42)) == "payment-42-999"


async def test_steps_at_the_same_time_are_recorded_under_keys_of_their_own(app: App) -> None:
    @app.workflow
    async def many(count: int) -> list[str]:
        return list(await asyncio.gather(*(charge(number, 1) for number in range(count))))

    async with app.worker():
        handle = await app.start(many(3))
        assert await handle.result() == ["payment-0-1", "payment-1-1", "payment-2-1"]
    assert sorted(step.key for step in await handle.steps()) == ["charge", "charge#2", "charge#3"]
