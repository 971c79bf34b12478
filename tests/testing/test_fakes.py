"""Stand-ins for steps: what they do, and that the steps are afterwards what they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from perdure import App, Retry, SerializationError, StepFailed, step
from perdure.testing import TestBed, fake

Bed = Callable[..., TestBed]
DAY = timedelta(days=1)


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


def test_fakes_of_one_step_may_end_in_any_order() -> None:
    real = charge.fn
    first, second, third = fake(charge, returns=1), fake(charge, returns=2), fake(charge, returns=3)
    second.restore()
    assert asyncio.run(called(charge)) == 3
    third.restore()
    assert asyncio.run(called(charge)) == 1
    first.restore()
    assert (charge.fn, charge.is_async) == (real, False)


def test_a_fake_that_has_ended_ends_no_other() -> None:
    ended = fake(charge, returns=1)
    ended.restore()
    with fake(charge, returns=2):
        ended.restore()
        assert asyncio.run(called(charge)) == 2
    with pytest.raises(AssertionError, match="the real bank"):
        asyncio.run(called(charge))


async def test_the_end_of_the_block_lets_no_real_body_run(bed: Bed, ran: list[int]) -> None:
    app = App("kit")
    going = asyncio.Event()

    @step(pure=True)
    async def real(number: int) -> None:
        ran.append(number)

    async def stand_in(number: int) -> None:
        going.set()
        await asyncio.sleep(0)

    @app.workflow
    async def flow() -> None:
        for number in range(100_000):
            await real(number)

    async with bed(app) as kit:
        kit.fake(real, calls=stand_in)
        await app.start(flow())
        await going.wait()
    assert ran == []


async def test_a_step_with_other_options_is_faked_and_checked_too(bed: Bed) -> None:
    app = App("kit")

    @app.workflow
    async def flow() -> int:
        return await charge.with_options(timeout=DAY)(5)

    async with bed(app) as kit:
        with kit.fake(charge, returns=5):
            assert await kit.run(flow()) == 5
        with kit.fake(charge, returns="no number"), pytest.raises((SerializationError, StepFailed)):
            await kit.run(flow())


def test_the_step_of_an_instance_cannot_be_faked() -> None:
    with pytest.raises(TypeError, match="step 'charge' of an instance, which is another one at each access"):
        fake(Shop().charge, returns=1)


def test_the_version_of_the_code_is_not_that_of_the_fake() -> None:
    def app() -> App:
        app = App("kit")
        app.workflow(uses_charge)
        return app

    twin = charge.with_options()
    globals()["twin"] = twin  # a second step of that name in the module, with the same body
    try:
        version = app().version
        with fake(charge, returns=1):
            assert app().version == version
    finally:
        del globals()["twin"]


async def uses_charge() -> int:
    return await charge(1)


async def called(step: Any) -> int:
    """What the step does outside of workflows."""
    result: int = await step(1)
    return result
