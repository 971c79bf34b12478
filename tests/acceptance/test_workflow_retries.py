"""`@app.workflow(retry=...)`: the whole workflow is tried again, and goes on from its checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, only_step, served
from perdure import (
    App,
    Client,
    DeadlineExceeded,
    Handle,
    InvalidArguments,
    Invocation,
    Retry,
    RetryAfter,
    Status,
    StepFailed,
    WorkflowCancelled,
    current,
    step,
)
from perdure.telemetry import WorkflowClaimed, WorkflowRetries, WorkflowSuspended, WorkflowsWoken

HOUR = timedelta(hours=1)
Sql = Callable[..., list[Any]]


def quick(**options: Any) -> Retry:
    return Retry(initial=timedelta(0), **options)


def hourly(max_attempts: int = 3) -> Retry:
    return Retry(max_attempts=max_attempts, initial=HOUR, factor=1.0, maximum=HOUR, jitter=0.0)


class Bodies:
    """A step that fails where it is told to; notes which of its bodies ran."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.ran: list[str] = []

    @step(name="body")
    async def __call__(self, name: str) -> str:
        self.ran.append(name)
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise ValueError(name)
        return name


async def suspensions(events: Any, handle: Handle[Any], count: int) -> Any:
    """Wait until it has left memory so many times; returns the last of these."""
    seen: list[object] = []

    def fits(event: WorkflowSuspended) -> bool:
        if event.workflow_id == handle.id and event not in seen:
            seen.append(event)
        return len(seen) >= count

    return await events.wait_for(WorkflowSuspended, fits)


async def test_a_workflow_is_tried_until_it_succeeds_and_repeats_only_what_failed(app: App) -> None:
    body = Bodies(b=2)
    attempts: list[int] = []

    @app.workflow(retry=quick(max_attempts=3))
    async def flow() -> list[str]:
        attempts.append(current().attempt)
        return [await body(name) for name in "abc"]

    handle = await app.start(flow())
    assert await served(app, handle) == ["a", "b", "c"]
    assert body.ran == ["a", "b", "b", "b", "c"]
    assert attempts == [1, 2, 3]
    assert [found.output for found in await handle.steps()] == ["a", "b", "c"]


async def test_a_workflow_that_never_succeeds_fails_with_its_last_error(app: App, sql: Sql) -> None:
    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> None:
        raise KeyError(current().attempt)

    handle = await app.start(flow())
    with pytest.raises(KeyError, match="2"):
        await served(app, handle)
    assert (await handle.describe()).status is Status.ERROR
    assert sql("SELECT payload ->> 'message' FROM checkpoints WHERE kind = 'attempt'") == [("1",)]


async def test_a_workflow_without_retry_makes_one_attempt(app: App) -> None:
    body = Bodies(a=1)

    @app.workflow
    async def flow() -> str:
        return await body("a")

    with pytest.raises(ValueError, match="a"):
        await served(app, await app.start(flow()))
    assert body.ran == ["a"]


async def test_retry_on_and_give_up_on_say_what_is_worth_another_attempt(app: App) -> None:
    attempts: list[int] = []
    errors: list[Exception] = [ConnectionResetError(), ConnectionRefusedError("nobody there")]

    @app.workflow(retry=quick(max_attempts=5, retry_on=(ConnectionError,), give_up_on=(ConnectionRefusedError,)))
    async def flow() -> None:
        attempts.append(current().attempt)
        raise errors[len(attempts) - 1]

    with pytest.raises(ConnectionRefusedError, match="nobody there"):
        await served(app, await app.start(flow()))
    assert attempts == [1, 2]


async def test_a_failure_that_the_code_has_dealt_with_stays(app: App) -> None:
    """Only what the workflow failed from is asked for anew: a replay takes the path that it took before."""
    body = Bodies(a=1, c=1)

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> list[str]:
        try:
            first = await body("a")
        except ValueError:
            first = await body("instead of a")
        return [first, await body("c")]

    assert await served(app, await app.start(flow())) == ["instead of a", "c"]
    assert body.ran == ["a", "instead of a", "c", "c"]


async def test_all_steps_that_failed_in_a_group_are_asked_for_anew(app: App) -> None:
    body = Bodies(a=1, c=1)

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> list[str]:
        async def gathered() -> list[str | BaseException]:
            return await asyncio.gather(*(body(name) for name in "abc"), return_exceptions=True)

        found = await gathered()
        failed = [each for each in found if isinstance(each, Exception)]
        if failed:
            raise ExceptionGroup("some failed", failed)
        return [str(each) for each in found]

    assert await served(app, await app.start(flow())) == ["a", "b", "c"]
    assert sorted(body.ran) == ["a", "a", "b", "c", "c"]


async def test_each_attempt_at_the_workflow_gives_the_failed_step_all_its_attempts(app: App) -> None:
    seen: list[int] = []

    class Own(Exception): ...

    @step(retry=quick(max_attempts=2))
    async def fails() -> None:
        seen.append(current().attempt)
        raise Own(str(len(seen)))

    @app.workflow(retry=quick(max_attempts=3))
    async def flow() -> None:
        await fails()

    handle = await app.start(flow())
    with pytest.raises(StepFailed, match="6") as caught:
        await served(app, handle)
    assert caught.value.attempts == 2
    assert seen == [1, 2] * 3
    assert (await only_step(handle)).attempts == 2


async def test_arguments_that_do_not_fit_are_not_tried_again(
    app: App, events: Any, database_url: str, schema: str
) -> None:
    @app.workflow(retry=quick(max_attempts=3))
    async def flow(number: int) -> None: ...

    async with Client(database_url, schema=schema) as client, app.worker():
        handle = await client.start(Invocation("flow", "no number"))
        with pytest.raises(InvalidArguments):
            await handle.result(timeout=SOON)
    assert events.of(WorkflowRetries) == []


async def test_a_workflow_waits_in_the_database_between_its_attempts(app: App, events: Any, clock: Any) -> None:
    body = Bodies(a=2)

    @app.workflow(retry=hourly())
    async def flow() -> str:
        return await body("a")

    async with app.worker():
        handle = await app.start(flow())
        for attempt in (1, 2):
            await suspensions(events, handle, attempt)
            found = await handle.describe()
            assert (found.status, found.waiting_for) == (Status.WAITING, "retry")
            assert found.wake_at is not None
            assert abs(found.wake_at - found.updated_at - HOUR) < timedelta(minutes=1)
            assert body.ran == ["a"] * attempt
            clock.advance(3601)
        assert await handle.result(timeout=SOON) == "a"
    assert [(event.attempt, event.seconds) for event in events.of(WorkflowRetries)] == [(1, 3600), (2, 3600)]


async def test_the_pause_and_the_number_of_attempts_outlive_workers(app: App, events: Any, clock: Any) -> None:
    body = Bodies(a=5)

    @app.workflow(retry=hourly())
    async def flow() -> str:
        return await body("a")

    @app.workflow
    async def other() -> str:
        return await body("other")

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
    clock.advance(3000)
    async with app.worker():
        await app.run(other())
        assert body.ran == ["a", "other"]
        clock.advance(601)
        await suspensions(events, handle, 2)
    clock.advance(3601)
    with pytest.raises(ValueError, match="a"):
        await served(app, handle)
    assert body.ran == ["a", "other", "a", "a"]


async def test_an_operator_who_resumes_a_step_of_it_does_not_make_the_next_attempt_early(
    app: App, events: Any, clock: Any
) -> None:
    body, gate = Bodies(a=1), Gate()
    tries: list[int] = []

    @step(on_exhausted="park")
    async def parks() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("no paper")
        return "printed"

    @app.workflow(retry=hourly())
    async def flow() -> list[str]:
        printing = asyncio.create_task(parks())
        await hold(gate)
        return [await body("a"), await printing]

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        gate.open()
        await suspensions(events, handle, 1)
        await handle.resume()
        assert (await suspensions(events, handle, 2)).waiting_for == "retry"
        assert body.ran == ["a"]
        assert tries == [1]
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == ["a", "printed"]
    assert body.ran == ["a", "a"]


async def test_a_workflow_that_is_cancelled_in_the_pause_ends_without_another_attempt_at_the_step(
    app: App, events: Any
) -> None:
    body = Bodies(b=5)

    @app.workflow(retry=hourly())
    async def flow() -> None:
        await body("a")
        await body("b")

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        await handle.cancel(reason="enough")
        with pytest.raises(WorkflowCancelled, match="enough"):
            await handle.result(timeout=SOON)
    assert (await handle.describe()).status is Status.CANCELLED
    assert body.ran == ["a", "b"]


async def test_a_workflow_that_is_cancelled_in_the_pause_may_clean_up(app: App, events: Any) -> None:
    body = Bodies(b=5)

    @app.workflow(retry=hourly())
    async def flow() -> str:
        try:
            await body("a")
            return await body("b")
        except asyncio.CancelledError:
            await body("undo a")
            raise

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        await handle.cancel()
        with pytest.raises(WorkflowCancelled):
            await handle.result(timeout=SOON)
    assert body.ran == ["a", "b", "undo a"]


async def test_a_deadline_that_passes_in_the_pause_ends_the_workflow(app: App, events: Any, clock: Any) -> None:
    body = Bodies(b=5)

    @app.workflow(retry=hourly(), timeout=timedelta(minutes=30))
    async def flow() -> None:
        await body("b")

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        clock.advance(1801)
        with pytest.raises(DeadlineExceeded):
            await handle.result(timeout=SOON)
    assert body.ran == ["b"]


async def test_what_fails_after_it_was_cancelled_is_not_tried_again(app: App, events: Any) -> None:
    gate = Gate()

    @app.workflow(retry=quick(max_attempts=5))
    async def flow() -> None:
        try:
            await hold(gate)
        except asyncio.CancelledError:
            raise ValueError("could not clean up") from None

    async with app.worker():
        handle = await app.start(flow())
        await gate.reached()
        await handle.cancel()
        with pytest.raises(ValueError, match="could not clean up"):
            await handle.result(timeout=SOON)
    assert events.of(WorkflowRetries) == []


async def test_a_step_that_parks_costs_the_workflow_no_attempt(app: App, events: Any) -> None:
    attempts: list[int] = []
    tries: list[int] = []

    @step(on_exhausted="park")
    async def parks() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("no paper")
        return "printed"

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> str:
        attempts.append(current().attempt)
        return await parks()

    async with app.worker():
        handle = await app.start(flow())
        assert (await suspensions(events, handle, 1)).waiting_for == "operator"
        await handle.resume()
        assert await handle.result(timeout=SOON) == "printed"
    assert set(attempts) == {1}
    assert events.of(WorkflowRetries) == []


async def test_a_resume_after_the_last_attempt_begins_with_the_first(app: App) -> None:
    body = Bodies(b=3)
    attempts: list[int] = []

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> list[str]:
        attempts.append(current().attempt)
        return [await body("a"), await body("b")]

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(ValueError, match="b"):
            await handle.result(timeout=SOON)
        await handle.resume()
        assert await handle.result(timeout=SOON) == ["a", "b"]
    assert attempts == [1, 2, 1, 2]
    assert body.ran == ["a", "b", "b", "b", "b"]


async def test_a_workflow_may_say_itself_when_it_is_tried_again(app: App, events: Any, clock: Any) -> None:
    attempts: list[int] = []

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> str:
        attempts.append(current().attempt)
        if len(attempts) == 1:
            raise RetryAfter(HOUR)
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        assert (await suspensions(events, handle, 1)).seconds == pytest.approx(3600, abs=60)
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == "done"
    assert attempts == [1, 2]


async def test_a_workflow_that_polls_uses_up_no_attempts_and_its_history_does_not_grow(
    app: App, events: Any, clock: Any, sql: Sql
) -> None:
    attempts: list[int] = []

    @app.workflow(retry=quick(max_attempts=2))
    async def flow() -> str:
        attempts.append(current().attempt)
        if len(attempts) < 4:
            raise RetryAfter(HOUR, counts=False)
        return "done"

    async with app.worker():
        handle = await app.start(flow())
        for polls in (1, 2, 3):
            await suspensions(events, handle, polls)
            assert sql("SELECT count(*) FROM checkpoints") == [(2,)]
            assert await handle.steps() == []
            clock.advance(3601)
        assert await handle.result(timeout=SOON) == "done"
    assert attempts == [1, 1, 1, 1]


async def test_a_pause_that_is_cut_short_by_a_claim_goes_on(app: App, events: Any, clock: Any, sql: Sql) -> None:
    """However it became pending before its time (a suspension that was refused, a restore): never early."""
    body = Bodies(a=1)

    @app.workflow(retry=hourly())
    async def flow() -> str:
        return await body("a")

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        sql("UPDATE waits SET wake_at = wake_at - interval '50 minutes'")
        clock.advance(601)
        await events.wait_for(WorkflowsWoken)
        await events.wait_for(WorkflowClaimed, lambda event: event.epoch == 2)
        await suspensions(events, handle, 2)
        assert body.ran == ["a"]
        clock.advance(3000)
        assert await handle.result(timeout=SOON) == "a"
