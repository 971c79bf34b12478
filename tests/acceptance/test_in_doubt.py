"""Steps in doubt: an attempt that a crash cut short, and what the author wants to be done about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import SOON, Gate, interrupted, served
from perdure import App, Rerun, Retry, Status, current, step, telemetry

Sql = Callable[..., list[Any]]
QUICK = Retry(max_attempts=3, initial=timedelta(milliseconds=1))


class Bank:
    """The other system: what it was asked to do, under which key."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.paid: list[str] = []
        self.asked: list[str] = []
        self.stands_still = True

    async def pay(self, *, took_effect: bool) -> str:
        if took_effect or not self.stands_still:
            self.paid.append(current().idempotency_key)
        if self.stands_still:
            await self.gate.passed()
        return f"receipt {len(self.paid)}"


async def crashed(app: App, invocation: Any, bank: Bank) -> Any:
    """Its handle, after its worker was taken away from it in the middle of the payment."""
    async with interrupted(app, invocation, bank.gate) as handle:
        bank.stands_still = False
    return handle


async def test_an_attempt_that_ended_is_in_no_doubt(app: App, sql: Sql) -> None:
    ran: list[int] = []

    async def ask(number: int) -> str:
        raise AssertionError("it knows")

    @step(in_doubt=ask, retry=QUICK)
    async def pay(number: int) -> str:
        ran.append(current().attempt)
        if current().attempt < 3:
            raise ValueError("declined")
        return f"receipt {number}"

    @app.workflow
    async def flow() -> str:
        return await pay(1)

    async with app.worker():
        assert await app.run(flow()) == "receipt 1"
    assert ran == [1, 2, 3]
    assert sql("SELECT key FROM checkpoints WHERE kind = 'intent' ORDER BY key") == [
        ("pay#i1",), ("pay#i2",), ("pay#i3",)
    ]  # fmt: skip


async def test_an_intent_is_durable_before_the_body_begins(app: App, sql: Sql) -> None:
    @step(in_doubt="park")
    async def pay() -> int:
        ((found,),) = await asyncio.to_thread(sql, "SELECT count(*) FROM checkpoints WHERE key = 'pay#i1'")
        return int(found)

    @app.workflow
    async def flow() -> int:
        return await pay()

    async with app.worker():
        assert await app.run(flow()) == 1


@pytest.mark.parametrize("took_effect", [True, False])
async def test_the_authors_function_says_what_has_become_of_it(app: App, took_effect: bool) -> None:
    bank = Bank()

    async def ask(number: int) -> str:
        bank.asked.append(current().idempotency_key)
        if current().idempotency_key in bank.paid:
            return "receipt found"
        raise Rerun

    @step(in_doubt=ask)
    async def pay(number: int) -> str:
        return await bank.pay(took_effect=took_effect)

    @app.workflow
    async def flow() -> str:
        return await pay(1)

    handle = await crashed(app, flow(), bank)
    assert await served(app, handle) == ("receipt found" if took_effect else "receipt 1")
    assert bank.paid == [f"{handle.id}/pay"]
    assert bank.asked == [f"{handle.id}/pay"]


async def test_a_function_that_cannot_know_yet_is_asked_again(app: App) -> None:
    bank = Bank()

    async def ask() -> str:
        bank.asked.append("asked")
        if len(bank.asked) < 3:
            raise ConnectionError("the bank is closed")
        return "receipt found"

    @step(in_doubt=ask, retry=QUICK)
    async def pay() -> str:
        return await bank.pay(took_effect=True)

    @app.workflow
    async def flow() -> str:
        return await pay()

    handle = await crashed(app, flow(), bank)
    assert await served(app, handle) == "receipt found"
    assert (len(bank.paid), len(bank.asked)) == (1, 3)


async def test_a_step_in_doubt_waits_for_an_operator(app: App, events: Any, sql: Sql) -> None:
    bank = Bank()

    @step(in_doubt="park")
    async def pay() -> str:
        return await bank.pay(took_effect=True)

    @app.workflow
    async def flow() -> str:
        return await pay()

    handle = await crashed(app, flow(), bank)
    async with app.worker():
        await events.wait_for(telemetry.WorkflowSuspended)
        info = await handle.describe()
        assert (info.status, info.waiting_for) == (Status.WAITING, "operator")
        (parked,) = await handle.steps()
        assert (parked.status, parked.error["type"]) == ("parked", "perdure.errors.StepInDoubt")
        assert "see whether it took effect" in parked.error["message"]
        assert len(bank.paid) == 1
        await handle.resume()
        assert await handle.result(timeout=SOON) == "receipt 2"
    assert sql("SELECT count(*) FROM checkpoints WHERE kind = 'intent'") == [(1,)]


async def test_a_doubt_outlives_a_crash_while_it_is_looked_into(app: App) -> None:
    bank, looking = Bank(), Gate()

    async def ask() -> str:
        bank.asked.append("asked")
        await looking.passed()
        return "receipt found"

    @step(in_doubt=ask)
    async def pay() -> str:
        return await bank.pay(took_effect=True)

    @app.workflow
    async def flow() -> str:
        return await pay()

    handle = await crashed(app, flow(), bank)
    async with app.worker(grace=timedelta(0)):
        await looking.reached()
    looking.open()
    assert await served(app, handle) == "receipt found"
    assert (len(bank.paid), len(bank.asked)) == (1, 2)


async def test_a_method_is_asked_on_its_instance(app: App) -> None:
    bank = Bank()

    class Payments:
        def __init__(self, name: str) -> None:
            self.name = name

        async def ask(self, number: int) -> str:
            return f"found by {self.name} for {number}"

        @step(in_doubt=ask)
        async def pay(self, number: int) -> str:
            return await bank.pay(took_effect=True)

    payments = Payments("ada")

    @app.workflow
    async def flow() -> str:
        return await payments.pay(7)

    handle = await crashed(app, flow(), bank)
    assert await served(app, handle) == "found by ada for 7"


def test_what_makes_no_sense_is_refused() -> None:
    async def pay() -> None: ...

    with pytest.raises(ValueError, match="use 'rerun', 'park' or an async def"):
        step(in_doubt="ask")(pay)  # type: ignore[call-overload] # pyright: ignore
    with pytest.raises(ValueError, match="an async def"):
        step(in_doubt=lambda: None)(pay)  # type: ignore[call-overload] # pyright: ignore
    with pytest.raises(ValueError, match="never in doubt"):
        step(pure=True, in_doubt="park")(pay)
