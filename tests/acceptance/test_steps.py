"""Calling steps: async and plain functions, methods, options, and what a step is outside a workflow."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

import pytest

from acceptance.support import SOON, only_step, served
from perdure import App, NotInWorkflow, Retry, current, now, random, run_step, step, uuid4


@step
async def charge(order_id: int, cents: int) -> str:
    return f"payment-{order_id}-{cents}"


@step
def thread_name() -> str:
    return threading.current_thread().name


class Shop:
    """A client of something, as a step may well be a method of: it can't be stored."""

    def __init__(self, currency: str) -> None:
        self.currency = currency
        self.lock = threading.Lock()

    @step
    async def price(self, cents: int) -> str:
        return f"{cents} {self.currency}"

    @step(name="shop.round")
    def rounded(self, cents: int, *, to: int = 100) -> int:
        return cents // to * to


async def test_an_async_function_is_a_step(app: App) -> None:
    @app.workflow
    async def checkout() -> str:
        return await charge(1, cents=999)

    async with app.worker():
        handle = await app.start(checkout())
        assert await handle.result() == "payment-1-999"
    found = await only_step(handle)
    assert (found.key, found.name, found.status, found.output) == ("charge", "charge", "success", "payment-1-999")


async def test_a_plain_function_is_a_step_and_runs_in_a_thread(app: App) -> None:
    @app.workflow
    async def checkout() -> str:
        return await thread_name()

    async with app.worker():
        assert await app.run(checkout()) != threading.current_thread().name


async def test_plain_functions_run_at_the_same_time(app: App) -> None:
    meeting = threading.Barrier(4)

    @step
    def meet() -> bool:
        return meeting.wait(SOON.total_seconds()) >= 0

    @app.workflow
    async def together() -> list[bool]:
        return list(await asyncio.gather(*(meet() for _ in range(4))))

    async with app.worker():
        assert await app.run(together()) == [True] * 4


async def test_a_plain_function_that_returns_an_awaitable_has_it_awaited(app: App) -> None:
    @step
    def later() -> Awaitable[str]:
        return charge.fn(1, 2)

    @app.workflow
    async def checkout() -> str:
        return await later()  # type: ignore[return-value]

    async with app.worker():
        assert await app.run(checkout()) == "payment-1-2"


async def test_methods_are_steps(app: App) -> None:
    @app.workflow
    async def checkout() -> list[object]:
        shop = Shop("EUR")
        return [await shop.price(150), await shop.rounded(150), await shop.rounded(150, to=20)]

    async with app.worker():
        handle = await app.start(checkout())
        assert await handle.result() == ["150 EUR", 100, 140]
    assert [each.key for each in await handle.steps()] == ["price", "shop.round", "shop.round#2"]


@dataclass
class Quote:
    item: str
    price: Decimal


class Catalogue:
    def __init__(self) -> None:
        self.calls = 0

    @step
    async def quote(self, item: str) -> Quote:
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError
        return Quote(item, Decimal("9.90"))

    @staticmethod
    @step
    def reversed(text: str) -> str:
        return text[::-1]


async def test_the_options_of_a_method_are_replaced_for_a_call(app: App) -> None:
    @app.workflow
    async def checkout() -> Quote:
        catalogue = Catalogue()
        patient = catalogue.quote.with_options(name="patient", retry=Retry(max_attempts=2, initial=timedelta(0)))
        return await patient("chair")

    async with app.worker():
        handle = await app.start(checkout())
        assert await handle.result() == Quote("chair", Decimal("9.90"))
    found = await only_step(handle)
    assert (found.name, found.attempts) == ("patient", 2)


async def test_a_static_method_may_be_a_step(app: App) -> None:
    @app.workflow
    async def checkout() -> str:
        return await Catalogue.reversed("abc") + await Catalogue().reversed("def")

    async with app.worker():
        handle = await app.start(checkout())
        assert await handle.result() == "cbafed"
    assert len(await handle.steps()) == 2


async def test_a_step_has_its_name_from_the_decorator(app: App) -> None:
    @step(name="pay")
    async def charge_card() -> None: ...

    @app.workflow
    async def checkout() -> None:
        await charge_card()

    async with app.worker():
        handle = await app.start(checkout())
        await handle.result()
    assert (await only_step(handle)).name == "pay"


async def test_the_options_of_a_step_are_replaced_for_a_call(app: App) -> None:
    calls: list[int] = []

    @step
    async def flaky() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError
        return len(calls)

    @app.workflow
    async def patient() -> int:
        return await flaky.with_options(name="steady", retry=Retry(max_attempts=3, initial=timedelta(0)))()

    async with app.worker():
        handle = await app.start(patient())
        assert await handle.result() == 3
    found = await only_step(handle)
    assert (found.name, found.attempts) == ("steady", 3)


async def test_any_function_runs_as_a_step_by_run_step(app: App) -> None:
    calls: list[int] = []

    def add(left: int, *, right: int) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        return left + right

    @app.workflow
    async def sums() -> int:
        return await run_step("add", add, 1, right=2, retry=Retry(max_attempts=2, initial=timedelta(0)))

    async with app.worker():
        handle = await app.start(sums())
        assert await handle.result() == 3
    found = await only_step(handle)
    assert (found.name, found.attempts) == ("add", 2)


async def test_run_step_takes_async_functions_methods_and_partials(app: App) -> None:
    async def double(number: int) -> int:
        return 2 * number

    @app.workflow
    async def sums() -> list[object]:
        return [
            await run_step("double", double, 21),
            await run_step("upper", "text".upper),
            await run_step("partial", functools.partial(double, 4)),
        ]

    async with app.worker():
        assert await app.run(sums()) == [42, "TEXT", 8]


async def test_a_step_called_by_a_step_runs_directly(app: App) -> None:
    @step
    async def outer() -> str:
        return await charge(1, 2)

    @app.workflow
    async def checkout() -> str:
        return await outer()

    async with app.worker():
        handle = await app.start(checkout())
        assert await handle.result() == "payment-1-2"
    assert (await only_step(handle)).name == "outer"


async def test_a_step_outside_a_workflow_runs_directly() -> None:
    assert await charge(1, 2) == "payment-1-2"
    assert await thread_name() != threading.current_thread().name
    assert await Shop("EUR").price(3) == "3 EUR"


async def test_a_step_outside_a_workflow_is_not_tried_again() -> None:
    calls: list[int] = []

    @step(retry=Retry(max_attempts=5, initial=timedelta(0)))
    async def flaky() -> None:
        calls.append(1)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await flaky()
    assert len(calls) == 1


async def test_a_step_outside_a_workflow_may_return_anything() -> None:
    @step
    async def lock() -> threading.Lock:
        return made

    made = threading.Lock()
    assert await lock() is made


def test_the_undecorated_function_of_a_step_is_fn() -> None:
    assert thread_name.fn() == threading.current_thread().name


def test_a_step_is_documented_as_its_function() -> None:
    @step
    async def documented() -> None:
        """Says what it does."""

    assert documented.__doc__ == "Says what it does."
    assert documented.name == "documented"


def test_generators_are_refused_at_the_decorator() -> None:
    def count():
        yield 1

    async def count_later():
        yield 1

    with pytest.raises(TypeError, match=r"count.*generator"):
        step(count)
    with pytest.raises(TypeError, match=r"count_later.*generator"):
        step(count_later)


def test_options_that_make_no_sense_are_refused_at_the_decorator() -> None:
    with pytest.raises(ValueError, match="timeout"):
        step(timeout=timedelta(0))(thread_name.fn)
    with pytest.raises(ValueError, match="max_attempts"):
        Retry(max_attempts=0)


async def test_a_step_that_nobody_awaits_warns_and_does_not_run(app: App) -> None:
    calls: list[int] = []

    @step
    async def forgotten_step() -> None:
        calls.append(1)

    @app.workflow
    async def checkout() -> str:
        forgotten_step()
        gc.collect()
        return "done"

    handle = await app.start(checkout())
    with pytest.warns(RuntimeWarning, match="forgotten_step"):
        await served(app, handle)
    assert await handle.result() == "done"
    assert calls == []
    assert await handle.steps() == []


async def test_a_step_that_nobody_awaits_outside_a_workflow_warns_too() -> None:
    @step
    async def forgotten_step() -> None: ...

    with pytest.warns(RuntimeWarning, match="forgotten_step"):
        forgotten_step()


@pytest.mark.parametrize("primitive", [now, random, uuid4, current])
def test_primitives_outside_a_workflow_say_so(primitive: object) -> None:
    with pytest.raises(NotInWorkflow, match="outside"):
        primitive()  # type: ignore[operator]


async def test_run_step_outside_a_workflow_says_so() -> None:
    with pytest.raises(NotInWorkflow, match="run_step"):
        await run_step("double", lambda: 2)


@pytest.mark.parametrize("primitive", [now, random, uuid4])
async def test_what_is_recorded_for_workflow_code_is_refused_in_a_step(app: App, primitive: object) -> None:
    @step
    async def inner() -> None:
        primitive()  # type: ignore[operator]

    @app.workflow
    async def checkout() -> None:
        await inner()

    async with app.worker():
        with pytest.raises(NotInWorkflow, match="step"):
            await app.run(checkout())


async def test_arguments_of_a_step_may_be_anything(app: App) -> None:
    @step
    async def use(lock: object, number: float) -> str:
        return type(lock).__name__

    @app.workflow
    async def checkout() -> str:
        return await use(threading.Lock(), float("nan"))

    async with app.worker():
        assert await app.run(checkout()) == "lock"


async def test_many_steps_of_one_workflow_are_each_recorded(app: App) -> None:
    @app.workflow
    async def many(count: int) -> int:
        for number in range(count):
            await charge(number, number)
        return count

    async with app.worker():
        handle = await app.start(many(50))
        assert await handle.result() == 50
    assert [each.output for each in await handle.steps()] == [f"payment-{n}-{n}" for n in range(50)]
