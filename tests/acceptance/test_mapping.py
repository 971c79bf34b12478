"""`map`: a few at the same time, the same keys whichever ends first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import perdure
from acceptance.support import Gate, hold, replayed
from perdure import App, step


async def test_results_are_in_order_and_so_many_run_at_the_same_time(app: App) -> None:
    running: list[int] = []
    most = 0

    @step
    async def square(number: int) -> int:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        await asyncio.sleep(0.001 * (5 - number % 5))
        running.remove(number)
        return number * number

    @app.workflow
    async def flow() -> list[int]:
        return await perdure.map(square, range(20), concurrency=3)

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result() == [number * number for number in range(20)]
    assert most == 3
    keys = {each.key for each in await handle.steps()}
    assert keys == {f"map[{number}]/square" for number in range(20)}


async def test_a_replay_calls_nothing_that_is_recorded(app: App) -> None:
    gate = Gate()
    called: list[int] = []

    @step
    async def square(number: int) -> int:
        called.append(number)
        await asyncio.sleep(0.001 * (3 - number % 3))
        return number * number

    async def both(number: int) -> int:
        return await square(number) + await square(number + 100)

    @app.workflow
    async def flow() -> list[int]:
        found = await perdure.map(both, range(6), concurrency=2)
        await hold(gate)
        return found

    assert await replayed(app, flow(), gate) == [n * n + (n + 100) ** 2 for n in range(6)]
    assert sorted(called) == [*range(6), *range(100, 106)]


async def test_the_first_failure_ends_it(app: App) -> None:
    began: list[int] = []

    @step
    async def fragile(number: int) -> int:
        began.append(number)
        if number == 1:
            raise ValueError("one is odd")
        await asyncio.sleep(3600)
        return number

    @app.workflow
    async def flow() -> list[int]:
        return await perdure.map(fragile, range(10), concurrency=3)

    async with app.worker():
        with pytest.raises(ValueError, match="one is odd"):
            await app.run(flow())
    assert began == [0, 1, 2]


async def test_of_nothing_comes_nothing(app: App) -> None:
    @app.workflow
    async def flow() -> list[list[Any]]:
        nothing: list[int] = []
        return [await perdure.map(step(abs), nothing, concurrency=1)]

    async with app.worker():
        assert await app.run(flow()) == [[]]


async def test_a_concurrency_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="use 1 or more"):
        await perdure.map(asyncio.sleep, [0], concurrency=0)
