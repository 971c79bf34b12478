"""Retries: how often and when a step is tried again, and how long one attempt may take."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, only_step, served
from perdure import App, Handle, Retry, RetryAfter, StepFailed, StepTimeout, current, sleep, step
from perdure.telemetry import StepRetries, WorkflowCancelling, WorkflowSuspended


def quick(**options: Any) -> Retry:
    return Retry(initial=timedelta(0), **options)


class Flaky:
    """Fails so many times, then gives the number of calls."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


async def test_a_step_without_retry_makes_one_attempt(app: App) -> None:
    flaky = Flaky(ConnectionError())

    @step
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    handle = await app.start(flow())
    with pytest.raises(ConnectionError):
        await served(app, handle)
    assert flaky.calls == 1
    assert (await only_step(handle)).attempts == 1


@pytest.mark.parametrize("kind", ["async", "def"])
async def test_a_step_is_tried_until_it_succeeds(app: App, kind: str) -> None:
    flaky = Flaky(ConnectionError(), OSError())

    @step(retry=quick(max_attempts=3))
    async def fetch() -> int:
        return flaky()

    @step(retry=quick(max_attempts=3))
    def fetch_plainly() -> int:
        return flaky()

    @app.workflow
    async def flow(kind: str) -> int:
        return await (fetch() if kind == "async" else fetch_plainly())

    handle = await app.start(flow(kind))
    assert await served(app, handle) == 3
    found = await only_step(handle)
    assert (found.attempts, found.status, found.output) == (3, "success", 3)


async def test_a_step_that_never_succeeds_fails_with_its_last_error(app: App) -> None:
    flaky = Flaky(KeyError("first"), KeyError("second"), KeyError("third"))

    @step(retry=quick(max_attempts=2))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    handle = await app.start(flow())
    with pytest.raises(KeyError, match="second"):
        await served(app, handle)
    found = await only_step(handle)
    assert (found.attempts, found.status) == (2, "error")


async def test_a_failed_step_tells_how_many_attempts_were_made(app: App) -> None:
    class Own(Exception): ...

    @step(retry=quick(max_attempts=3))
    async def fetch() -> None:
        raise Own("no")

    @app.workflow
    async def flow() -> int:
        try:
            await fetch()
        except StepFailed as failed:
            return failed.attempts
        return 0

    async with app.worker():
        assert await app.run(flow()) == 3


async def test_retry_on_names_what_is_worth_another_attempt(app: App) -> None:
    flaky = Flaky(ConnectionResetError(), ValueError("no use"))

    @step(retry=quick(max_attempts=5, retry_on=(ConnectionError,)))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        with pytest.raises(ValueError, match="no use"):
            await app.run(flow())
    assert flaky.calls == 2


async def test_give_up_on_names_what_is_not(app: App) -> None:
    flaky = Flaky(OSError(), FileNotFoundError("gone"))

    @step(retry=quick(max_attempts=5, retry_on=(OSError,), give_up_on=(FileNotFoundError,)))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        with pytest.raises(FileNotFoundError, match="gone"):
            await app.run(flow())
    assert flaky.calls == 2


async def test_attempts_may_be_without_end(app: App) -> None:
    flaky = Flaky(*[ConnectionError() for _ in range(20)])

    @step(retry=quick(max_attempts=None))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        assert await app.run(flow()) == 21


async def test_a_poll_does_not_use_up_attempts(app: App) -> None:
    flaky = Flaky(*[RetryAfter(timedelta(0), counts=False) for _ in range(10)])

    @step(retry=quick(max_attempts=2))
    async def poll() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await poll()

    async with app.worker():
        assert await app.run(flow()) == 11


async def test_a_retry_after_that_counts_uses_up_attempts(app: App) -> None:
    flaky = Flaky(*[RetryAfter(timedelta(0)) for _ in range(10)])

    @step(retry=quick(max_attempts=2))
    async def poll() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await poll()

    handle = await app.start(flow())
    with pytest.raises((RetryAfter, StepFailed), match="try again after"):
        await served(app, handle)
    assert flaky.calls == 2
    assert (await only_step(handle)).attempts == 2


async def test_a_retry_after_says_how_long_the_pause_is(app: App, events: Any) -> None:
    flaky = Flaky(RetryAfter(timedelta(milliseconds=30)))

    @step(retry=Retry(max_attempts=2, initial=timedelta(hours=1)))
    async def poll() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await poll()

    async with app.worker():
        assert await app.run(flow()) == 2
    (retries,) = events.of(StepRetries)
    assert retries.seconds == pytest.approx(0.03)


async def test_a_poll_works_without_retry(app: App) -> None:
    flaky = Flaky(*[RetryAfter(timedelta(0), counts=False) for _ in range(5)])

    @step
    async def poll() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await poll()

    async with app.worker():
        assert await app.run(flow()) == 6


async def test_pauses_grow_up_to_a_maximum(app: App, events: Any) -> None:
    flaky = Flaky(*[ConnectionError() for _ in range(4)])
    retry = Retry(
        max_attempts=5,
        initial=timedelta(milliseconds=2),
        factor=2.0,
        maximum=timedelta(milliseconds=6),
        jitter=0.0,
    )

    @step(retry=retry)
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        await app.run(flow())
    assert [each.seconds for each in events.of(StepRetries)] == pytest.approx([0.002, 0.004, 0.006, 0.006])
    assert [each.attempt for each in events.of(StepRetries)] == [1, 2, 3, 4]


async def test_attempts_are_recorded_before_the_pause(app: App, events: Any, clock: Any) -> None:
    """The next worker waits for what is left of the pause, and goes on counting."""
    attempts: list[int] = []

    @step(retry=Retry(max_attempts=2, initial=timedelta(hours=1), jitter=0.0))
    async def fetch() -> None:
        attempts.append(current().attempt)
        raise ConnectionError(str(current().attempt))

    @app.workflow
    async def flow() -> None:
        await fetch()

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await events.wait_for(StepRetries)
    clock.advance(3601)
    with pytest.raises(ConnectionError, match="2"):
        await served(app, handle)
    assert attempts == [1, 2]
    assert (await only_step(handle)).attempts == 2


async def test_an_attempt_that_takes_too_long_times_out(app: App) -> None:
    never = asyncio.Event()
    ended: list[str] = []

    @step(timeout=timedelta(milliseconds=20))
    async def slow() -> None:
        try:
            await never.wait()
        finally:
            ended.append("unwound")

    @app.workflow
    async def flow() -> None:
        await slow()

    handle = await app.start(flow())
    with pytest.raises(StepTimeout, match=r"slow.*0\.02 s"):
        await served(app, handle)
    assert ended == ["unwound"]
    assert (await only_step(handle)).status == "error"


async def test_an_attempt_that_timed_out_is_tried_again(app: App) -> None:
    @step(timeout=timedelta(milliseconds=20), retry=quick(max_attempts=2))
    async def slow_at_first() -> int:
        if current().attempt == 1:
            await asyncio.Event().wait()
        return current().attempt

    @app.workflow
    async def flow() -> int:
        return await slow_at_first()

    handle = await app.start(flow())
    assert await served(app, handle) == 2
    assert (await only_step(handle)).attempts == 2


async def test_a_step_that_is_quick_enough_does_not_time_out(app: App) -> None:
    @step(timeout=SOON)
    async def quick_enough() -> str:
        return "done"

    @step(timeout=SOON)
    def quick_enough_too() -> str:
        return "done"

    @app.workflow
    async def flow() -> list[str]:
        return [await quick_enough(), await quick_enough_too()]

    async with app.worker():
        assert await app.run(flow()) == ["done", "done"]


async def test_a_timeout_that_workflow_code_catches_is_the_built_in_one_too(app: App) -> None:
    @step(timeout=timedelta(milliseconds=10))
    async def slow() -> None:
        await asyncio.Event().wait()

    @app.workflow
    async def flow() -> str:
        try:
            await slow()
        except TimeoutError as error:
            return type(error).__name__
        return ""

    async with app.worker():
        assert await app.run(flow()) == "StepTimeout"


async def test_a_plain_step_that_times_out_keeps_its_thread_and_the_next_attempt_waits_for_it(
    app: App, events: Any
) -> None:
    release = threading.Event()
    running: list[int] = []
    most: list[int] = []

    @step(timeout=timedelta(milliseconds=20), retry=quick(max_attempts=2))
    def slow_at_first() -> int:
        running.append(1)
        most.append(len(running))
        try:
            if current().attempt == 1:
                release.wait(SOON.total_seconds())
            return current().attempt
        finally:
            running.pop()

    @app.workflow
    async def flow() -> int:
        return await slow_at_first()

    @app.workflow
    async def other() -> None: ...

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(StepRetries)
        for _ in range(3):  # an attempt that didn't wait would have begun by now
            await app.run(other())
        release.set()
        assert await handle.result(timeout=SOON) == 2
    assert most == [1, 1]


async def test_check_ends_a_plain_step_that_timed_out(app: App) -> None:
    ended: list[BaseException] = []
    pause = threading.Event()

    @step(timeout=timedelta(milliseconds=20), retry=quick(max_attempts=2))
    def endless_at_first() -> int:
        attempt = current().attempt
        while attempt == 1:
            try:
                current().check()
            except BaseException as error:
                ended.append(error)
                raise
            pause.wait(0.002)
        return attempt

    @app.workflow
    async def flow() -> int:
        return await endless_at_first()

    handle = await app.start(flow())
    assert await served(app, handle) == 2
    assert len(ended) == 1


async def test_a_timed_out_attempt_keeps_its_own_number(app: App, events: Any) -> None:
    release = threading.Event()
    seen: list[tuple[int, int]] = []

    @step(timeout=timedelta(milliseconds=20), retry=quick(max_attempts=2))
    def slow_at_first() -> None:
        before = current().attempt
        if before == 1:
            release.wait(SOON.total_seconds())
        seen.append((before, current().attempt))

    @app.workflow
    async def flow() -> None:
        await slow_at_first()

    @app.workflow
    async def other() -> None: ...

    async with app.worker():
        handle = await app.start(flow())
        await events.wait_for(StepRetries)
        await app.run(other())
        release.set()
        await handle.result(timeout=SOON)
    assert seen == [(1, 1), (2, 2)]


async def test_a_timeout_holds_for_the_awaitable_that_a_plain_step_returns(app: App) -> None:
    @step(timeout=timedelta(milliseconds=20))
    def slow() -> object:
        return asyncio.Event().wait()

    @app.workflow
    async def flow() -> None:
        await slow()

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        with pytest.raises(StepTimeout):
            await handle.result(timeout=timedelta(seconds=5))


async def test_what_a_timed_out_attempt_returns_at_last_is_thrown_away(app: App, events: Any) -> None:
    release = threading.Event()

    @step(timeout=timedelta(milliseconds=20))
    def late() -> str:
        release.wait(SOON.total_seconds())
        return "too late"

    @app.workflow
    async def flow() -> str:
        try:
            return await late()
        except StepTimeout:
            release.set()
            return "timed out"

    handle = await app.start(flow())
    assert await served(app, handle) == "timed out"
    assert (await only_step(handle)).status == "error"


async def test_attempts_stand_in_the_view(app: App, sql: Callable[..., list[tuple[object, ...]]]) -> None:
    flaky = Flaky(ConnectionError(), ConnectionError())

    @step(retry=quick(max_attempts=3))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        await app.run(flow())
    assert sql("SELECT name, status, attempts FROM workflow_steps") == [("fetch", "success", 3)]


# --- pauses are durable ---------------------------------------------------------------------------------------------

HOUR = timedelta(hours=1)
PAUSES = [
    pytest.param(ConnectionError("not yet"), id="after a failure"),
    pytest.param(RetryAfter(HOUR), id="that the step asked for"),
    pytest.param(RetryAfter(HOUR, counts=False), id="between polls"),
]


def hourly(flaky: Flaky) -> Callable[[], Any]:
    """A step with pauses of an hour."""

    @step(retry=Retry(max_attempts=5, initial=HOUR, factor=1.0, maximum=HOUR, jitter=0.0))
    async def fetch() -> int:
        return flaky()

    return fetch


def is_of(handle: Handle[Any], *, after: int = 0) -> Callable[[Any], bool]:
    """An event of that workflow; the first that comes after so many others."""
    left = after

    def fits(event: Any) -> bool:
        nonlocal left
        if event.workflow_id != handle.id:
            return False
        left -= 1
        return left < 0

    return fits


async def suspensions(events: Any, handle: Handle[Any], count: int) -> Any:
    """Wait until it has left memory so many times; returns the last of these."""
    return await events.wait_for(WorkflowSuspended, is_of(handle, after=count - 1))


def seconds_left(sql: Callable[..., list[Any]], handle: Handle[Any]) -> float:
    """For how long it will wait in the database."""
    query = "SELECT date_part('epoch', wake_at - now() - shift) FROM workflows, test_clock WHERE id = %s"
    ((seconds,),) = sql(f"{query} AND waiting_for = 'retry'", handle.id)
    return float(seconds)


@pytest.mark.parametrize("error", PAUSES)
async def test_a_worker_that_ends_in_the_pause_leaves_the_rest_of_it_to_the_next(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]], error: Exception
) -> None:
    flaky, gate = Flaky(error), Gate()
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        value, _ = await asyncio.gather(fetch(), hold(gate))  # at the gate it can't leave memory
        return value

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        await events.wait_for(StepRetries)
        await gate.reached()
    assert (await handle.describe()).status == "pending"
    clock.advance(3000)
    async with app.worker():
        await gate.reached(2)
        gate.open()
        await suspensions(events, handle, 1)
        assert flaky.calls == 1
        assert seconds_left(sql, handle) == pytest.approx(600, abs=60)
        clock.advance(601)
        assert await handle.result(timeout=SOON) == 2


@pytest.mark.parametrize("error", PAUSES)
async def test_a_pause_goes_on_when_something_else_wakes_the_workflow(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]], error: Exception
) -> None:
    flaky = Flaky(error)
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        value, _ = await asyncio.gather(fetch(), sleep(timedelta(minutes=10)))
        return value

    async with app.worker():
        handle = await app.start(flow())
        assert (await suspensions(events, handle, 1)).waiting_for == "timer"
        clock.advance(610)
        assert (await suspensions(events, handle, 2)).waiting_for == "retry"
        assert flaky.calls == 1
        assert seconds_left(sql, handle) == pytest.approx(2990, abs=60)
        clock.advance(3000)
        assert await handle.result(timeout=SOON) == 2


@pytest.mark.parametrize("error", PAUSES)
async def test_a_pause_goes_on_when_the_code_survives_a_cancellation(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]], error: Exception
) -> None:
    flaky = Flaky(error)
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        fetching = asyncio.create_task(fetch())
        try:
            await asyncio.shield(fetching)
        except asyncio.CancelledError:
            pass
        return await fetching

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        await handle.cancel()
        await events.wait_for(WorkflowCancelling)
        await suspensions(events, handle, 2)
        assert flaky.calls == 1
        assert seconds_left(sql, handle) == pytest.approx(3600, abs=60)
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == 2


async def test_polls_do_not_make_the_history_grow(app: App, sql: Callable[..., list[Any]]) -> None:
    flaky = Flaky(*[RetryAfter(timedelta(milliseconds=5), counts=False) for _ in range(8)])

    @step
    async def poll() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await poll()

    async with app.worker():
        assert await app.run(flow()) == 9
    assert sql("SELECT key, kind, attempts FROM checkpoints ORDER BY key") == [
        ("$input", "input", 1),
        ("$result", "result", 1),
        ("poll", "step", 1),
        ("poll#t", "timer", 1),
    ]


async def test_polls_that_leave_memory_each_time_do_not_make_the_history_grow(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]]
) -> None:
    flaky = Flaky(*[RetryAfter(HOUR, counts=False) for _ in range(4)])
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        handle = await app.start(flow())
        for polls in range(1, 5):
            await suspensions(events, handle, polls)
            assert flaky.calls == polls
            assert seconds_left(sql, handle) == pytest.approx(3600, abs=60)
            assert sql("SELECT count(*) FROM checkpoints") == [(2,)]
            clock.advance(3600)
        assert await handle.result(timeout=SOON) == 5
    assert (await only_step(handle)).attempts == 1


async def test_a_poll_among_attempts_keeps_their_number(app: App, events: Any, clock: Any) -> None:
    flaky = Flaky(ConnectionError("1"), RetryAfter(HOUR, counts=False), ConnectionError("2"), ConnectionError("3"))
    seen: list[int] = []

    @step(retry=Retry(max_attempts=3, initial=HOUR, factor=1.0, maximum=HOUR, jitter=0.0))
    async def fetch() -> int:
        seen.append(current().attempt)
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        handle = await app.start(flow())
        for pauses in range(1, 4):
            await suspensions(events, handle, pauses)
            clock.advance(3601)
        with pytest.raises(ConnectionError, match="3"):
            await handle.result(timeout=SOON)
    assert seen == [1, 2, 2, 3]


async def test_a_poll_shows_until_when_it_waits(app: App, events: Any, clock: Any) -> None:
    flaky = Flaky(RetryAfter(HOUR, counts=False))
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        waiting = await only_step(handle)
        assert (waiting.name, waiting.key, waiting.status) == ("fetch", "fetch", "waiting")
        assert waiting.wake_at is not None
        assert waiting.wake_at - waiting.created_at == HOUR
        clock.advance(3601)
        await handle.result(timeout=SOON)
    assert (await only_step(handle)).status == "success"


async def test_attempts_are_shown_while_the_step_is_tried_again_and_kept_out_of_sight_afterwards(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]]
) -> None:
    flaky = Flaky(ConnectionError("first"), ValueError("second"))
    fetch = hourly(flaky)

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        handle = await app.start(flow())
        await suspensions(events, handle, 1)
        clock.advance(3601)
        await suspensions(events, handle, 2)
        first, second = sorted(await handle.steps(), key=lambda found: found.attempts)
        assert [(one.name, one.kind, one.status, one.attempts) for one in (first, second)] == [
            ("fetch", "attempt", "retrying", 1),
            ("fetch", "attempt", "retrying", 2),
        ]
        assert [one.error["message"] for one in (first, second)] == ["first", "second"]
        assert second.wake_at is not None
        assert second.wake_at - second.created_at == HOUR
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == 3
    assert (await only_step(handle)).attempts == 3
    assert sql("SELECT key, kind FROM checkpoints WHERE kind = 'attempt' ORDER BY key") == [
        ("fetch#a1", "attempt"),
        ("fetch#a2", "attempt"),
    ]


@pytest.mark.parametrize(("jitter", "shortest", "longest"), [(0.0, 2.0, 2.0), (0.5, 1.0, 3.0), (1.0, 0.0, 4.0)])
async def test_pauses_differ_by_no_more_than_their_jitter(
    app: App, events: Any, jitter: float, shortest: float, longest: float
) -> None:
    flaky = Flaky(*[ConnectionError() for _ in range(40)])

    @step(retry=Retry(max_attempts=None, initial=timedelta(milliseconds=2), factor=1.0, jitter=jitter))
    async def fetch() -> int:
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await fetch()

    async with app.worker():
        await app.run(flow())
    pauses = [each.seconds * 1000 for each in events.of(StepRetries)]
    assert len(pauses) == 40
    assert all(shortest - 0.001 <= pause <= longest + 0.001 for pause in pauses)
    assert jitter == 0 or max(pauses) - min(pauses) > (longest - shortest) / 4, "they hardly differ"


async def test_a_job_is_tried_again(app: App, events: Any, clock: Any) -> None:
    flaky = Flaky(ConnectionError())

    @app.job(retry=Retry(max_attempts=2, initial=HOUR, jitter=0.0))
    def fetch() -> int:
        return flaky()

    async with app.worker():
        handle = await app.start(fetch())
        await suspensions(events, handle, 1)
        clock.advance(3601)
        assert await handle.result(timeout=SOON) == 2


async def test_a_transaction_that_polls_writes_nothing_until_it_succeeds(
    app: App, events: Any, clock: Any, sql: Callable[..., list[Any]], database_url: str, schema: str
) -> None:
    flaky = Flaky(RetryAfter(HOUR, counts=False), ConnectionError())
    sql("CREATE TABLE effects (call int4)")

    @asynccontextmanager
    async def connect() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(
            database_url, autocommit=True, options=f"-c search_path={schema}"
        ) as connection:
            yield connection

    @app.transaction(using=connect, retry=Retry(max_attempts=2, initial=HOUR, jitter=0.0))
    async def put(connection: psycopg.AsyncConnection[Any]) -> int:
        await connection.execute("INSERT INTO effects VALUES (%s)", (flaky.calls + 1,))
        return flaky()

    @app.workflow
    async def flow() -> int:
        return await put()

    async with app.worker():
        handle = await app.start(flow())
        for pauses in (1, 2):
            await suspensions(events, handle, pauses)
            assert sql("SELECT call FROM effects") == []
            clock.advance(3601)
        assert await handle.result(timeout=SOON) == 3
    assert sql("SELECT call FROM effects") == [(3,)]
