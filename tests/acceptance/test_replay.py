"""Replay: the worker that takes a workflow over sees what the first one saw, and repeats nothing that was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest

from acceptance.support import SOON, Gate, hold, interrupted, replayed, served
from perdure import App, now, random, run_step, step, uuid4


class Bodies:
    """A step that counts how often its body ran, for each name that it is called with."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    @step(name="body")
    async def __call__(self, name: str, wait_for: asyncio.Event | None = None) -> str:
        self.ran.append(name)
        if wait_for is not None:
            await wait_for.wait()
        return name

    @step(name="bad_body")
    async def fails(self, name: str) -> str:
        self.ran.append(name)
        raise ValueError(name)


async def test_recorded_steps_do_not_run_again(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str]:
        values = [await body("a"), await body("b")]
        await hold(gate)
        return [*values, await body("c")]

    assert await replayed(app, flow(), gate) == ["a", "b", "c"]
    assert body.ran == ["a", "b", "c"]
    assert gate.arrivals == 2, "what was cut short runs again"


@pytest.mark.parametrize("make", [now, lambda: random().random(), uuid4])
async def test_recorded_values_are_the_same_on_replay(app: App, make: Callable[[], object]) -> None:
    gate = Gate()
    seen: list[list[object]] = []

    @app.workflow
    async def flow() -> None:
        values = [make(), make()]
        seen.append(values)
        await hold(gate)
        values.append(make())

    await replayed(app, flow(), gate)
    first, second = seen
    assert first == second[:2]
    assert len(set(second)) == 3


async def test_now_is_aware_and_never_goes_back(app: App) -> None:
    @app.workflow
    async def flow() -> tuple[datetime, datetime]:
        return now(), now()

    async with app.worker():
        earlier, later = await app.run(flow())
    assert earlier.tzinfo is not None
    assert earlier <= later
    assert abs(datetime.now(UTC) - later).total_seconds() < 60


async def test_random_is_a_generator_like_any_other(app: App) -> None:
    gate = Gate()
    seen: list[list[int]] = []

    @app.workflow
    async def flow() -> None:
        dice = random()
        seen.append([dice.randint(1, 10**9) for _ in range(5)])
        await hold(gate)

    await replayed(app, flow(), gate)
    first, second = seen
    assert first == second
    assert len(set(first)) > 1


async def test_a_function_run_by_run_step_does_not_run_again(app: App) -> None:
    gate = Gate()
    calls: list[int] = []

    @app.workflow
    async def flow() -> int:
        length = await run_step("length", lambda: calls.append(1) or len(calls))
        await hold(gate)
        return length

    assert await replayed(app, flow(), gate) == 1
    assert calls == [1]


async def test_gathered_steps_do_not_run_again(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str]:
        values = await asyncio.gather(*(body(name) for name in "abc"))
        await hold(gate)
        return list(values)

    assert await replayed(app, flow(), gate) == ["a", "b", "c"]
    assert sorted(body.ran) == ["a", "b", "c"]


async def test_only_what_was_cut_short_among_gathered_steps_runs_again(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str | None]:
        return list(await asyncio.gather(body("a"), chain(), body("c")))

    async def chain() -> None:
        await body("b")
        await body("after b")
        await hold(gate)

    assert await replayed(app, flow(), gate) == ["a", None, "c"]
    assert sorted(body.ran) == ["a", "after b", "b", "c"]


async def test_gather_may_return_exceptions(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str]:
        outcomes = await asyncio.gather(body("a"), body.fails("b"), return_exceptions=True)
        await hold(gate)
        return [repr(outcome) for outcome in outcomes]

    assert await replayed(app, flow(), gate) == ["'a'", "ValueError('b')"]
    assert sorted(body.ran) == ["a", "b"]


async def test_the_steps_of_a_task_group_do_not_run_again(app: App) -> None:
    gate, body = Gate(), Bodies()

    async def two(name: str) -> list[str]:
        return [await body(f"{name}1"), await body(f"{name}2")]

    @app.workflow
    async def flow() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(two(name)) for name in "abc"]
        await hold(gate)
        return [value for task in tasks for value in task.result()]

    assert await replayed(app, flow(), gate) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert sorted(body.ran) == ["a1", "a2", "b1", "b2", "c1", "c2"]


async def test_the_steps_of_nested_task_groups_do_not_run_again(app: App) -> None:
    gate, body = Gate(), Bodies()
    found: list[str] = []

    async def leaf(name: str) -> None:
        found.append(await body(name))

    async def branch(name: str) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(leaf(f"{name}{number}"))
        await body(f"{name} joined")

    @app.workflow
    async def flow() -> list[str]:
        found.clear()
        async with asyncio.TaskGroup() as group:
            for name in "ab":
                group.create_task(branch(name), name=name)
        await hold(gate)
        return found

    assert sorted(await replayed(app, flow(), gate)) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert sorted(body.ran) == ["a joined", "a0", "a1", "a2", "b joined", "b0", "b1", "b2"]


async def test_a_race_takes_the_same_branch_on_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    slow = asyncio.Event()
    winners: list[list[str]] = []

    @app.workflow
    async def flow() -> None:
        tasks = {asyncio.create_task(body("slow", slow)), asyncio.create_task(body("quick"))}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winners.append([task.result() for task in done])
        for task in pending:
            task.cancel()
        await hold(gate)

    async with interrupted(app, flow(), gate) as handle:
        slow.set()  # from here on it could win
    await served(app, handle)
    assert winners == [["quick"], ["quick"]]
    assert body.ran.count("quick") == 1


async def test_the_loser_of_a_race_goes_on_after_a_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    slow = asyncio.Event()

    @app.workflow
    async def flow() -> list[str]:
        tasks = [asyncio.create_task(body("slow", slow)), asyncio.create_task(body("quick"))]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await hold(gate)
        return [task.result() for task in done] + [await task for task in pending]

    async with interrupted(app, flow(), gate) as handle:
        slow.set()
    assert await served(app, handle) == ["quick", "slow"]
    assert sorted(body.ran) == ["quick", "slow", "slow"]


async def test_a_race_that_both_ended_is_won_by_the_same_on_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    late = asyncio.Event()
    winners: list[list[str]] = []

    @app.workflow
    async def flow() -> None:
        tasks = [asyncio.create_task(body("late", late)), asyncio.create_task(body("early"))]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winners.append([task.result() for task in done])
        late.set()
        await asyncio.wait(pending)
        await hold(gate)

    await replayed(app, flow(), gate)
    assert winners == [["early"], ["early"]]
    assert sorted(body.ran) == ["early", "late"]


async def test_outcomes_come_in_the_order_in_which_they_first_came(app: App) -> None:
    gate, body = Gate(), Bodies()
    names = ["a", "b", "c", "d", "e"]
    order = ["d", "a", "e", "c", "b"]
    turns = {name: asyncio.Event() for name in names}
    turns[order[0]].set()
    seen: list[list[str]] = []

    async def one(name: str, came: list[str]) -> None:
        came.append(await body(name, turns[name]))
        if len(came) < len(order):
            turns[order[len(came)]].set()

    @app.workflow
    async def flow() -> Sequence[str]:
        came: list[str] = []
        seen.append(came)
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(one(name, came))
        await hold(gate)
        return came

    assert await replayed(app, flow(), gate) == order
    assert seen == [order, order]
    assert sorted(body.ran) == names


async def test_tasks_as_completed_come_in_the_same_order_on_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    last = asyncio.Event()
    seen: list[list[str]] = []

    @app.workflow
    async def flow() -> list[str]:
        came: list[str] = []
        seen.append(came)
        tasks = [asyncio.create_task(body("late", last)), asyncio.create_task(body("early"))]
        for task in asyncio.as_completed(tasks):
            came.append(await task)
            last.set()
        await hold(gate)
        return came

    assert await replayed(app, flow(), gate) == ["early", "late"]
    assert seen == [["early", "late"]] * 2
    assert sorted(body.ran) == ["early", "late"]


async def test_a_task_group_that_fails_fails_in_the_same_way_on_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    never = asyncio.Event()
    seen: list[str] = []

    @app.workflow
    async def flow() -> str:
        caught = ""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(body("cancelled", never))
                group.create_task(body.fails("broken"))
        except* ValueError as errors:
            caught = repr(errors.exceptions)
        seen.append(caught)
        await hold(gate)
        return caught

    assert await replayed(app, flow(), gate) == "(ValueError('broken'),)"
    assert seen[0] == seen[1]
    assert body.ran.count("broken") == 1


async def test_tasks_may_hand_each_other_work(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        came: list[str] = []

        async def produce() -> None:
            for name in "abc":
                await queue.put(await body(name))
            await queue.put(None)

        async def consume() -> None:
            while (name := await queue.get()) is not None:
                came.append(await body(f"{name} again"))

        await asyncio.gather(produce(), consume())
        await hold(gate)
        return came

    assert await replayed(app, flow(), gate) == ["a again", "b again", "c again"]
    assert len(body.ran) == 6


async def test_a_step_in_a_loop_is_told_apart_by_its_occurrence(app: App) -> None:
    gate, body = Gate(), Bodies()

    @app.workflow
    async def flow() -> list[str]:
        values = [await body(str(number)) for number in range(5)]
        await hold(gate)
        return values

    assert await replayed(app, flow(), gate) == ["0", "1", "2", "3", "4"]
    assert body.ran == ["0", "1", "2", "3", "4"]


async def test_values_made_in_several_tasks_are_the_same_on_replay(app: App) -> None:
    gate, body = Gate(), Bodies()
    seen: list[list[str]] = []

    async def one(name: str) -> str:
        before = uuid4()
        await body(name)
        return f"{before} {uuid4()} {random().random()}"

    @app.workflow
    async def flow() -> None:
        seen.append(list(await asyncio.gather(*(one(name) for name in "abc"))))
        await hold(gate)

    await replayed(app, flow(), gate)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


async def test_two_workers_on_one_loop_give_a_task_one_scope(app: App, database_url: str) -> None:
    @step
    async def fetch(number: int) -> int:
        return number

    async def get(number: int) -> int:
        return await fetch(number)

    @app.workflow
    async def flow() -> list[int]:
        return list(await asyncio.gather(*(get(number) for number in range(2))))

    async with App("other", database_url=database_url, schema=app.settings.schema) as other:

        @other.workflow
        async def unrelated() -> None: ...

        async with app.worker(), other.worker():
            handle = await app.start(flow())
            assert await handle.result(timeout=SOON) == [0, 1]
    keys = {each.key.removeprefix(get.__qualname__) for each in await handle.steps()}
    assert keys == {"/fetch", "#2/fetch"}
