"""The types of the public surface, as mypy and pyright (strict) see them. Nothing here is run: it is checked.

    mypy tests/typing; pyright tests/typing

A line that has to be an error is marked as one; a mark where one of the two finds no error is an error too.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from random import Random
from typing import Any, assert_type
from uuid import UUID

import psycopg
from psycopg_pool import AsyncConnectionPool

import perdure
from perdure import (
    App,
    Client,
    Handle,
    Invocation,
    Retry,
    RetryAfter,
    Start,
    Status,
    Step,
    StepInfo,
    StreamEntry,
    Workflow,
    WorkflowInfo,
    continue_as_new,
    current,
    now,
    random,
    run_step,
    step,
    uuid4,
    workflow,
)
from perdure.blocking import BlockingApp, BlockingHandle
from perdure.worker import Worker

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

app = App("typing")
pool: AsyncConnectionPool[Connection] = AsyncConnectionPool("", open=False)


# --- declaring -------------------------------------------------------------------------------------------------------


@step
async def charge(order_id: int, cents: int) -> str:
    return ""


@step(retry=Retry(max_attempts=5), timeout=timedelta(seconds=1), raises=(KeyError,), match="name", pure=True)
async def refund(order_id: int, *, cents: int = 0) -> int:
    return 0


@step
def send_receipt(to: str, payment: str) -> None: ...


@step(name="length")
def length_of(text: str) -> int:
    return len(text)


class Shop:
    @step
    async def price(self, item: str) -> float:
        return 0.0

    @step(retry=Retry())
    def stock(self, item: str, *, at: str = "") -> int:
        return 0

    @workflow
    async def order(self, item: str, *, count: int = 1) -> float:
        return await self.price(item)


@workflow
async def declared(text: str) -> bytes:
    return b""


@workflow(name="other", queue="slow", version="1")
async def declared_with_options(text: str) -> bytes:
    return b""


@app.workflow
async def checkout(order_id: int, *, express: bool = False) -> str:
    return await charge(order_id, 999)


@app.workflow(name="checkout2", queue="eu")
async def checkout_with_options(order_id: int) -> datetime:
    return now()


@app.job
async def resize(width: int) -> tuple[int, int]:
    return width, width


@app.job
def resize_plainly(width: int) -> tuple[int, int]:
    return width, width


@app.job(name="mail", retry=Retry(), queue="mail", timeout=timedelta(seconds=1))
def send_mail(to: str) -> bool:
    return True


@app.job(name="mail_later")
async def send_mail_later(to: str) -> bool:
    return True


@app.transaction(using=pool.connection, isolation="serializable", retry=Retry())
async def pay(connection: Connection, order_id: int, *, cents: int = 0) -> str:
    return ""


def what_is_declared_is_typed() -> None:
    assert_type(charge.name, str)
    again: Step[[int, int], str] = charge.with_options(name="x", retry=None, timeout=None)
    steps: list[Step[..., Any]] = [charge, refund, send_receipt, length_of, pay, Shop.price, Shop().stock]
    workflows: list[Workflow[..., Any]] = [declared, declared_with_options, checkout, resize, resize_plainly, send_mail]
    one: Step[[int, int], str] = charge
    other: Workflow[[str], bytes] = declared
    plain: Workflow[[int], tuple[int, int]] = resize_plainly
    App(include=["shop.orders", declared], errors=[KeyError])
    print(steps, workflows, again, one, other, plain)


def wrong_declarations() -> None:
    @workflow  # type: ignore[arg-type]
    def no_coroutine() -> int:
        return 1

    @step(retries=3)  # type: ignore[call-overload, untyped-decorator]
    async def wrong_option() -> int:
        return 1

    Retry(max_attempts="3")  # type: ignore[arg-type]
    Retry(3)  # type: ignore[call-arg]
    RetryAfter(3)  # type: ignore[arg-type]
    App(name="named")  # type: ignore[call-arg]


# --- calling steps ---------------------------------------------------------------------------------------------------


async def steps_are_typed() -> None:
    assert_type(await charge(1, 2), str)
    assert_type(await charge(order_id=1, cents=2), str)
    assert_type(await refund(1, cents=2), int)
    assert_type(await send_receipt("a", "b"), None)
    assert_type(await length_of("text"), int)
    assert_type(await Shop().price("chair"), float)
    assert_type(await Shop().stock("chair", at="here"), int)
    assert_type(await pay(1, cents=2), str)


async def wrong_arguments_of_steps() -> None:
    await charge(1)  # type: ignore[call-arg]
    await charge(1, "2")  # type: ignore[arg-type]
    await refund(1, 2)  # type: ignore[call-arg]
    await length_of(3)  # type: ignore[arg-type]
    await Shop().price()  # type: ignore[call-arg]
    await Shop().price(1)  # type: ignore[arg-type]
    await pay("1")  # type: ignore[arg-type]
    await pay(pool, 1)  # type: ignore[call-arg, arg-type]


async def steps_at_the_same_time_keep_their_types() -> None:
    payment, cents, nothing = await asyncio.gather(charge(1, 2), refund(1), send_receipt("a", "b"))
    assert_type(payment, str)
    assert_type(cents, int)
    assert_type(nothing, None)
    assert_type(await asyncio.gather(*(charge(number, 1) for number in range(3))), list[str])
    async with asyncio.TaskGroup() as group:
        first = group.create_task(charge(1, 2))
        second = group.create_task(length_of("text"))
        third = group.create_task(Shop().stock("chair"))
    assert_type(first.result(), str)
    assert_type(second.result(), int)
    assert_type(third, asyncio.Task[int])
    tasks = {asyncio.create_task(charge(number, 1)) for number in range(3)}
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert_type(done, set[asyncio.Task[str]])


# --- inside a workflow -----------------------------------------------------------------------------------------------


async def primitives_are_typed() -> None:
    assert_type(now(), datetime)
    assert_type(random(), Random)
    assert_type(uuid4(), UUID)
    assert_type(await run_step("len", len, "text", retry=Retry()), Any)
    assert_type(current().id, UUID)
    assert_type(current().attempt, int)
    assert_type(current().deadline, datetime | None)
    assert_type(current().idempotency_key, str)
    assert_type(current().replaying, bool)
    current().check()
    current().logger.info("text %s", 1)


async def a_child_has_the_type_of_its_result() -> None:
    assert_type(await checkout(42), str)
    assert_type(await app.run(checkout(42), queue="gpu", detached=True), str)
    assert_type(await app.start(checkout(42)), Handle[str])
    assert_type(await perdure.map(resize, [1, 2], concurrency=2), list[tuple[int, int]])
    assert_type(await asyncio.gather(checkout(42), resize(1)), tuple[str, tuple[int, int]])
    async for result in perdure.as_completed([checkout(1), checkout(2)]):
        assert_type(result, str)


async def methods_are_typed() -> None:
    shop = app.register("shop", Shop())
    assert_type(shop, Shop)
    assert_type(shop.order("chair", count=2), Invocation[float])
    shop.order(1)  # type: ignore[arg-type]


async def streams_forks_and_continuations_are_typed(handle: Handle[str]) -> None:
    async for entry in handle.read_stream("tokens", type=str):
        assert_type(entry, StreamEntry[str])
        assert_type(entry.value, str)
    for blocking in app.blocking.handle(handle.id).read_stream("tokens", type=int):
        assert_type(blocking.value, int)
    assert_type(await app.fork(handle.id, after="charge", patch={"charge": "paid"}), Handle[Any])
    assert_type(await app.rewind(handle.id), Handle[Any])
    await continue_as_new(checkout(43))


async def children_in_groups_are_typed() -> None:
    async with asyncio.TaskGroup() as group:
        child = group.create_task(checkout(42, express=True))
    assert_type(child.result(), str)
    receipt, raw = await asyncio.gather(checkout(1), declared("text"))
    assert_type(receipt, str)
    assert_type(raw, bytes)


# --- outside ---------------------------------------------------------------------------------------------------------


async def invocations_are_typed() -> None:
    assert_type(checkout(42), Invocation[str])
    assert_type(checkout_with_options(42), Invocation[datetime])
    assert_type(declared("text"), Invocation[bytes])
    assert_type(resize(3), Invocation[tuple[int, int]])
    assert_type(resize_plainly(3), Invocation[tuple[int, int]])
    assert_type(send_mail("a"), Invocation[bool])
    assert_type(send_mail_later("a"), Invocation[bool])
    by_name: Invocation[Any] = Invocation("checkout", 42, express=True)
    coroutine: Coroutine[Any, Any, str] = checkout(42)
    awaitable: Awaitable[object] = checkout(42)
    await app.start(by_name)
    print(coroutine, awaitable)


async def wrong_arguments_of_workflows() -> None:
    checkout()  # type: ignore[call-arg]
    checkout("42")  # type: ignore[arg-type]
    checkout(42, True)  # type: ignore[call-arg]
    checkout(42, key="order-42")  # type: ignore[call-arg]
    resize_plainly("3")  # type: ignore[arg-type]
    send_mail(1)  # type: ignore[arg-type]
    await app.start(checkout)  # type: ignore[arg-type]
    await app.start(charge(1, 2))  # type: ignore[arg-type]
    await app.start(checkout(42), on_conflict="ignore")  # type: ignore[arg-type]
    await app.start(checkout(42), delay=5)  # type: ignore[arg-type]
    await app.run(checkout(42), delay=timedelta(1))  # type: ignore[call-arg]


async def handles_are_typed() -> None:
    handle = await app.start(
        checkout(42),
        key="order-42",
        on_conflict="raise",
        queue="eu",
        priority=1,
        partition="tenant",
        delay=timedelta(minutes=5),
        attributes={"a": [1, None]},
    )
    assert_type(handle, Handle[str])
    assert_type(handle.id, UUID)
    assert_type(handle.key, str | None)
    assert_type(handle.started, bool)
    assert_type(await handle.result(), str)
    assert_type(await handle.result(timeout=timedelta(seconds=30)), str)
    assert_type(await handle.status(), Status)
    assert_type(await handle.describe(), WorkflowInfo)
    assert_type(await handle.steps(), Sequence[StepInfo])
    assert_type(await app.run(checkout(42), key="k", queue="gpu"), str)
    wider: Handle[str | int] = handle
    print(wider)


async def handles_of_other_origins_are_typed() -> None:
    starts: list[Invocation[str] | Start[str]] = [checkout(1), Start(checkout(2), key="k")]
    assert_type(await app.start_many(starts), list[Handle[str]])
    assert_type(await app.start_many(checkout(number) for number in range(3)), list[Handle[str]])
    assert_type(app.handle(UUID(int=1)), Handle[Any])
    assert_type(app.handle(UUID(int=1), datetime), Handle[datetime])
    assert_type(app.handle(UUID(int=1), list[int]), Handle[list[int]])
    assert_type(app.handle(UUID(int=1), int | None), Handle[int | None])
    assert_type(await app.find(checkout, key="k"), Handle[str] | None)
    assert_type(await app.find("checkout", key="k"), Handle[Any] | None)
    assert_type(app.workflows(status=Status.ERROR, limit=3), AsyncIterator[WorkflowInfo])
    async for each in app.workflows(attributes={"a": 1}):
        assert_type(each, WorkflowInfo)
        assert_type(each.status, Status)
        assert_type(each.wake_at, datetime | None)


async def clients_and_workers_are_typed() -> None:
    async with Client("postgresql://...", schema="perdure", connect_timeout=timedelta(1), pool_size=1) as client:
        assert_type(client, Client)
        assert_type(await client.start(checkout(42)), Handle[str])
    async with App() as entered:
        assert_type(entered, App)
    worker = app.worker(queues=["a"], concurrency=1, lease=timedelta(seconds=1), grace=timedelta(0))
    assert_type(worker, AbstractAsyncContextManager[Worker, bool | None])
    async with worker as running:
        assert_type(running, Worker)


def the_blocking_verbs_are_typed(connection: psycopg.Connection[Any]) -> None:
    assert_type(app.blocking, BlockingApp)
    with app.blocking as blocking:
        handle = blocking.start(checkout(42), key="k", connection=connection)
        assert_type(handle, BlockingHandle[str])
        assert_type(handle.result(timeout=timedelta(1)), str)
        assert_type(handle.status(), Status)
        assert_type(handle.describe(), WorkflowInfo)
        assert_type(handle.steps(), Sequence[StepInfo])
        assert_type(blocking.run(declared("text")), bytes)
        assert_type(blocking.start_many([checkout(1), checkout(2)]), list[BlockingHandle[str]])
        assert_type(blocking.handle(UUID(int=1), datetime), BlockingHandle[datetime])
        assert_type(blocking.find(checkout, key="k"), BlockingHandle[str] | None)
        assert_type(blocking.find("checkout", key="k"), BlockingHandle[Any] | None)
        assert_type(blocking.workflows(limit=3), Iterator[WorkflowInfo])
        blocking.start(checkout(42), wrong=1)  # type: ignore[call-arg]


def a_registry_of_ones_own_can_be_typed(table: dict[str, Callable[..., Invocation[Any]]]) -> None:
    table["checkout"] = checkout
