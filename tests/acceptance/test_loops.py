"""Event loops and task factories that others bring along: what a workflow does, and what is recorded, is the same."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import uvloop

import perdure
from acceptance.support import SOON, Gate, hold, interrupted, served
from perdure import App, ForeignAwait, as_completed, step, telemetry

T = TypeVar("T")
Main = Callable[[App], Coroutine[Any, Any, T]]
Play = Callable[[Main[T]], T]


def _with_a_factory_of_its_own() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)
    return loop


class _HandsOn(asyncio.SelectorEventLoop):
    """As since Python 3.14: whatever `create_task` is given, the name too, goes on to the factory as it is."""

    def create_task(self, coroutine: Any, **options: Any) -> Any:  # type: ignore[override]
        factory: Any = self.get_task_factory()
        return asyncio.Task(coroutine, loop=self, **options) if factory is None else factory(self, coroutine, **options)


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "a factory": _with_a_factory_of_its_own,
    "uvloop": uvloop.new_event_loop,
    "hands on": _HandsOn,
}

if sys.version_info >= (3, 12):  # older ones have no eager tasks

    def _eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager tasks"] = _eager


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest, database_url: str, schema: str) -> Play[Any]:
    """Runs what it is given, with an app, on that loop: `play(main)`."""

    def run(main: Main[Any]) -> Any:
        async def with_app() -> Any:
            async with App("loops", database_url=database_url, schema=schema, strict=True) as app:
                return await main(app)

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(with_app())

    return run


@step
async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def _keys(app: App, id: Any) -> set[str]:
    return {each.key for each in await app.handle(id).steps()}


def test_tasks_in_tasks_keep_their_keys_and_are_replayed(play: Play[Any]) -> None:
    ran: list[int] = []

    @step
    async def leaf(number: int) -> int:
        ran.append(number)
        return number

    async def branch(first: int) -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(leaf(first)), group.create_task(twig(first + 1), name="a twig")]
        return sum(task.result() for task in tasks)

    async def twig(number: int) -> int:
        before = perdure.random().randint(number, number)
        return before + await leaf(10 * number)

    async def main(app: App) -> tuple[int, set[str]]:
        gate = Gate()

        @app.workflow
        async def tree() -> int:
            named = asyncio.create_task(branch(1), name="left")
            total = sum(await asyncio.gather(branch(3), branch(5))) + await named
            await hold(gate)
            return total

        async with interrupted(app, tree(), gate) as handle:
            pass
        return await served(app, handle), await _keys(app, handle.id)

    total, keys = play(main)
    assert total == 1 + 2 + 20 + 3 + 4 + 40 + 5 + 6 + 60
    assert sorted(ran) == [1, 3, 5, 20, 40, 60], "nothing ran twice"
    branches = [f"{path}/" for path in ("left", branch.__qualname__, f"{branch.__qualname__}#2")]
    tree = {"leaf", "a twig/random()", "a twig/leaf"}
    assert keys == {"hold"} | {f"{_escaped(path)}{key}" for path in branches for key in tree}


def _escaped(path: str) -> str:
    return path.replace("%", "%25")


def test_a_race_is_won_by_the_same_on_replay(play: Play[Any]) -> None:
    winners: list[list[int]] = []

    async def main(app: App) -> None:
        gate, late = Gate(), asyncio.Event()

        @step
        async def runner(number: int) -> int:
            if number == 0:
                await late.wait()
            return number

        @app.workflow
        async def race() -> None:
            tasks = [asyncio.create_task(runner(number)) for number in range(2)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            winners.append([task.result() for task in done])
            late.set()
            await asyncio.gather(*tasks)
            await hold(gate)

        async with interrupted(app, race(), gate) as handle:
            pass
        await served(app, handle)

    play(main)
    assert winners == [[1], [1]]


def test_outcomes_come_in_the_same_order_on_replay(play: Play[Any]) -> None:
    seen: list[list[int]] = []

    async def main(app: App) -> None:
        gate, turns = Gate(), [asyncio.Event() for _ in range(4)]
        order = [2, 0, 3, 1]

        @step
        async def runner(number: int) -> int:
            await turns[number].wait()
            return number

        @app.workflow
        async def flow() -> None:
            came: list[int] = []
            seen.append(came)
            async for number in as_completed([runner(number) for number in range(4)]):
                came.append(number)
                if len(came) < 4:
                    turns[order[len(came)]].set()
            await hold(gate)

        turns[order[0]].set()
        async with interrupted(app, flow(), gate) as handle:
            pass
        await served(app, handle)

    play(main)
    assert seen == [[2, 0, 3, 1]] * 2


def test_a_task_is_no_further_on_replay_when_its_creator_goes_on(play: Play[Any]) -> None:
    seen: list[list[str]] = []

    async def main(app: App) -> None:
        gate = Gate()

        @app.workflow
        async def flow() -> None:
            came: list[str] = []
            seen.append(came)

            async def child() -> None:
                await double(1)
                came.append("child")

            task = asyncio.create_task(child())
            came.append("creator")
            await task
            await hold(gate)

        async with interrupted(app, flow(), gate) as handle:
            pass
        await served(app, handle)

    play(main)
    assert seen == [["creator", "child"]] * 2


def test_the_first_step_of_a_task_may_last(play: Play[Any]) -> None:
    """It is no wait for something that isn't recorded, though an eager task comes to it before anybody knows it."""

    async def main(app: App) -> int:
        gate = Gate()

        @app.workflow
        async def flow() -> int:
            async def child() -> int:
                await hold(gate)
                return await double(4)

            task = asyncio.create_task(child())
            return await double(1) + await task

        async with app.worker() as worker:
            handle = await app.start(flow())
            await gate.reached()
            await worker._inspection.tick()
            gate.open()
            return await handle.result(timeout=SOON)

    assert play(main) == 10


def test_a_workflow_whose_tasks_sleep_leaves_memory(play: Play[Any], events: Any) -> None:
    async def main(app: App) -> None:
        @app.workflow
        async def flow() -> None:
            async def child() -> None:
                await perdure.sleep(timedelta(hours=1))

            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                group.create_task(child())

        async with app.worker():
            handle = await app.start(flow())
            suspended = await events.wait_for(telemetry.WorkflowSuspended)
            assert suspended.workflow_id == handle.id

    play(main)


def test_timers_in_workflow_code_are_found(play: Play[Any]) -> None:
    async def main(app: App) -> None:
        @app.workflow
        async def flow() -> None:
            await asyncio.sleep(0.01)

        async with app.worker():
            with pytest.raises(ForeignAwait):
                await app.run(flow())

    play(main)


def test_the_loop_is_left_as_it_was_found(play: Play[Any]) -> None:
    async def main(app: App) -> None:
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory(), set(vars(loop))
        async with app.worker():
            assert loop.get_task_factory() is not before[0]
        assert (loop.get_task_factory(), set(vars(loop))) == before

    play(main)
