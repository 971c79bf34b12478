"""The order of delivery, where two outcomes meet in one turn of the loop."""

from __future__ import annotations

import asyncio

from perdure.engine.delivery import Delivery, Task, give


async def test_an_outcome_that_comes_while_another_is_on_its_way_comes_behind_it() -> None:
    loop = asyncio.get_running_loop()
    delivery = Delivery(loop, 0, lambda: None, lambda: None)
    body: asyncio.Future[None] = loop.create_future()
    came: list[tuple[str, int]] = []

    async def code() -> None:
        task = delivery.leave()
        await body
        delivery.enter(task)
        came.append(("step", await delivery.turn()))

    task = Task(code())
    delivery.adopt(task)
    await asyncio.sleep(0)  # the body runs
    loop.call_soon(body.set_result, None)  # before the delivery: so the task is woken before the delivery is heard
    expiry = delivery.arrived(loop.time())
    expiry.add_done_callback(lambda turn: came.append(("expiry", turn.result())))
    await task
    assert came == [("expiry", 1), ("step", 2)]


async def test_what_was_to_run_already_goes_before_the_next_turn() -> None:
    """As it does on a first run, where the next outcome comes later."""
    loop = asyncio.get_running_loop()
    delivery = Delivery(loop, 3, lambda: None, lambda: None)
    gate: asyncio.Future[None] = loop.create_future()
    seen: list[str] = []
    gate.add_done_callback(lambda _: seen.append("gate"))

    async def first() -> None:
        await delivery.replay(1)

    async def second() -> list[str]:
        await delivery.replay(2)
        return list(seen)

    async def code() -> None:
        await tasks[0]
        gate.set_result(None)
        await delivery.replay(3)

    tasks = [Task(first()), Task(second()), Task(code())]
    for task in tasks:
        delivery.adopt(task)
        task.add_done_callback(delivery.release)
    await asyncio.gather(*tasks)
    assert tasks[1].result() == ["gate"]


async def test_a_run_moves_while_a_task_of_it_is_about_to_go_on() -> None:
    """Who waits for it to rest must not take that turn of the loop for it."""
    loop = asyncio.get_running_loop()
    rested = asyncio.Event()
    delivery = Delivery(loop, 0, rested.set, lambda: True)
    come: asyncio.Future[None] = loop.create_future()

    async def waits() -> None:
        with delivery.dormant():
            await come

    task = loop.create_task(waits())
    delivery.adopt(task)
    await rested.wait()
    assert not delivery.is_moving
    delivery.rouse(task)
    loop.call_soon(give, come, None)
    assert delivery.is_moving
    await task
