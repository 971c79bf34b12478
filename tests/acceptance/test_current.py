"""`current()`: what code can know about where it runs."""

from __future__ import annotations

import logging
from datetime import timedelta
from uuid import UUID

import pytest

from acceptance.support import SOON, Gate, hold, replayed
from perdure import App, Retry, current, step

TWICE = Retry(max_attempts=2, initial=timedelta(0))


async def test_a_workflow_knows_its_id_and_name(app: App) -> None:
    @app.workflow
    async def who() -> list[object]:
        return [str(current().id), current().name, current().attempt, current().deadline]

    async with app.worker():
        handle = await app.start(who())
        assert await handle.result() == [str(handle.id), "who", 1, None]


async def test_a_step_knows_its_workflow_and_its_own_name(app: App) -> None:
    @step
    async def inner() -> list[str]:
        return [str(current().id), current().name]

    @app.workflow
    async def outer() -> list[str]:
        return await inner()

    async with app.worker():
        handle = await app.start(outer())
        assert await handle.result() == [str(handle.id), "inner"]


async def test_a_plain_step_knows_too(app: App) -> None:
    @step
    def inner() -> list[object]:
        current().check()
        return [str(current().id), current().name, current().attempt]

    @app.workflow
    async def outer() -> list[object]:
        return await inner()

    async with app.worker():
        handle = await app.start(outer())
        assert await handle.result() == [str(handle.id), "inner", 1]


async def test_attempts_are_counted_and_share_an_idempotency_key(app: App) -> None:
    seen: list[tuple[int, str]] = []

    @step(retry=Retry(max_attempts=3, initial=timedelta(0)))
    async def flaky() -> None:
        seen.append((current().attempt, current().idempotency_key))
        if len(seen) < 3:
            raise ConnectionError

    @app.workflow
    async def outer() -> None:
        await flaky()

    async with app.worker():
        await app.run(outer())
    assert [attempt for attempt, _ in seen] == [1, 2, 3]
    assert len({key for _, key in seen}) == 1


async def test_the_idempotency_key_is_the_same_on_the_worker_that_takes_over(app: App) -> None:
    gate = Gate()
    seen: list[tuple[int, str]] = []

    @step
    async def slow() -> None:
        seen.append((current().attempt, current().idempotency_key))
        await gate.passed()

    @app.workflow
    async def outer() -> None:
        await slow()

    await replayed(app, outer(), gate)
    assert [attempt for attempt, _ in seen] == [1, 1], "a body that was cut short is no failed attempt"
    assert len({key for _, key in seen}) == 1


async def test_idempotency_keys_differ_between_calls_and_workflows(app: App) -> None:
    @step
    async def key_of_call() -> str:
        return current().idempotency_key

    @app.workflow
    async def outer() -> list[str]:
        return [await key_of_call(), await key_of_call()]

    async with app.worker():
        keys = [*await app.run(outer()), *await app.run(outer())]
    assert len(set(keys)) == 4


async def test_the_idempotency_key_of_a_workflow_is_its_id(app: App) -> None:
    @app.workflow
    async def who() -> str:
        return current().idempotency_key

    async with app.worker():
        handle = await app.start(who())
        assert UUID(await handle.result()) == handle.id


async def test_code_knows_whether_it_is_replaying(app: App) -> None:
    gate = Gate()
    seen: list[list[bool]] = []

    @step
    async def recorded() -> None: ...

    @app.workflow
    async def outer() -> None:
        run: list[bool] = []
        seen.append(run)
        run.append(current().replaying)
        await recorded()
        run.append(current().replaying)
        await hold(gate)
        run.append(current().replaying)

    await replayed(app, outer(), gate)
    first, second = seen
    assert first == [False, False]
    assert second[0] is True
    assert second[2] is False


async def test_the_logger_is_silent_while_replaying(app: App, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    @step
    async def recorded() -> None: ...

    @app.workflow
    async def outer() -> None:
        current().logger.warning("at the beginning")
        await recorded()
        current().logger.warning("between %s", "two steps")
        await recorded()
        await hold(gate)
        current().logger.warning("at the end")

    with caplog.at_level(logging.INFO):
        await replayed(app, outer(), gate)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("at the beginning" in line for line in lines) == 1
    assert sum("at the end" in line for line in lines) == 1
    assert sum("between two steps" in line for line in lines) == 1


async def test_the_logger_of_a_step_speaks_at_every_attempt(app: App, caplog: pytest.LogCaptureFixture) -> None:
    @step(retry=TWICE)
    def flaky() -> None:
        current().logger.warning("trying")
        if current().attempt == 1:
            raise ConnectionError

    @app.workflow
    async def outer() -> None:
        await flaky()

    async with app.worker():
        handle = await app.start(outer())
        await handle.result(timeout=SOON)
    lines = [record for record in caplog.records if "trying" in record.getMessage()]
    assert len(lines) == 2


async def test_a_line_of_the_logger_names_workflow_and_step(app: App, caplog: pytest.LogCaptureFixture) -> None:
    @step
    async def inner_step() -> None:
        current().logger.warning("from the step")

    @app.workflow
    async def outer_workflow() -> None:
        current().logger.warning("from the workflow")
        await inner_step()

    async with app.worker():
        handle = await app.start(outer_workflow())
        await handle.result()
    texts = {
        which: repr(vars(record)) for record in caplog.records for which in ("workflow", "step")
        if record.getMessage().find(f"from the {which}") >= 0
    }  # fmt: skip
    assert str(handle.id) in texts["workflow"]
    assert "outer_workflow" in texts["workflow"]
    assert str(handle.id) in texts["step"]
    assert "inner_step" in texts["step"]
