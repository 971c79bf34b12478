"""Methods as workflows and steps, on instances that the application makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from acceptance.support import SOON, Gate, interrupted, served
from perdure import App, DuplicateName, InvalidArguments, Refused, WrongPlace, answering, step, workflow

Sql = Callable[..., list[Any]]


class Bank:
    def __init__(self, fee: int) -> None:
        self.fee = fee

    async def charge(self, cents: int) -> int:
        return cents + self.fee


class Base:
    @workflow
    async def ping(self) -> str:
        return "pong"


class Shop(Base):
    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    @step
    async def charge(self, cents: int) -> int:
        return await self._bank.charge(cents)

    @workflow(queue="shops")
    async def checkout(self, order_id: int, *, express: bool = False) -> int:
        paid = await self.charge(order_id)
        return await self.nested(paid) if express else paid

    @workflow
    async def nested(self, paid: int) -> int:
        return -paid

    @workflow
    async def sells(self) -> str:
        async with answering("price", type=int) as question:
            question.reply(question.value + self._bank.fee)
            return "sold"

    @sells.validator("price")
    def _is_fair(self, price: int) -> None:
        if price < self._bank.fee:
            raise Refused("too low")


async def test_each_instance_has_its_workflows_and_what_it_was_made_with(app: App, sql: Sql) -> None:
    here = app.register("here", Shop(Bank(1)))
    there = app.register("there", Shop(Bank(100)))
    async with app.worker():
        assert await app.run(here.checkout(5)) == 6
        assert await app.run(there.checkout(5, express=True)) == -105
        assert await app.run(here.ping()) == "pong"
        handle = await app.start(there.sells())
        with pytest.raises(Refused, match="too low"):
            await handle.ask("price", 5, type=int)
        assert await handle.ask("price", 500, type=int) == 600
        assert await handle.result(timeout=SOON) == "sold"
    assert sql("SELECT name, queue, parent_id IS NULL FROM workflows ORDER BY created_at, name") == [
        ("here.checkout", "shops", True),
        ("there.checkout", "shops", True),
        ("there.nested", "default", False),
        ("here.ping", "default", True),
        ("there.sells", "default", True),
    ]
    assert app.names == tuple(
        sorted(f"{name}.{each}" for name in ("here", "there") for each in ("checkout", "nested", "ping", "sells"))
    )


async def test_a_replay_runs_on_an_instance_too(app: App) -> None:
    gate = Gate()

    class Waits:
        @step
        async def passes(self) -> int:
            await gate.passed()
            return gate.arrivals

        @workflow
        async def flow(self) -> int:
            return await self.passes()

    waits = app.register("waits", Waits())
    async with interrupted(app, waits.flow(), gate) as handle:
        pass
    assert await served(app, handle) == 2


def test_what_cannot_be_registered_or_called(app: App) -> None:
    with pytest.raises(ValueError, match="no method of 'Bank' is a workflow"):
        app.register("bank", Bank(1))
    loose = Shop(Bank(1))
    with pytest.raises(WrongPlace, match=r"app\.register"):
        loose.checkout(1)
    app.register("shop", loose)
    with pytest.raises(InvalidArguments):
        loose.checkout()  # type: ignore[call-arg]
    with pytest.raises(DuplicateName):
        app.register("shop", Shop(Bank(2)))
    with pytest.raises(ValueError, match="instance name"):
        app.register("a/b", loose)
