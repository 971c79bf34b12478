"""What a finished workflow leaves behind."""

from __future__ import annotations

import asyncio
import gc

import pytest

from perdure import App, step
from perdure.engine.run import Run
from perdure.errors import RunEnded


def _runs() -> list[Run]:
    return [each for each in gc.get_objects() if isinstance(each, Run)]


@pytest.mark.parametrize("together", [False, True])
async def test_a_finished_workflow_is_freed_without_the_garbage_collector(app: App, together: bool) -> None:
    @step
    async def echo(number: int) -> int:
        return number

    @app.workflow
    async def flow(number: int, together: bool) -> int:
        if together:
            return sum(await asyncio.gather(echo(number), echo(number)))
        return await echo(number)

    async with app.worker():
        await app.run(flow(0, together))
        gc.collect()
        others = {id(each) for each in _runs()}  # of tests before this one, whose loop ended under their tasks
        gc.disable()
        try:
            for number in range(20):
                await app.run(flow(number, together))
            for _ in range(10):
                await asyncio.sleep(0)  # turns of the loop, in which the last one's task is let go
            left = [each for each in _runs() if id(each) not in others]
        finally:
            gc.enable()
    assert len(left) <= 1


async def test_a_task_that_outlives_its_workflow_is_told_that_the_run_has_ended(app: App) -> None:
    told: list[BaseException] = []

    @step
    async def echo() -> None: ...

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await echo()
            except BaseException as error:
                told.append(error)

    @app.workflow
    async def flow() -> str:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        return "done" if not task.done() else "?"

    async with app.worker():
        assert await app.run(flow()) == "done"
    assert [type(error) for error in told] == [RunEnded]
