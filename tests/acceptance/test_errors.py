"""Errors: a failed step raises the same thing on the first run and on replay; a failed workflow fails its callers."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest

from acceptance.support import AT_ONCE, SOON, Gate, hold, only_step, replayed, served
from perdure import (
    App,
    DatabaseUnavailable,
    KeyConflict,
    PerdureError,
    Retry,
    SerializationError,
    Status,
    StepFailed,
    WorkflowFailed,
    WorkflowNotFound,
    step,
)


class CardDeclined(Exception):
    def __init__(self, card: str, cents: int) -> None:
        super().__init__(card, cents)
        self.card = card
        self.cents = cents


class OutOfStock(Exception):
    """Keeps nothing in `args`; what it knows stands in its `__dict__`."""

    def __init__(self, *, item: str) -> None:
        super().__init__()
        self.item = item


class Weird(Exception):
    """Can't be made again from what it was made with."""

    def __init__(self, *, secret: object) -> None:
        if secret is None:
            raise RuntimeError("no secret")
        super().__init__("weird")
        self.lock = threading.Lock()

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("can't be pickled")


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no text either")


async def seen_twice(app: App, raise_it: Callable[[], object]) -> list[Exception]:
    """What a step that fails so raises in workflow code: on the first run, and on replay."""
    gate = Gate()
    caught: list[Exception] = []
    calls: list[int] = []

    @step
    async def failing() -> None:
        calls.append(1)
        raise_it()

    @app.workflow
    async def flow() -> None:
        try:
            await failing()
        except Exception as error:
            caught.append(error)
        await hold(gate)

    await replayed(app, flow(), gate)
    assert len(calls) == 1
    assert len(caught) == 2
    return caught


def raiser(make: Callable[[], BaseException]) -> Callable[[], object]:
    def raise_it() -> object:
        raise make()

    return raise_it


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no", 3),
        KeyError("missing"),
        LookupError(),
        FileNotFoundError(2, "no such file", "/tmp/x"),
        TimeoutError("too late"),
        ConnectionResetError(104, "reset"),
        ZeroDivisionError("division by zero"),
        NotImplementedError("not yet"),
        AssertionError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_built_in_exception_is_raised_as_itself(app: App, error: Exception) -> None:
    for caught in await seen_twice(app, raiser(lambda: error)):
        assert type(caught) is type(error)
        assert str(caught) == str(error)
        assert caught is not error
        assert caught.args == error.args


async def test_an_os_error_keeps_its_errno_and_file_name(app: App) -> None:
    for caught in await seen_twice(app, lambda: os.stat("/no/such/file")):
        assert isinstance(caught, FileNotFoundError)
        assert (caught.errno, caught.filename) == (2, "/no/such/file")


async def test_a_class_that_the_step_names_is_raised_as_itself(app: App) -> None:
    gate = Gate()
    caught: list[tuple[str, int]] = []

    @step(raises=(CardDeclined,))
    async def charge() -> None:
        raise CardDeclined("4242", 999)

    @app.workflow
    async def flow() -> str:
        try:
            await charge()
        except CardDeclined as declined:
            caught.append((declined.card, declined.cents))
        await hold(gate)
        return "declined"

    assert await replayed(app, flow(), gate) == "declined"
    assert caught == [("4242", 999)] * 2


async def test_a_class_that_the_app_names_is_raised_as_itself(database_url: str, schema: str) -> None:
    async with App(errors=[CardDeclined], database_url=database_url, schema=schema) as app:
        for caught in await seen_twice(app, raiser(lambda: CardDeclined("4242", 999))):
            assert type(caught) is CardDeclined
            assert (caught.card, caught.cents) == ("4242", 999)


async def test_a_class_that_keeps_nothing_in_args_is_made_from_its_attributes(database_url: str, schema: str) -> None:
    async with App(errors=[OutOfStock], database_url=database_url, schema=schema) as app:
        for caught in await seen_twice(app, raiser(lambda: OutOfStock(item="chair"))):
            assert type(caught) is OutOfStock
            assert caught.item == "chair"


async def test_any_other_class_is_a_step_failed_that_says_how_to_register_it(app: App) -> None:
    for caught in await seen_twice(app, raiser(lambda: CardDeclined("4242", 999))):
        assert type(caught) is StepFailed
        assert caught.type.endswith("CardDeclined")
        assert "4242" in caught.message
        assert "raise_it" in caught.traceback
        assert caught.attempts == 1
        assert "raises=" in str(caught)
        assert "CardDeclined" in str(caught)


async def test_a_subclass_is_not_taken_for_its_registered_base(database_url: str, schema: str) -> None:
    class Stolen(CardDeclined): ...

    async with App(errors=[CardDeclined], database_url=database_url, schema=schema) as app:
        kinds = [type(caught) for caught in await seen_twice(app, raiser(lambda: Stolen("4242", 1)))]
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Weird(secret=1),
        NoText,
        lambda: ExceptionGroup("several", [ValueError("one"), CardDeclined("4242", 1)]),
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        lambda: ValueError(threading.Lock()),
        lambda: ValueError("nul \0 and \ud800"),
        lambda: ValueError(float("nan")),
        lambda: StopAsyncIteration("odd"),
    ],
    ids=["weird", "without text", "group", "bytes in args", "unpicklable", "nul and surrogate", "nan", "stop"],
)
async def test_strange_exceptions_are_recorded_and_seen_alike(app: App, make: Callable[[], Exception]) -> None:
    first, second = await seen_twice(app, raiser(make))
    assert type(first) is type(second)
    assert str(first) == str(second)


async def test_strange_exceptions_of_a_registered_class_are_seen_alike(database_url: str, schema: str) -> None:
    async with App(errors=[Weird, NoText], database_url=database_url, schema=schema) as app:
        first, second = await seen_twice(app, raiser(lambda: Weird(secret=1)))
        assert type(first) is type(second)
        assert str(first) == str(second)


async def test_the_record_of_an_exception_group_tells_its_parts(app: App) -> None:
    @step
    async def failing() -> None:
        raise ExceptionGroup("several", [ValueError("the first"), KeyError("the second")])

    @app.workflow
    async def flow() -> None:
        await failing()

    handle = await app.start(flow())
    with pytest.raises((ExceptionGroup, StepFailed), match="several"):
        await served(app, handle)
    recorded = json.dumps((await only_step(handle)).error)
    assert "ExceptionGroup" in recorded
    assert "the first" in recorded
    assert "the second" in recorded


async def test_a_message_of_ten_megabytes_is_truncated_with_a_note(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        await failing()

    @step
    async def failing() -> None:
        raise ValueError("x" * 10_000_000)

    handle = await app.start(flow())
    with pytest.raises((ValueError, StepFailed), match="xxx") as caught:
        await served(app, handle)
    assert len(str(caught.value)) < 1_000_000
    for recorded in ((await only_step(handle)).error, (await handle.describe()).error):
        assert len(json.dumps(recorded)) < 1_000_000
        assert "characters cut" in recorded["message"]


async def test_a_chain_of_exceptions_stands_in_the_traceback(app: App) -> None:
    def chain() -> object:
        try:
            return {}["key"]
        except KeyError as error:
            raise CardDeclined("4242", 1) from error

    for caught in await seen_twice(app, chain):
        assert isinstance(caught, StepFailed)
        assert "KeyError" in caught.traceback


async def test_a_workflow_that_catches_the_error_goes_on(app: App) -> None:
    @step
    async def failing() -> None:
        raise KeyError("x")

    @app.workflow
    async def flow() -> str:
        try:
            await failing()
        except KeyError:
            return "caught"
        return "not"

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result() == "caught"
    assert (await only_step(handle)).status == "error"
    assert await handle.status() is Status.SUCCESS


async def test_the_result_of_a_workflow_that_failed_raises_a_built_in_exception_as_itself(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        raise KeyError("x", 2)

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(KeyError) as caught:
            await handle.result()
    assert caught.value.args == ("x", 2)
    assert await handle.status() is Status.ERROR


async def test_the_result_of_a_workflow_that_failed_raises_a_registered_class_as_itself(
    database_url: str, schema: str
) -> None:
    async with App(errors=[CardDeclined], database_url=database_url, schema=schema) as app:

        @app.workflow
        async def flow() -> None:
            raise CardDeclined("4242", 999)

        async with app.worker():
            with pytest.raises(CardDeclined) as caught:
                await app.run(flow())
    assert caught.value.cents == 999


async def test_the_result_of_a_workflow_that_failed_otherwise_is_a_workflow_failed(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        raise CardDeclined("4242", 999)

    async with app.worker():
        with pytest.raises(WorkflowFailed, match=r"App\(errors") as caught:
            await app.run(flow())
    assert caught.value.type.endswith("CardDeclined")
    assert "4242" in caught.value.message
    assert "flow" in caught.value.traceback


async def test_an_error_of_a_step_that_nobody_catches_fails_the_workflow(app: App) -> None:
    @step(retry=Retry(max_attempts=2, initial=timedelta(0)))
    async def failing() -> None:
        raise CardDeclined("4242", 999)

    @app.workflow
    async def flow() -> None:
        await failing()

    async with app.worker():
        handle = await app.start(flow())
        with pytest.raises(StepFailed, match="CardDeclined") as caught:
            await handle.result()
    assert caught.value.attempts == 2
    assert await handle.status() is Status.ERROR
    assert (await only_step(handle)).attempts == 2


async def test_the_view_shows_what_failed(app: App, sql: Callable[..., list[tuple[object, ...]]]) -> None:
    @step
    async def failing() -> None:
        raise CardDeclined("4242", 999)

    @app.workflow
    async def flow() -> None:
        await failing()

    handle = await app.start(flow())
    with pytest.raises(StepFailed):
        await served(app, handle)
    ((step_error,),) = sql(
        "SELECT error->>'type' FROM workflow_steps WHERE status = 'error' AND created_at > now() - interval '1 month'"
    )
    assert str(step_error).endswith("CardDeclined")
    assert sql("SELECT id FROM workflows WHERE status = 'error'") == [(handle.id,)]


@pytest.mark.parametrize(
    "make",
    [lambda: SystemExit(3), asyncio.CancelledError, lambda: GeneratorExit("odd"), lambda: BaseException("odd")],
    ids=["SystemExit", "CancelledError", "GeneratorExit", "BaseException"],
)
@pytest.mark.parametrize("where", ["step", "def step", "workflow"])
async def test_what_is_no_exception_ends_the_workflow_and_not_the_worker(
    app: App, where: str, make: Callable[[], BaseException]
) -> None:
    @step
    async def leaves() -> None:
        raise make()

    @step
    def leaves_its_thread() -> None:
        raise make()

    @app.workflow
    async def flow(where: str) -> None:
        if where == "step":
            await leaves()
        elif where == "def step":
            await leaves_its_thread()
        else:
            raise make()

    @app.workflow
    async def other() -> str:
        return "still alive"

    async with app.worker():
        handle = await app.start(flow(where))
        with pytest.raises(WorkflowFailed if where == "workflow" else StepFailed):
            await handle.result(timeout=SOON)
        assert await app.run(other()) == "still alive"
    assert await handle.status() is Status.ERROR


async def test_sys_exit_in_a_step_can_be_caught_as_a_failed_step(app: App) -> None:
    gate = Gate()

    @step
    def leaves() -> None:
        sys.exit("good bye")

    @app.workflow
    async def flow() -> str:
        try:
            await leaves()
        except StepFailed as failed:
            caught = f"{failed.type}: {failed.message}"
        await hold(gate)
        return caught

    assert "SystemExit: good bye" in await replayed(app, flow(), gate)


@pytest.mark.parametrize("stop", [StopIteration, StopAsyncIteration])
async def test_a_plain_step_may_raise_stop_iteration(app: App, stop: type[Exception]) -> None:
    @step
    def exhausted() -> None:
        raise stop

    @app.workflow
    async def flow() -> None:
        await exhausted()

    async with app.worker(grace=AT_ONCE):
        handle = await app.start(flow())
        with pytest.raises(Exception, match="Stop"):
            await handle.result(timeout=timedelta(seconds=5))
    assert (await only_step(handle)).status == "error"


async def test_a_recorded_error_is_a_new_instance_for_everybody(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        raise KeyError("x")

    async with app.worker():
        handle = await app.start(flow())
        caught: list[BaseException] = []
        for _ in range(2):
            with pytest.raises(KeyError) as error:
                await handle.result()
            caught.append(error.value)
    assert caught[0] is not caught[1]


async def test_a_class_is_never_looked_up_by_a_name_in_a_row(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        raise type("Popen", (Exception,), {"__module__": "subprocess"})("rm")

    async with app.worker():
        with pytest.raises(WorkflowFailed, match=r"subprocess\.Popen"):
            await app.run(flow())


@pytest.mark.parametrize(
    "error",
    [
        WorkflowNotFound(UUID(int=7)),
        KeyConflict("checkout", "order-1", UUID(int=7)),
        SerializationError("the result of step 'charge'", "set", "annotate it"),
        StepFailed("shop.CardDeclined", "no", "Traceback", 3),
        WorkflowFailed("shop.CardDeclined", "no", "Traceback", 3),
        DatabaseUnavailable("gone", True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_our_own_errors_survive_pickling(error: PerdureError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
