"""What workflow code must not wait for: it is found, and named with its line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from perdure import App, ForeignAwait, as_completed, run_step, step, telemetry


@step
async def double(number: int) -> int:
    return 2 * number


async def _asyncio_sleep() -> None:
    await asyncio.sleep(0.01)


async def _wait_for() -> None:
    await asyncio.wait_for(asyncio.ensure_future(double(1)), timeout=10)


async def _asyncio_timeout() -> None:
    async with asyncio.timeout(10):
        await double(1)


FOREIGN = [
    pytest.param(_asyncio_sleep, "asyncio.sleep()", id="sleep"),
    pytest.param(_wait_for, "asyncio.wait_for()", id="wait_for"),
    pytest.param(_asyncio_timeout, "asyncio.timeout()", id="timeout"),
]


@pytest.mark.parametrize(("code", "what"), FOREIGN)
async def test_a_timer_in_workflow_code_is_a_warning_that_names_the_line(
    app: App, events: Any, code: Callable[[], Any], what: str
) -> None:
    @app.workflow
    async def flow() -> str:
        await code()
        return "done"

    async with app.worker():
        assert [await app.run(flow()) for _ in range(2)] == ["done", "done"]
    (found,) = events.of(telemetry.AwaitsForeign)
    assert found.what == what
    assert f"test_foreign_awaits.py:{code.__code__.co_firstlineno + 1} in {code.__name__}" in found.line


@pytest.mark.parametrize(("code", "what"), FOREIGN)
async def test_where_the_app_is_strict_it_is_an_error(
    database_url: str, schema: str, code: Callable[[], Any], what: str
) -> None:
    async with App("strict", database_url=database_url, schema=schema, strict=True) as app:

        @app.workflow
        async def flow() -> None:
            await code()

        async with app.worker():
            with pytest.raises(ForeignAwait, match=r"do it in a step") as caught:
                await app.run(flow())
    assert caught.value.what == what


@pytest.mark.parametrize("strict", [False, True])
async def test_a_wait_for_something_outside_is_found_when_it_lasts(
    database_url: str, schema: str, events: Any, strict: bool
) -> None:
    """Nothing asks the loop for a timer: an answer from a server, say."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async with App("outside", database_url=database_url, schema=schema, strict=strict) as app:

        @app.workflow
        async def flow() -> str:
            return await answer

        async with app.worker():
            handle = await app.start(flow())
            if strict:
                with pytest.raises(ForeignAwait, match="in flow"):
                    await handle.result()
            else:
                found = await events.wait_for(telemetry.AwaitsForeign)
                answer.set_result("there")
                assert await handle.result() == "there"
                assert "in flow" in found.line


async def test_what_steps_wait_for_is_their_own_affair(app: App, events: Any) -> None:
    async def body() -> int:
        async with asyncio.timeout(10):
            await asyncio.sleep(0.001)
        return await asyncio.wait_for(asyncio.sleep(0.001, 1), 10)

    @app.workflow
    async def flow() -> int:
        return await run_step("body", body)

    async with app.worker():
        assert await app.run(flow()) == 1
    assert events.of(telemetry.AwaitsForeign) == []


async def test_tasks_that_wait_for_each_other_are_no_foreign_wait(app: App, events: Any) -> None:
    @app.workflow
    async def flow() -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

        async def produce() -> None:
            for number in range(3):
                await queue.put(await double(number))

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            return [await queue.get() for _ in range(3)]

    async with App("strict", database_url=app.settings.database_url, schema=app.settings.schema, strict=True) as strict:
        strict.workflow(flow.fn)
        async with strict.worker():
            assert await strict.run(flow()) == [0, 2, 4]
    assert events.of(telemetry.AwaitsForeign) == []


async def test_as_completed_over_coroutines_is_refused_because_it_iterates_a_set(app: App) -> None:
    async def twice(number: int) -> int:
        return await double(number)

    @app.workflow
    async def flow() -> list[int]:
        calls = [twice(1), twice(2)]
        try:
            return [await each for each in asyncio.as_completed(calls)]
        finally:
            for call in calls:
                call.close()  # nobody will await them

    async with app.worker():
        with pytest.raises(ForeignAwait, match=r"perdure\.as_completed"):
            await app.run(flow())


async def test_as_completed_over_tasks_and_step_calls_is_fine(app: App) -> None:
    @app.workflow
    async def flow() -> list[int]:
        tasks = [asyncio.create_task(double(number)) for number in range(3)]
        found = [await each for each in asyncio.as_completed(tasks)]
        return sorted(found + [await each for each in asyncio.as_completed([double(5), double(6)])])

    async with app.worker():
        assert await app.run(flow()) == [0, 2, 4, 10, 12]


async def test_the_results_of_as_completed_come_as_they_come(app: App) -> None:
    gates = [asyncio.Event() for _ in range(3)]

    @step
    async def gated(number: int) -> int:
        await gates[number].wait()
        return number

    @app.workflow
    async def flow() -> list[int]:
        found: list[int] = []
        async for number in as_completed([gated(number) for number in range(3)]):
            found.append(number)
            gates[(number + 1) % 3].set()
        return found

    gates[2].set()
    async with app.worker():
        assert await app.run(flow()) == [2, 0, 1]


async def test_a_failure_comes_at_its_turn_and_the_others_go_on(app: App) -> None:
    @step
    async def choosy(number: int) -> int:
        if number == 1:
            raise ValueError("not one")
        return number

    @app.workflow
    async def flow() -> list[str]:
        found: list[str] = []
        results = as_completed([choosy(number) for number in range(3)])
        while True:
            try:
                found.append(str(await anext(results)))
            except ValueError as error:
                found.append(str(error))
            except StopAsyncIteration:
                return sorted(found)

    async with app.worker():
        assert await app.run(flow()) == ["0", "2", "not one"]
