"""The kit: its worker, its rest, its stand-ins, and what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from perdure import (
    App,
    ForeignAwait,
    Retry,
    SerializationError,
    Status,
    StepFailed,
    WorkflowCancelled,
    sleep,
    step,
    telemetry,
    uuid4,
)
from perdure.testing import TestBed, fake

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)
SHORT = timedelta(seconds=0.3)


async def test_idle_waits_for_steps_of_all_kinds(bed: Bed, ran: list[str]) -> None:
    app = App("kit")

    @step
    async def slow(name: str) -> str:
        for _ in range(50):
            await asyncio.sleep(0)
        ran.append(name)
        return name

    @step
    def in_thread(name: str) -> str:
        ran.append(name)
        return name

    @step(pure=True)
    async def pure(name: str) -> str:
        ran.append(name)
        return name

    @app.workflow
    async def flow() -> None:
        await asyncio.gather(slow("a"), in_thread("b"), pure("c"))
        await sleep(DAY)

    async with bed(app) as kit:
        handles = [await app.start(flow()) for _ in range(20)]
        await kit.idle()
        assert sorted(ran) == sorted(["a", "b", "c"] * 20)
        assert {await handle.status() for handle in handles} == {Status.WAITING}


async def test_nothing_moves_after_idle_until_the_clock_does(bed: Bed) -> None:
    app = App("kit")

    @step
    async def mark() -> None:
        await asyncio.sleep(0)

    @app.workflow
    async def flow(number: int) -> None:
        async def branch(seconds: float) -> None:
            for _ in range(3):
                await mark()
                await sleep(timedelta(seconds=seconds))

        await asyncio.gather(branch(0.2), branch(5), branch(0.7 + number))

    async with bed(app) as kit:
        for number in range(12):
            await app.start(flow(number))
        moved: list[telemetry.Event] = []
        for _ in range(15):
            await kit.idle()
            unsubscribe = telemetry.subscribe(moved.append)
            async with app.session().database.connection() as connection:
                await connection.execute("SELECT pg_sleep(0.02)")  # real time passes
            unsubscribe()
            assert [event for event in moved if isinstance(event, telemetry.StepStarted)] == []
            await kit.clock.advance(timedelta(seconds=0.25), settle=False)


async def test_idle_says_what_goes_on(bed: Bed) -> None:
    app = App("kit")

    @step
    async def hang() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def flow() -> None:
        await hang()

    async with bed(app) as kit:
        await app.start(flow())
        with pytest.raises(TimeoutError, match=r"not idle within 0.3 s: workflow 'flow' runs step 'hang'"):
            await kit.idle(timeout=SHORT)


async def test_idle_waits_for_what_a_cancellation_sets_going(bed: Bed, ran: list[str]) -> None:
    app = App("kit")

    @step
    async def clean_up() -> None:
        ran.append("cleaned")

    @app.workflow
    async def flow() -> None:
        try:
            await sleep(DAY)
        finally:
            await clean_up()

    async with bed(app) as kit:
        handle = await app.start(flow())
        await kit.idle()
        await handle.cancel(reason="enough")
        await kit.idle()
        assert (ran, await handle.status()) == (["cleaned"], Status.CANCELLED)
        with pytest.raises(WorkflowCancelled, match="enough"):
            await kit.finish(handle)


async def test_finish_says_what_no_clock_brings(bed: Bed) -> None:
    app = App("kit")

    @step(on_exhausted="park")
    async def stuck() -> None:
        raise ValueError("an operator must see to it")

    @app.workflow
    async def flow() -> None:
        await stuck()

    async with bed(app) as kit:
        with pytest.raises(TimeoutError, match="'flow' is waiting, for operator, and nothing is due"):
            await kit.run(flow())


async def test_foreign_awaits_are_errors_in_a_test(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> None:
        await asyncio.sleep(1)

    async with bed(app) as kit:
        with pytest.raises(ForeignAwait, match=r"asyncio\.sleep"):
            await kit.run(flow())


async def test_a_crash_loses_what_was_not_durable_and_nothing_else(bed: Bed, ran: list[str]) -> None:
    app = App("kit")
    entered = asyncio.Event()

    @step
    async def first() -> str:
        ran.append("first")
        return str(uuid4.__name__)

    @step
    async def second() -> None:
        ran.append("second")
        entered.set()
        if ran.count("second") == 1:
            await asyncio.Event().wait()

    @app.workflow
    async def flow() -> str:
        value = await first()
        await second()
        return value

    async with bed(app) as kit:
        handle = await app.start(flow())
        await entered.wait()
        kit.crash()
        assert await kit.finish(handle) == "uuid4"
        assert ran == ["first", "second", "second"]
        assert (await handle.describe()).recoveries == 1


async def test_a_workflow_waits_while_there_is_no_worker(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> str:
        return "done"

    async with bed(app) as kit:
        await kit.stop_worker()
        handle = await app.start(flow())
        assert await handle.status() is Status.PENDING
        with pytest.raises(RuntimeError, match="no worker at the moment"):
            await kit.idle()
        await kit.start_worker()
        assert await kit.finish(handle) == "done"


# --- stand-ins --------------------------------------------------------------------------------------------------------


class Shop:
    @step
    async def charge(self, cents: int) -> int:
        raise AssertionError("the real bank")


@step
def charge(cents: int) -> int:
    raise AssertionError("the real bank")


async def test_a_fake_returns_raises_or_calls_and_knows_its_calls(bed: Bed) -> None:
    app = App("kit", errors=[KeyError])

    @app.workflow
    async def flow(cents: int) -> int:
        return await charge(cents)

    async with bed(app) as kit:
        with kit.fake(charge, returns=7) as returning:
            assert await kit.run(flow(1)) == 7
        assert [(call.args, call.kwargs) for call in returning.calls] == [((1,), {})]
        with kit.fake(charge, raises=KeyError("no funds")), pytest.raises(KeyError):
            await kit.run(flow(2))
        with kit.fake(charge, calls=lambda cents: cents * 2):
            assert await kit.run(flow(3)) == 6

        async def later(cents: int) -> int:
            await asyncio.sleep(0)
            return cents * 3

        with kit.fake(charge, calls=later):
            assert await kit.run(flow(4)) == 12


async def test_a_fake_ends_with_its_block_and_with_the_kit(bed: Bed) -> None:
    app = App("kit")
    real = charge.fn

    @app.workflow
    async def flow() -> int:
        return await charge(1)

    async with bed(app) as kit:
        kit.fake(charge, returns=1)
        with kit.fake(charge, returns=2):
            assert await kit.run(flow()) == 2
        assert await kit.run(flow()) == 1
    assert (charge.fn, charge.is_async) == (real, False)


async def test_a_fake_is_tried_again_and_checked_like_the_step(bed: Bed) -> None:
    app = App("kit")

    @step(retry=Retry(max_attempts=3, initial=DAY))
    async def flaky() -> int:
        raise AssertionError("the real one")

    @app.workflow
    async def flow() -> int:
        return await flaky()

    async with bed(app) as kit:
        with kit.fake(flaky, raises=OSError("away")) as failing, pytest.raises(OSError, match="away"):
            await kit.run(flow())
        assert len(failing.calls) == 3
        with kit.fake(flaky, returns="no number"), pytest.raises((SerializationError, StepFailed)):
            await kit.run(flow())


async def test_a_method_is_faked_with_its_instance(bed: Bed) -> None:
    app, shop = App("kit"), Shop()

    @app.workflow
    async def flow() -> int:
        return await shop.charge(5)

    async with bed(app) as kit:
        faked = kit.fake(Shop.charge, returns=5)
        assert await kit.run(flow()) == 5
    assert faked.calls[0].args == (shop, 5)


async def test_a_faked_transactional_step_needs_no_connection(bed: Bed) -> None:
    app = App("kit")

    @asynccontextmanager
    async def nowhere() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        raise AssertionError("no connection is wanted")
        yield  # type: ignore[unreachable]

    @app.transaction(using=nowhere)
    async def book(connection: psycopg.AsyncConnection[Any], cents: int) -> int:
        return cents

    @app.workflow
    async def flow() -> int:
        return await book(9)

    async with bed(app) as kit:
        faked = kit.fake(book, calls=lambda cents: cents + 1)
        assert await kit.run(flow()) == 10
    assert faked.calls[0].args == (9,)
    assert book.transaction is not None


def test_a_fake_does_one_thing() -> None:
    with pytest.raises(TypeError, match=r"fake\(charge\) takes one of returns=, raises= and calls="):
        fake(charge, returns=1, raises=ValueError())


# --- what is left -----------------------------------------------------------------------------------------------------


async def test_the_app_and_the_server_are_afterwards_what_they_were(bed: Bed, database_url: str) -> None:
    app = App("kit", database_url="postgresql://nowhere", schema="mine")

    @app.workflow
    async def flow() -> str:
        return "done"

    before = app.settings
    with pytest.raises(ZeroDivisionError):
        async with bed(app) as kit:
            schema = kit.schema
            assert await kit.run(flow()) == "done"
            assert app.settings.schema == schema != "mine"
            raise ZeroDivisionError
    assert (app.settings, app.sessions()) == (before, [])
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        cursor = await connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema,))
        assert await cursor.fetchone() == (0,)


async def test_two_apps_have_a_clock_each(bed: Bed) -> None:
    one, other = App("one"), App("other")

    @one.workflow
    async def first() -> str:
        await sleep(DAY)
        return "first"

    @other.workflow
    async def second() -> str:
        await sleep(DAY)
        return "second"

    async with bed(one) as kit, bed(other) as second_kit:
        handles = await one.start(first()), await other.start(second())
        await kit.clock.advance(DAY)
        assert await handles[0].result() == "first"
        await second_kit.idle()
        assert await handles[1].status() is Status.WAITING
        assert await second_kit.finish(handles[1]) == "second"
