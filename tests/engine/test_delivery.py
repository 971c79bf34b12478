"""The order of delivery, where two outcomes meet in one turn of the loop."""

from __future__ import annotations

import asyncio

from perdure.engine.delivery import Delivery, Task


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
