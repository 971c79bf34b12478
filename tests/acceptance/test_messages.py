"""Messages: sent once, received in order, whatever crashes."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, interrupted, served
from perdure import (
    App,
    Handle,
    NotInWorkflow,
    SerializationError,
    Status,
    WorkflowNotFound,
    WrongPlace,
    WrongState,
    blocking,
    current,
    recv,
    send,
    sleep,
    step,
    telemetry,
    timeout,
)
from perdure.worker import WorkerOptions

Sql = Callable[..., list[Any]]
DAY = timedelta(days=1)
MOMENT = timedelta(milliseconds=50)


@dataclass
class Order:
    id: int
    items: list[str]


def declare_collect(app: App) -> Any:
    @app.workflow
    async def collect(count: int) -> list[object]:
        return [await recv("numbers") for _ in range(count)]

    return collect


async def suspended(events: Any, handle: Handle[Any]) -> None:
    await events.wait_for(telemetry.WorkflowSuspended, lambda event: event.workflow_id == handle.id)


# --- receiving -----------------------------------------------------------------------------------------------------


async def test_a_message_wakes_a_workflow_that_has_left_memory(app: App, events: Any, sql: Sql) -> None:
    collect = declare_collect(app)
    async with app.worker():
        handle = await app.start(collect(1))
        await events.wait_for(telemetry.WorkflowSuspended)
        info = await handle.describe()
        assert (info.status, info.waiting_for, info.wake_at) == (Status.WAITING, "message", None)
        await handle.send("numbers", 1)
        assert await handle.result(timeout=SOON) == [1]
    assert sql("SELECT kind, status, payload FROM checkpoints WHERE key = 'recv(numbers)'") == [
        ("message", "success", 1)
    ]


async def test_messages_come_in_the_order_in_which_they_were_sent(app: App) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(20))
    for number in range(20):
        await handle.send("numbers", number)
    assert await served(app, handle) == list(range(20))


async def test_what_is_sent_before_the_first_claim_is_there(app: App) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(2), delay=timedelta(seconds=0.3))
    await handle.send("numbers", 1)
    assert await handle.status() is Status.WAITING  # a message doesn't start what is to start later
    await handle.send("numbers", 2)
    assert await served(app, handle) == [1, 2]


async def test_each_topic_has_an_order_of_its_own(app: App) -> None:
    @app.workflow
    async def flow() -> list[object]:
        return [await recv("b"), await recv("a"), await recv("b")]

    handle = await app.start(flow())
    for topic, value in (("a", 1), ("b", 2), ("b", 3)):
        await handle.send(topic, value)
    assert await served(app, handle) == [2, 1, 3]


async def test_values_come_as_the_type_that_recv_names(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        order = await recv("orders", type=Order)
        nothing = await recv("orders")
        return f"{order} {nothing}"

    handle = await app.start(flow())
    await handle.send("orders", Order(1, ["tea"]))
    await handle.send("orders", None)
    assert await served(app, handle) == "Order(id=1, items=['tea']) None"


async def test_a_value_that_does_not_fit_is_an_error_and_is_received_all_the_same(app: App) -> None:
    @app.workflow
    async def flow() -> list[object]:
        try:
            await recv("numbers", type=int)
        except SerializationError as error:
            return [str(error), await recv("numbers", type=int)]
        return []

    handle = await app.start(flow())
    await handle.send("numbers", "one")
    await handle.send("numbers", 2)
    said, number = await served(app, handle)
    assert "numbers" in str(said)
    assert number == 2


async def test_no_message_in_time_is_a_timeout(app: App, events: Any, sql: Sql) -> None:
    @app.workflow
    async def flow() -> list[object]:
        try:
            await recv("numbers", timeout=MOMENT)
        except TimeoutError:
            return [await recv("numbers")]
        return []

    async with app.worker():
        handle = await app.start(flow())
        await suspended(events, handle)  # that waits without a limit
        await handle.send("numbers", 1)
        assert await handle.result(timeout=SOON) == [1]
    assert sql("SELECT status FROM checkpoints WHERE key = 'recv(numbers)'") == [("error",)]


async def test_a_timeout_of_nothing_only_looks(app: App) -> None:
    @app.workflow
    async def flow() -> list[object]:
        got: list[object] = []
        for _ in range(3):
            try:
                got.append(await recv("numbers", timeout=timedelta(0)))
            except TimeoutError:
                got.append("none")
        return got

    handle = await app.start(flow())
    await handle.send("numbers", 1)
    assert await served(app, handle) == [1, "none", "none"]


async def test_a_message_wakes_a_sleeper_only_if_it_waits_for_one(app: App, events: Any) -> None:
    @app.workflow
    async def sleeper() -> None:
        await sleep(DAY)

    @app.workflow
    async def both() -> object:
        nap = asyncio.create_task(sleeping())
        try:
            return await recv("numbers")
        finally:
            nap.cancel()

    async def sleeping() -> None:
        await sleep(DAY)

    async with app.worker():
        deaf, hears = await app.start(sleeper()), await app.start(both())
        await suspended(events, deaf)
        await suspended(events, hears)
        await deaf.send("numbers", 1)
        await hears.send("numbers", 2)
        assert await hears.result(timeout=SOON) == 2
        info = await deaf.describe()
        assert (info.status, info.epoch) == (Status.WAITING, 1)


async def test_those_who_wait_are_served_in_the_order_in_which_they_asked(app: App, events: Any) -> None:
    @app.workflow
    async def flow() -> list[object]:
        return await asyncio.gather(*(recv("numbers") for _ in range(3)))

    async with app.worker():
        handle = await app.start(flow())
        await suspended(events, handle)
        for number in range(3):
            await handle.send("numbers", number)
        assert await handle.result(timeout=SOON) == [0, 1, 2]


async def test_a_message_goes_to_the_next_one_if_its_receiver_was_cancelled(app: App, events: Any) -> None:
    @app.workflow
    async def flow() -> object:
        try:
            async with timeout(MOMENT):
                await recv("numbers")
        except TimeoutError:
            return await recv("numbers")

    async with app.worker():
        handle = await app.start(flow())
        await suspended(events, handle)
        await handle.send("numbers", 1)
        assert await handle.result(timeout=SOON) == 1


async def test_what_was_received_is_received_again_on_replay(app: App) -> None:
    gate = Gate()
    seen: list[list[object]] = []

    @app.workflow
    async def flow() -> list[object]:
        came: list[object] = []
        seen.append(came)
        came.append(await recv("numbers"))
        came.append(await recv("numbers"))
        await hold(gate)
        came.append(await recv("numbers"))
        return came

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await handle.send("numbers", 1)
        await handle.send("numbers", 2)
        await gate.reached()
    await handle.send("numbers", 3)
    gate.open()
    assert await served(app, handle) == [1, 2, 3]
    assert len(seen) > 1
    assert all(came == [1, 2, 3][: len(came)] for came in seen)  # it may have left memory before a message came


async def test_a_message_to_a_running_workflow_is_seen_at_once(app: App, events: Any) -> None:
    gate = Gate()

    @app.workflow
    async def flow() -> object:
        waiting = asyncio.create_task(recv("numbers"))
        await hold(gate)
        return await waiting

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.send("numbers", 1)
        gate.open()
        assert await handle.result(timeout=SOON) == 1
    assert not events.of(telemetry.WorkflowSuspended)


async def test_messages_survive_a_resume(app: App) -> None:
    attempts: list[int] = []

    @step
    async def fails_once() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")

    @app.workflow
    async def flow() -> list[object]:
        first = await recv("numbers")
        await fails_once()
        return [first, await recv("numbers"), await recv("numbers")]

    async with app.worker():
        handle = await app.start(flow())
        await handle.send("numbers", 1)
        await handle.send("numbers", 2)
        with pytest.raises(ValueError, match="not yet"):
            await handle.result(timeout=SOON)
        await handle.resume()
        await handle.send("numbers", 3)
        assert await handle.result(timeout=SOON) == [1, 2, 3]


@pytest.mark.parametrize("ended", [True, False])
async def test_messages_move_with_their_workflow(app: App, sql: Sql, ended: bool) -> None:
    gate = Gate()
    broken = ended

    @step
    async def fragile() -> None:
        if broken:
            raise ValueError("not yet")
        if not ended and gate.arrivals == 0:
            await gate.passed()

    @app.workflow
    async def flow() -> list[object]:
        first = await recv("numbers")
        await fragile()
        return [first, await recv("numbers"), await recv("numbers")]

    handle = await app.start(flow())
    await handle.send("numbers", 1)
    await handle.send("numbers", 2)  # before it runs: it ends as soon as it has the first
    async with app.worker(grace=AT_ONCE):
        if ended:
            with pytest.raises(ValueError, match="not yet"):
                await handle.result(timeout=SOON)
        else:
            await gate.reached()
    exported = await app.export(handle.id)
    sql("DELETE FROM queue_entries")
    sql("DELETE FROM message_rows")
    sql("DELETE FROM checkpoints")
    sql("DELETE FROM workflow_rows")
    broken = False
    gate.open()
    moved = await app.import_(json.loads(json.dumps(exported)))
    await moved.resume()
    await moved.send("numbers", 3)
    assert await served(app, moved) == [1, 2, 3]


# --- sending -------------------------------------------------------------------------------------------------------


async def test_workflows_and_steps_send(app: App) -> None:
    collect = declare_collect(app)

    @step
    async def from_a_step(target: str) -> None:
        await send(UUID(target), "numbers", 2)

    @app.workflow
    async def sender(target: str) -> None:
        await send(UUID(target), "numbers", 1)
        await from_a_step(target)
        await send(app.handle(UUID(target)), "numbers", 3)

    async with app.worker():
        handle = await app.start(collect(3))
        sending = await app.start(sender(str(handle.id)))
        await sending.result(timeout=SOON)
        assert await handle.result(timeout=SOON) == [1, 2, 3]
        assert [each.name for each in await sending.steps()] == ["send()", "from_a_step", "send()"]


async def test_a_send_whose_checkpoint_was_lost_is_not_sent_again(app: App, sql: Sql) -> None:
    collect = declare_collect(app)
    gate = Gate()

    @app.workflow
    async def sender(target: str) -> None:
        await send(UUID(target), "numbers", 1)
        await hold(gate)

    handle = await app.start(collect(2))
    async with interrupted(app, sender(str(handle.id)), gate) as sending:
        sql("DELETE FROM checkpoints WHERE key = 'send()'")  # as if the worker had died before its flush
    await served(app, sending)
    await handle.send("numbers", 2)
    assert await served(app, handle) == [1, 2]


async def test_a_step_that_is_tried_again_sends_once(app: App) -> None:
    collect = declare_collect(app)
    gate = Gate()

    @step
    async def sends(target: str) -> None:
        await send(UUID(target), "numbers", 1)
        await app.handle(UUID(target)).send("numbers", 2)
        await gate.passed()

    @app.workflow
    async def sender(target: str) -> None:
        await sends(target)

    handle = await app.start(collect(3))
    async with interrupted(app, sender(str(handle.id)), gate) as sending:
        pass
    await served(app, sending)
    await handle.send("numbers", 3)
    assert await served(app, handle) == [1, 2, 3]


async def test_a_workflow_may_send_to_itself(app: App) -> None:
    @app.workflow
    async def flow() -> object:
        await send(current(), "numbers", 1)
        return await recv("numbers")

    async with app.worker():
        assert await app.run(flow()) == 1


async def test_an_idempotency_key_sends_once(app: App) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(2))
    for value in (1, 1, 2):
        await handle.send("numbers", value, idempotency_key=f"payment {value}")
    assert await served(app, handle) == [1, 2]
    await handle.send("numbers", 1, idempotency_key="payment 1")  # it was sent, and that it has ended since is no error
    with pytest.raises(WrongState):
        await handle.send("numbers", 3, idempotency_key="payment 3")


async def test_start_or_send_starts_once_and_anew_when_it_has_ended(app: App) -> None:
    collect = declare_collect(app)
    async with app.worker():
        first = await app.start_or_send(collect(2), "numbers", 1, key="cart")
        again = await app.start_or_send(collect(2), "numbers", 2, key="cart", idempotency_key="two")
        assert (first.started, again.started, again.id) == (True, False, first.id)
        assert await first.result(timeout=SOON) == [1, 2]
        other = await asyncio.to_thread(app.blocking.start_or_send, collect(1), "numbers", 3, key="cart")
        assert other.id != first.id
        assert await app.handle(other.id).result(timeout=SOON) == [3]
    with pytest.raises(SerializationError):
        await app.start_or_send(collect(1), "numbers", object(), key="other")
    await asyncio.to_thread(app.blocking.close)


async def test_many_that_start_or_send_reach_workflows_that_have_not_ended(app: App) -> None:
    """Each of them gets its message, or ends with it; no two get the same."""
    collect = declare_collect(app)
    async with app.worker():
        handles = await asyncio.gather(
            *(app.start_or_send(collect(1), "numbers", number, key="cart") for number in range(30))
        )
        ids = {handle.id for handle in handles}
        received = [await app.handle(id).result(timeout=SOON) for id in ids]
    assert all(len(each) == 1 for each in received)
    assert len({number for (number,) in received}) == len(ids)


async def test_what_nobody_can_receive_is_refused(app: App) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(0))
    await served(app, handle)
    with pytest.raises(WrongState, match="it has ended"):
        await handle.send("numbers", 1)
    with pytest.raises(WorkflowNotFound):
        await app.handle(uuid4()).send("numbers", 1)
    with pytest.raises(SerializationError, match="numbers"):
        await handle.send("numbers", object())
    with pytest.raises(ValueError, match="topic"):
        await handle.send("", 1)


async def test_a_failed_send_fails_the_same_on_replay(app: App) -> None:
    gate = Gate()
    seen: list[str] = []

    @app.workflow
    async def flow() -> None:
        try:
            await send(UUID(int=0), "numbers", 1)
        except WorkflowNotFound as error:
            seen.append(str(error))
        await hold(gate)

    async with interrupted(app, flow(), gate) as handle:
        pass
    await served(app, handle)
    assert len(seen) == 2
    assert len(set(seen)) == 1


async def test_primitives_in_the_wrong_place_say_so(app: App) -> None:
    with pytest.raises(NotInWorkflow, match="recv"):
        await recv("numbers")
    with pytest.raises(NotInWorkflow, match=r"handle\.send"):
        await send(UUID(int=0), "numbers", 1)

    @step
    async def receives() -> None:
        await recv("numbers")

    @app.workflow
    async def flow() -> list[str]:
        said: list[str] = []
        try:
            await app.handle(UUID(int=0)).send("numbers", 1)
        except WrongPlace as error:
            said.append(str(error))
        try:
            await receives()
        except NotInWorkflow as error:
            said.append(str(error))
        return said

    async with app.worker():
        verb, primitive = await app.run(flow())
    assert "call it in a step" in verb
    assert "recv()" in primitive


async def test_the_view_says_what_was_sent_and_received(app: App, sql: Sql) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(1))
    await handle.send("numbers", 1)
    await handle.send("numbers", 2)
    await served(app, handle)
    assert sql("SELECT topic, payload, received_at IS NOT NULL FROM messages ORDER BY place") == [
        ("numbers", 1, True),
        ("numbers", 2, False),
    ]
    await handle.delete()
    assert sql("SELECT count(*) FROM message_rows") == [(0,)]


async def test_plain_functions_send_and_announce_from_their_thread(app: App) -> None:
    collect = declare_collect(app)

    @step
    def works(target: str) -> None:
        blocking.send(UUID(target), "numbers", 1)
        blocking.set_event("stage", "sent")

    @step
    async def in_a_loop() -> None:
        blocking.send(UUID(int=0), "numbers", 1)

    @app.workflow
    async def flow(target: str) -> str:
        await works(target)
        try:
            await in_a_loop()
        except WrongPlace as error:
            return str(error)
        return ""

    async with app.worker():
        handle = await app.start(collect(1))
        sending = await app.start(flow(str(handle.id)))
        assert await handle.result(timeout=SOON) == [1]
        assert await sending.get_event("stage") == "sent"
        assert "use 'await send()' there" in await sending.result(timeout=SOON)
    with pytest.raises(NotInWorkflow, match="inside a `def` step"):
        await asyncio.to_thread(blocking.set_event, "stage", 1)


async def test_blocking_code_sends(app: App) -> None:
    collect = declare_collect(app)
    handle = await app.start(collect(1))
    await asyncio.to_thread(lambda: app.blocking.handle(handle.id).send("numbers", 1))
    assert await served(app, handle) == [1]
    await asyncio.to_thread(app.blocking.close)


# --- all at once ---------------------------------------------------------------------------------------------------


async def test_many_senders_and_receivers_with_runs_that_are_lost(app: App, sql: Sql) -> None:
    """Of each sender, every receiver gets all messages once and in order, however often it sleeps, or is lost."""
    receivers, senders, messages = 4, 3, 8
    chance = random.Random(str(time.time_ns()))

    @app.workflow
    async def receive() -> list[list[int]]:
        return [await recv("numbers", type=list[int]) for _ in range(senders * 2 * messages)]

    @app.workflow
    async def sends(number: int, targets: list[str]) -> None:
        for message in range(messages):
            for target in targets:
                await send(UUID(target), "numbers", [number, message])

    async def client(number: int, handles: list[Handle[Any]]) -> None:
        for message in range(messages):
            for handle in handles:
                await handle.send("numbers", [number, message])

    async def loses(executor: Any) -> None:
        while True:
            await asyncio.sleep(chance.random() * 0.05)
            for run in list(executor.runs.values()):
                if chance.random() < 0.2 and run.epoch < 10:  # many more without progress, and it is given up for good
                    executor.run_lost(run, "the test wants it")

    options = WorkerOptions(suspends_from=AT_ONCE)
    async with app._worker(options) as worker:
        handles = [await app.start(receive()) for _ in range(receivers)]
        ids = [str(handle.id) for handle in handles]
        losing = asyncio.create_task(loses(worker._executor))
        workflows = [await app.start(sends(number, ids)) for number in range(senders)]
        await asyncio.gather(*(client(number, handles) for number in range(senders, 2 * senders)))
        await asyncio.gather(*(handle.result(timeout=SOON) for handle in workflows))
        losing.cancel()
        for handle in handles:
            received = await handle.result(timeout=SOON)
            for number in range(2 * senders):
                assert [message for sender, message in received if sender == number] == list(range(messages))
    assert sql("SELECT count(*) FROM workflows WHERE recoveries > 0") != [(0,)]
    assert sql("SELECT count(*), count(received_at) FROM messages") == [(receivers * 2 * senders * messages,) * 2]
