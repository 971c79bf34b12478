"""Fork and rewind: a workflow goes on from an earlier step, in a copy of it, or in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from acceptance.support import SOON, Gate, hold
from perdure import (
    App,
    SerializationError,
    Status,
    UnknownStep,
    WorkflowFailed,
    WorkflowNotFound,
    WrongState,
    recv,
    step,
)

Sql = Callable[..., list[Any]]


class Shop:
    """Steps that count, and one that fails as long as it is broken."""

    def __init__(self, app: App) -> None:
        self.calls: list[str] = []
        self.is_broken = False

        @step
        async def price(item: str) -> int:
            self.calls.append(f"price {item}")
            return len(item)

        @step
        async def charge(cents: int) -> str:
            self.calls.append(f"charge {cents}")
            if self.is_broken:
                raise LookupError("no card")
            return f"paid {cents}"

        @step
        async def send(payment: str) -> None:
            self.calls.append(f"send {payment}")

        @app.workflow
        async def order(item: str) -> str:
            payment = await charge(await price(item))
            await send(payment)
            return payment

        self.order = order


async def test_a_fork_repeats_nothing_up_to_the_step_and_everything_behind_it(app: App, sql: Sql) -> None:
    shop = Shop(app)
    async with app.worker():
        handle = await app.start(shop.order("book"), key="order-1", attributes={"a": 1})
        await handle.result(timeout=SOON)
        before = sql("SELECT * FROM checkpoints ORDER BY key")
        shop.calls.clear()
        fork = await app.fork(handle.id, after="price")
        assert await fork.result(timeout=SOON) == "paid 4"
        assert shop.calls == ["charge 4", "send paid 4"]
        assert sql("SELECT * FROM checkpoints WHERE workflow_id = %s ORDER BY key", handle.id) == before
    info = await fork.describe()
    assert (info.forked_from, info.key, info.name, info.attributes) == (handle.id, None, "order", {"a": 1})
    assert (await handle.describe()).forked_from is None


async def test_a_fork_with_other_outputs(app: App) -> None:
    shop = Shop(app)
    async with app.worker():
        handle = await app.start(shop.order("book"))
        await handle.result(timeout=SOON)
        shop.calls.clear()
        fork = await app.fork(handle.id, after="price", patch={"price": 7})
        assert await fork.result(timeout=SOON) == "paid 7"
        whole = await app.fork(handle.id, patch={"charge": "a gift"})
        assert await whole.result(timeout=SOON) == "a gift"
        scratch = await app.fork(handle.id, after="$input")
        assert await scratch.result(timeout=SOON) == "paid 4"
    assert shop.calls == ["charge 7", "send paid 7", "send a gift", "price book", "charge 4", "send paid 4"]


async def test_a_fork_of_what_failed_tries_that_again(app: App) -> None:
    shop = Shop(app)
    shop.is_broken = True
    async with app.worker():
        handle = await app.start(shop.order("book"))
        with pytest.raises(LookupError):
            await handle.result(timeout=SOON)
        shop.is_broken = False
        fork = await app.fork(handle.id)
        assert await fork.result(timeout=SOON) == "paid 4"
        assert await handle.status() is Status.ERROR


async def test_rewind_goes_on_in_place_and_keeps_what_was(app: App, sql: Sql) -> None:
    shop = Shop(app)
    async with app.worker():
        handle = await app.start(shop.order("book"), key="order-1")
        await handle.result(timeout=SOON)
        shop.calls.clear()
        again = await app.rewind(handle.id, after="price", patch={"price": 9})
        assert again.id == handle.id
        assert await again.result(timeout=SOON) == "paid 9"
        assert shop.calls == ["charge 9", "send paid 9"]
        shop.calls.clear()
        await app.rewind(handle.id, after="$input")
        assert await handle.result(timeout=SOON) == "paid 4"
        assert shop.calls == ["price book", "charge 4", "send paid 4"]
    history = "SELECT substring(key from '[^/]*$'), payload #>> '{}' FROM checkpoints WHERE kind = 'history'"
    assert sorted(sql(history)) == sorted(
        [
            ("price", "4"), ("charge", "paid 4"), ("send", None), ("$result", "paid 4"),
            ("price", "9"), ("charge", "paid 9"), ("send", None), ("$result", "paid 9"),
        ]
    )  # fmt: skip
    assert (await handle.describe()).key == "order-1"


async def test_messages_behind_the_step_are_received_again(app: App) -> None:
    @app.workflow
    async def collects() -> list[int]:
        return [await recv("numbers", type=int) for _ in range(3)]

    handle = await app.start(collects())
    for number in range(4):
        await handle.send("numbers", number)
    async with app.worker():
        assert await handle.result(timeout=SOON) == [0, 1, 2]
        await app.rewind(handle.id, after="recv(numbers)", patch={"recv(numbers)": 10})
        assert await handle.result(timeout=SOON) == [10, 1, 2]
        fork = await app.fork(handle.id, after="recv(numbers)#2")
        await fork.send("numbers", 20)
        assert await fork.result(timeout=SOON) == [10, 1, 20]


async def test_children_that_have_ended_stay_and_others_are_started_by_the_fork(app: App, sql: Sql) -> None:
    gate = Gate()

    @app.workflow
    async def child(number: int) -> int:
        if number == 2:
            await hold(gate)
        return number

    @step
    async def between() -> None: ...

    durable = asyncio.Event()

    @step
    async def behind() -> None:
        durable.set()  # it begins when all that came before is durable

    @app.workflow
    async def parent() -> int:
        first = await child(1)
        second = await app.start(child(2))
        await between()
        await behind()
        return first + await second.result()

    async with app.worker():
        handle = await app.start(parent())
        await gate.reached()
        async with asyncio.timeout(20):
            await durable.wait()
        fork = await app.fork(handle.id)
        await gate.reached(times=2)
        gate.open()
        assert await fork.result(timeout=SOON) == await handle.result(timeout=SOON) == 3
    rows = sql("SELECT parent_id, count(*) FROM workflows WHERE name = 'child' GROUP BY 1")
    assert dict(rows) == {handle.id: 2, fork.id: 1}


async def test_what_cannot_be_forked_or_rewound(app: App) -> None:
    gate = Gate()
    shop = Shop(app)

    @app.workflow
    async def stands() -> None:
        await hold(gate)

    async with app.worker():
        handle = await app.start(shop.order("book"))
        await handle.result(timeout=SOON)
        with pytest.raises(UnknownStep, match=r"no step 'refund' there; there are: price, charge, send"):
            await app.fork(handle.id, after="refund")
        with pytest.raises(UnknownStep, match=r"no step 'charge' there; there are: price"):
            await app.fork(handle.id, after="price", patch={"charge": "free"})
        with pytest.raises(WorkflowNotFound):
            await app.fork(uuid4())
        with pytest.raises(WorkflowNotFound):
            await app.rewind(uuid4())
        with pytest.raises(SerializationError):
            await app.fork(handle.id, patch={"price": object()})
        wrong = await app.fork(handle.id, after="price", patch={"price": {"a": 1}})
        with pytest.raises((WorkflowFailed, TypeError, Exception)):
            await wrong.result(timeout=SOON)
        running = await app.start(stands())
        await gate.reached()
        with pytest.raises(WrongState, match="cancel or terminate it first, or fork it"):
            await app.rewind(running.id)
        gate.open()


@step
async def count(text: str) -> int:
    return len(text)


async def test_a_patch_of_the_wrong_type_is_refused_where_the_code_is_known(app: App) -> None:
    @app.workflow
    async def counts() -> int:
        return await count("abc")

    async with app.worker():
        handle = await app.start(counts())
        await handle.result(timeout=SOON)
    with pytest.raises(SerializationError, match="the output of step 'count'"):
        await app.fork(handle.id, patch={"count": "three"})


async def test_blocking_callers_fork_and_rewind(app: App) -> None:
    shop = Shop(app)
    async with app.worker():
        handle = await app.start(shop.order("book"))
        await handle.result(timeout=SOON)
        fork = await asyncio.to_thread(lambda: app.blocking.fork(handle.id, after="price").result(timeout=SOON))
        again = await asyncio.to_thread(lambda: app.blocking.rewind(handle.id, after="price").result(timeout=SOON))
        assert fork == again == "paid 4"
    await asyncio.to_thread(app.blocking.close)
